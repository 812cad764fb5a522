"""Reads and checks the header of a safetensors file before anything is allocated or mapped by what it claims.

Format: u64 little-endian header length, a JSON object of {name: {dtype, shape, data_offsets}}, then the data, without holes
(https://github.com/huggingface/safetensors#format). Whatever breaks it is refused with the file, the tensor and the reason.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: `offset` in bytes from the start of `file`, `num_bytes` = the shape's elements times the dtype's size."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, in the order of their data. Raises `CheckpointError` for anything that is not exactly right."""
    header, data_start, file_bytes = _read_json(file)
    entries = [_entry(file, name, fields, data_start) for name, fields in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    expected = data_start
    for entry in entries:
        if entry.offset + entry.num_bytes > file_bytes:
            missing = entry.offset + entry.num_bytes - file_bytes
            reason = f"lies {missing} bytes beyond the end of the file ({file_bytes} bytes): the file is truncated"
            raise CheckpointError(str(file), reason, tensor=entry.name)
        if entry.offset != expected:
            what = "overlaps the tensor before it" if entry.offset < expected else "leaves a hole before it"
            raise CheckpointError(str(file), what, tensor=entry.name)
        expected += entry.num_bytes
    if expected != file_bytes:
        raise CheckpointError(str(file), f"holds {file_bytes - expected} bytes that belong to no tensor")
    return {entry.name: entry for entry in entries}


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """(header, first byte of the data, bytes of the file)."""
    try:
        with file.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            if file_bytes < 8:
                raise CheckpointError(str(file), f"is truncated: {file_bytes} bytes do not hold a safetensors header")
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MAX_HEADER_BYTES, file_bytes - 8):
                reason = f"claims a header of {length} bytes in a file of {file_bytes}: truncated, or no safetensors file"
                raise CheckpointError(str(file), reason)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(file), f"has a header that is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(str(file), "has a header that is no JSON object")
    return header, 8 + length, file_bytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(file: Path, name: str, fields: Any, data_start: int) -> StoredTensor:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(str(file), "needs exactly dtype, shape and data_offsets", tensor=name)
    dtype = _DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(str(file), f"has unknown dtype {fields['dtype']!r}", tensor=name)
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(str(file), f"shape must be at most {_MAX_DIMENSIONS} whole numbers, not negative", tensor=name)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(str(file), "data_offsets must be two whole numbers, the first not above the second", tensor=name)
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes != offsets[1] - offsets[0]:
        reason = f"shape {shape} of {fields['dtype']} takes {num_bytes} bytes, data_offsets give {offsets[1] - offsets[0]}"
        raise CheckpointError(str(file), reason, tensor=name)
    return StoredTensor(
        name=name, file=file, dtype=dtype, shape=tuple(shape), offset=data_start + offsets[0], num_bytes=num_bytes
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
