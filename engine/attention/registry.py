"""Attention backends by name. `auto` is Triton on CUDA and ROCm, plain torch elsewhere; imported on demand."""

from importlib import import_module

from torch import device

from engine.attention.base import AttentionBackend
from engine.errors import ConfigError

BACKENDS = {
    "torch_paged": "engine.attention.torch_paged:TorchPagedAttention",
    "triton_paged": "engine.attention.triton_paged:TritonPagedAttention",
}


def make_backend(name: str, on: device) -> AttentionBackend:
    """A new backend. Raises `ConfigError` for a name that is not in `BACKENDS`, or that cannot run on this device."""
    if name == "auto":
        name = "triton_paged" if on.type == "cuda" else "torch_paged"
    if name not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise ConfigError(f"engine.attention_backend {name!r} is unknown; known are {known}", field="engine.attention_backend")
    if name == "triton_paged" and on.type != "cuda":
        raise ConfigError("engine.attention_backend triton_paged needs a GPU", field="engine.attention_backend")
    module, _, class_name = BACKENDS[name].partition(":")
    backend: AttentionBackend = getattr(import_module(module), class_name)()
    return backend
