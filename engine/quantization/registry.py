"""Weight formats by the name that a checkpoint's `quantization_config.quant_method` or `engine.quantize` gives; "" is none."""

from importlib import import_module

from engine.quantization.base import QuantMethod
from kernels.ops import Operators

METHODS = {
    "": "engine.quantization.unquantized:Unquantized",
}
PACKED_METHODS = {
    "": "engine.quantization.packed:Packed",
    "int8": "engine.quantization.packed:Int8",
    "int4": "engine.quantization.packed:Int4",
}
"""Where the operators have packed linears."""

HEAD_METHODS = {"int8": "int8"}
"""What the head is kept in beside a format of the layers; plain where none is named, since its error falls straight onto the logits.
In INT8 it costs 1.5 % of perplexity and gives a sixth to a third of the speed (SmolLM2-135M: its head is a fifth of its weights)."""

SCREENED_HEAD = "engine.quantization.packed:Screened"
"""A plain head where the operators have screens and one is wanted."""


def methods(ops: Operators) -> dict[str, str]:
    """The formats that these operators can multiply by."""
    return METHODS if ops.pack_weight is None else PACKED_METHODS


def method(name: str, ops: Operators) -> QuantMethod:
    """The method of that name, bound to `ops`. Raises `KeyError` for a name that is not in `methods(ops)`."""
    return _made(methods(ops)[name], ops)


def head_method(name: str, ops: Operators, *, screened: bool) -> QuantMethod:
    """The head's method in a model whose layers have the method of that name; `screened`: with a screen if it may."""
    stored_as = HEAD_METHODS.get(name, "")
    if screened and not stored_as and ops.pack_screen is not None:
        return _made(SCREENED_HEAD, ops)
    return method(stored_as, ops)


def _made(path: str, ops: Operators) -> QuantMethod:
    module, _, class_name = path.partition(":")
    made: QuantMethod = getattr(import_module(module), class_name)(ops)
    return made
