"""The safetensors of a model directory: which tensors there are, and how they get into a model.

Everything is checked against the model's shapes before a byte of weights is read; then each tensor is streamed through one
staging buffer into its place, so that loading takes no more memory than the model and the buffer.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.loading.config_file import read_json
from engine.loading.header import StoredTensor, read_header

STAGING_BYTES = 32 << 20

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Buffers that old exporters wrote; they follow from config.json.
_DERIVED = ".rotary_emb.inv_freq"


def stored_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory by name: of the files that model.safetensors.index.json lists, else of all *.safetensors.

    Raises `CheckpointError` that names the file, the tensor and the reason.
    """
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        return _of_index(index)
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise CheckpointError(str(model_dir), _why_no_weights(model_dir))
    return _of_files(files)


def check(stored: Mapping[str, StoredTensor], targets: Mapping[str, Tensor], model_dir: Path, *, tied: bool) -> None:
    """Raises `CheckpointError` unless the checkpoint holds exactly the tensors of the model, in its shapes, as floats.

    With `tied` a spare lm_head.weight is passed over: some exporters write it although the embedding stands for it.
    """
    for name, target in targets.items():
        found = stored.get(name)
        if found is None:
            raise CheckpointError(str(model_dir), "is in no *.safetensors file, but config.json calls for it", tensor=name)
        if found.shape != tuple(target.shape):
            reason = f"has shape {list(found.shape)}, config.json calls for {list(target.shape)}"
            raise CheckpointError(str(found.file), reason, tensor=name)
        if target.is_floating_point() and found.dtype not in _FLOATS:
            raise CheckpointError(str(found.file), f"has dtype {found.dtype}, which is no plain float", tensor=name)
    for name, found in stored.items():
        if name not in targets and not name.endswith(_DERIVED) and not (tied and name == "lm_head.weight"):
            raise CheckpointError(str(found.file), "is not part of the model that config.json describes", tensor=name)


def load(stored: Mapping[str, StoredTensor], targets: Mapping[str, Tensor], progress: Callable[[float, str], None]) -> None:
    """Copies each tensor into its target, converting the dtype. `check` has passed. `progress`: share of the bytes in [0, 1]."""
    wanted = sorted((stored[name] for name in targets), key=lambda tensor: (tensor.file, tensor.offset))
    total = sum(tensor.num_bytes for tensor in wanted) or 1
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
    done = 0
    for file, tensors in _by_file(wanted):
        try:
            with file.open("rb", buffering=0) as stream:
                for tensor in tensors:
                    _copy(stream, tensor, targets[tensor.name], staging)
                    done += tensor.num_bytes
                    progress(done / total, f"loading {file.name}")
        except OSError as error:
            raise CheckpointError(str(file), f"cannot be read: {error.strerror}") from error


def _copy(stream: BinaryIO, tensor: StoredTensor, target: Tensor, staging: Tensor) -> None:
    flat = target.view(-1)
    stream.seek(tensor.offset)
    step = staging.numel() // tensor.dtype.itemsize
    for start in range(0, flat.numel(), step):
        count = min(step, flat.numel() - start)
        piece = staging[: count * tensor.dtype.itemsize]
        _read_fully(stream, piece.numpy().data, tensor)
        flat[start : start + count].copy_(piece.view(tensor.dtype))


def _read_fully(stream: BinaryIO, into: memoryview, tensor: StoredTensor) -> None:
    while into:
        read = stream.readinto(into)  # type: ignore[attr-defined]
        if not read:
            raise CheckpointError(str(tensor.file), "ends too early: the file was cut while it was read", tensor=tensor.name)
        into = into[read:]


def _by_file(tensors: Iterable[StoredTensor]) -> list[tuple[Path, list[StoredTensor]]]:
    grouped: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        grouped.setdefault(tensor.file, []).append(tensor)
    return list(grouped.items())


def _of_index(index: Path) -> dict[str, StoredTensor]:
    placed: Any = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(str(index), "weight_map must map tensor names to file names")
    for file in set(placed.values()):
        # A path would let a checkpoint read outside its directory.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(str(index), f"names the file {file!r}; only *.safetensors beside the index are read")
        if not (index.parent / file).is_file():
            raise CheckpointError(str(index.parent / file), f"is missing, though {index.name} lists it")
    found = _of_files([index.parent / file for file in sorted(set(placed.values()))])
    for name, file in placed.items():
        if name not in found or found[name].file.name != file:
            raise CheckpointError(str(index.parent / file), f"does not hold it, though {index.name} says so", tensor=name)
    return found


def _of_files(files: list[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in found:
                raise CheckpointError(str(file), f"stands in {found[name].file.name} too", tensor=name)
            found[name] = tensor
    return found


def _why_no_weights(model_dir: Path) -> str:
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt*")):
        return "holds PyTorch pickles and no *.safetensors; pickles are never read: use a safetensors release"
    if any(model_dir.glob("*.gguf")):
        return "holds a GGUF file and no *.safetensors: turn it into a model directory with `sluice model import FILE DIR`"
    return "holds no *.safetensors file"
