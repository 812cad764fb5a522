"""Tensors between host and device without waiting for what the device has yet to do: through pinned memory, which torch keeps."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`; itself on a CPU. A copy from memory that is not pinned would wait for every step launched before."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A device's tensor in pinned memory, complete once the device gets there; itself when it is on the host."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
