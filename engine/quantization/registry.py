"""Weight formats by the name that a checkpoint's `quantization_config.quant_method` gives; "" is none."""

from importlib import import_module

from engine.quantization.base import QuantMethod
from kernels.ops import Operators

METHODS = {
    "": "engine.quantization.unquantized:Unquantized",
}


def method(name: str, ops: Operators) -> QuantMethod:
    """The method of that name, bound to `ops`. Raises `KeyError` for a name that is not in `METHODS`."""
    module, _, class_name = METHODS[name].partition(":")
    made: QuantMethod = getattr(import_module(module), class_name)(ops)
    return made
