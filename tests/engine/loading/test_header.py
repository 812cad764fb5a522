"""A safetensors header is believed only when every byte of it fits the file."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.loading.header import read_header


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_safetensors_writes_is_read(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: (item.shape, item.dtype) for name, item in found.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


FAULTS = {
    "empty file": (b"", "is truncated: 0 bytes do not hold"),
    "terabytes of header": (struct.pack("<Q", 1 << 42) + b"{}", "claims a header of 4398046511104 bytes in a file of 10"),
    "header cut off": (struct.pack("<Q", 100) + b'{"a":', "claims a header of 100 bytes"),
}


@pytest.mark.parametrize(("content", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_broken_length_is_refused(tmp_path, content, reason):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_header(tmp_path / "x.safetensors")


HEADERS = {
    "no JSON": (b"\xff\xfe{", b"", "", "not valid JSON"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b"", "", "not valid JSON"),
    "no object": ([1], b"", "", "no JSON object"),
    "a name twice": (b'{"a":1,"a":2}', b"", "", "a name stands twice"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), "a", "needs exactly dtype"),
    "unknown dtype": ({"a": entry([1], 0, 4, "Q4")}, bytes(4), "a", "unknown dtype 'Q4'"),
    "negative shape": ({"a": entry([-1, -1], 0, 4)}, bytes(4), "a", "not negative"),
    "huge shape": ({"a": entry([1 << 40, 1 << 40], 0, 4)}, bytes(4), "a", "data_offsets give 4"),
    "shape of booleans": ({"a": entry([True], 0, 4)}, bytes(4), "a", "whole numbers"),
    "offsets turned round": ({"a": entry([1], 4, 0)}, bytes(4), "a", "the first not above the second"),
    "shape and bytes differ": ({"a": entry([3], 0, 8)}, bytes(8), "a", "takes 12 bytes, data_offsets give 8"),
    "data cut off": ({"a": entry([4], 0, 16)}, bytes(10), "a", "6 bytes beyond the end .* truncated"),
    "terabytes of data": ({"a": entry([1 << 40], 0, 1 << 42)}, bytes(4), "a", "beyond the end"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "b", "overlaps"),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), "b", "leaves a hole"),
    "bytes left over": ({"a": entry([1], 0, 4)}, bytes(9), "", "5 bytes that belong to no tensor"),
}


@pytest.mark.parametrize(("header", "data", "tensor", "reason"), HEADERS.values(), ids=HEADERS)
def test_a_broken_header_is_refused_by_file_tensor_and_reason(tmp_path, header, data, tensor, reason):
    file = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(file)
    assert (caught.value.file, caught.value.tensor) == (str(file), tensor)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read: No such file"):
        read_header(tmp_path / "gone.safetensors")
