"""Attention backends by name, imported on demand. `auto` is Triton on CUDA and ROCm; on a CPU C++ where it can be had, else plain torch."""

from importlib import import_module

from torch import device, int8

from engine.attention.base import AttentionBackend, KVCacheSpec
from engine.errors import ConfigError
from kernels.cpu import attention
from kernels.ops import Operators

BACKENDS = {
    "torch_paged": "engine.attention.torch_paged:TorchPagedAttention",
    "cpu_paged": "engine.attention.cpu_paged:CpuPagedAttention",
    "triton_paged": "engine.attention.triton_paged:TritonPagedAttention",
}
_FIELD = "engine.attention_backend"


def check_backend(name: str, on: device) -> None:
    """Raises `ConfigError` for a name that is neither `auto` nor in `BACKENDS`, or that cannot run on this device."""
    if name not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise ConfigError(f"{_FIELD} {name!r} is unknown; known are {known}", field=_FIELD)
    if name == "triton_paged" and on.type != "cuda":
        raise ConfigError(f"{_FIELD} triton_paged needs a GPU", field=_FIELD)
    if name == "cpu_paged" and on.type != "cpu":
        raise ConfigError(f"{_FIELD} cpu_paged is for a CPU, not {on}", field=_FIELD)


def cpu_refusal(operators: Operators, spec: KVCacheSpec) -> str:
    """Why the C++ operators do not compute attention over such a cache; "" when they do."""
    if not operators.attends:
        return operators.reason
    return attention.refusal(spec.head_dim, spec.block_size, spec.dtype)


def _check_triton(spec: KVCacheSpec) -> None:
    # Imported where it is asked for: a CPU loads none of Triton's kernels.
    from kernels.triton.tuning import MAX_HEAD_DIM

    if spec.head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"{_FIELD} triton_paged cannot compute heads of {spec.head_dim} numbers (up to {MAX_HEAD_DIM} can be computed): "
            "torch_paged, which is slower, can",
            field=_FIELD,
        )


def make_backend(name: str, on: device, operators: Operators, spec: KVCacheSpec) -> AttentionBackend:
    """A new backend for caches of `spec`. Raises `ConfigError` as `check_backend` does, for `cpu_paged` where it is refused, for heads that
    Triton's kernels do not take, and for int8 where another than `cpu_paged` would be taken."""
    check_backend(name, on)
    refusal = cpu_refusal(operators, spec) if on.type == "cpu" else ""
    if name == "auto":
        name = "triton_paged" if on.type == "cuda" else "torch_paged" if on.type != "cpu" or refusal else "cpu_paged"
    if name == "cpu_paged" and refusal:
        raise ConfigError(f"{_FIELD} cpu_paged cannot be had: {refusal}", field=_FIELD)
    if name == "triton_paged":
        _check_triton(spec)
    if spec.dtype == int8 and name != "cpu_paged":
        why = refusal or f"as configured, on {on.type}"
        raise ConfigError(
            f"engine.kv_cache_dtype int8 needs the C++ operators of a CPU; this engine attends by {name}: {why}",
            field="engine.kv_cache_dtype",
        )
    module, _, class_name = BACKENDS[name].partition(":")
    backend: AttentionBackend = getattr(import_module(module), class_name)()
    return backend
