"""Reads the keys and values of a GGUF file within bounds, before readers that believe every length see it.

Format: header, keys with values, tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import CheckpointError

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# The readers make an object of each value, an array's elements included; large vocabularies with their merges have a million.
_MAX_VALUES = 1 << 21
_MAX_STRING_BYTES = 64 << 20


def read_fields(source: Path) -> dict[str, Any]:
    """The values by key, None for an array: those are walked, not kept. Raises `CheckpointError` that names file, key and reason."""
    try:
        with source.open("rb") as stream:
            return _Section(source, stream).read()
    except OSError as error:
        raise CheckpointError(str(source), f"cannot be read: {error.strerror}") from error


class _Section:
    """A walk from the start of the file to the end of its last value, never beyond the file's bytes."""

    def __init__(self, source: Path, stream: BinaryIO) -> None:
        self._source = source
        self._stream = stream
        self._left = os.fstat(stream.fileno()).st_size
        self._values_left = _MAX_VALUES
        self._where = ""

    def read(self) -> dict[str, Any]:
        num_fields = self._header()
        self._count(num_fields)
        found = {}
        for index in range(num_fields):
            self._where = f"key {index}"
            key = self._string()
            self._where = f"field {key[:80]!r}"
            found[key] = self._value()
        return found

    def _header(self) -> int:
        """How many fields follow."""
        size = self._left
        head = self._stream.read(24)
        self._left -= len(head)
        if head[:4] != b"GGUF":
            raise CheckpointError(str(self._source), "is no GGUF file (it does not begin with the letters GGUF)")
        if len(head) < 24:
            raise CheckpointError(str(self._source), f"is truncated: {len(head)} bytes do not hold a GGUF header")
        version, num_tensors, num_fields = struct.unpack("<IQQ", head[4:])
        if version not in (2, 3):
            reason = f"has GGUF version {version}; versions 2 and 3, little endian, are supported"
            raise CheckpointError(str(self._source), reason)
        # A name, a type and an offset take at least 24 bytes a tensor; a key, a type and a value at least 13 a field.
        if 24 * num_tensors + 13 * num_fields > size:
            reason = f"claims {num_tensors} tensors and {num_fields} fields, more than it can hold"
            raise CheckpointError(str(self._source), reason)
        return int(num_fields)

    def _value(self) -> Any:
        kind = self._number("<I")
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise self._damaged(f"has unknown type {kind}")
        return self._number(_NUMBERS[kind])

    def _array(self) -> None:
        kind, length = self._number("<I"), self._number("<Q")
        self._count(length)
        if kind == _STRING:
            for _ in range(length):
                self._string()
        elif kind in _NUMBERS:
            self._take(length * struct.calcsize(_NUMBERS[kind]))
        else:
            raise self._damaged(f"is an array of type {kind}; arrays of numbers and of strings are read")

    def _count(self, values: int) -> None:
        if values > self._values_left:
            raise self._damaged(f"claims {values} values; a file may hold {_MAX_VALUES}")
        self._values_left -= values

    def _string(self) -> str:
        length = self._number("<Q")
        if length > _MAX_STRING_BYTES:
            raise self._damaged(f"claims a text of {length} bytes; {_MAX_STRING_BYTES} are read")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("is not valid UTF-8") from error

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, size: int) -> bytes:
        taken = self._stream.read(size) if size <= self._left else b""
        if len(taken) < size:
            raise self._damaged(f"takes {size} bytes where {self._left} are left")
        self._left -= size
        return taken

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(str(self._source), f"is truncated or damaged: {self._where} {what}")
