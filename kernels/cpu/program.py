"""A function of tensors, recorded once as the operators that it called, and run again without Python between them, or beside Python.

Between two calls of a layer, Python costs 15 µs where arithmetic has just emptied the caches, which is every call of a step; checks,
memory for outputs and torch's dispatch cost another 5. A program has these once for most of a layer's calls, in its first run, and
those of attention for all layers together, with what they need in the caches (`python -m tests.bench.step`).

The program is right for inputs of the shapes and strides it was recorded with, save dimensions that only operators look at (a number of
rows that the function never says), and for a function that reads no value of its inputs in Python: a read that torch sees is refused.
Tensors that are neither inputs nor made by the function are kept and used again as they are: weights, caches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Running(Protocol):
    """A run of a program beside the caller. Its inputs live until it is over, which is what the end of a `Running` waits for."""

    def wait(self) -> None:
        """Waits, taking part in its work meanwhile."""
        ...

    def synchronize(self) -> None:
        """Waits; raises what the run raised."""
        ...


@dataclass(frozen=True, slots=True)
class Program:
    """What was recorded; one run of it at a time.

    `run` gives what the function gave. `start` begins a run behind those begun before: what it gives is what it writes into its inputs
    and into what it keeps. Until the caller synchronizes, it has one thread less, which is the caller's. `copy` gives the same calls as a
    program of its own: each stays prepared for the numbers of rows that it ran last, so two that take turns want two.
    """

    run: Callable[[list[Tensor]], Tensor]
    start: Callable[[list[Tensor]], Running]
    copy: Callable[[], "Program"]


class RecordError(Exception):
    """The function looked at a number inside a tensor, so that its calls depend on more than shapes, changes a tensor's shape in place,
    or calls an operator with what a program does not hold: a number in a tensor's place, a list of tensors."""


def record(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, Program]:
    """Calls `function(*inputs)`; gives its result and the same calls as a program. Raises `RecordError`.

    Inputs are told apart by being different tensors. The operators are there once `kernels.cpu.choose` has loaded them. Raises whatever
    the function raises.
    """
    if len({id(one) for one in inputs}) < len(inputs):
        raise RecordError("one tensor stands for two inputs")
    program = torch.classes.sluice_cpu.Program(len(inputs))
    with _Recorder(program, inputs) as recorder:
        result = function(*inputs)
    program.finish(recorder.register(result))
    return result, _of(program)


def _of(program: Any) -> Program:
    return Program(program.run, program.start, lambda: _of(program.copy()))


class _Recorder(TorchDispatchMode):
    """Adds every operator call to the program. Keeps each tensor that it saw alive, so that none is taken for another."""

    def __init__(self, program: Any, inputs: list[Tensor]) -> None:
        super().__init__()
        self._program = program
        self._registers = {id(tensor): i for i, tensor in enumerate(inputs)}
        self._memory = {_address(tensor): i for i, tensor in enumerate(inputs)}
        self._kept: list[Any] = list(inputs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch's compiler, which is not used here, would be imported to be told to look away (1.3 s and 150 MiB in the first step)."""
        return False

    def register(self, tensor: Tensor) -> int:
        """Where the tensor stands; raises `KeyError` when no call made it."""
        return self._registers[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        given = func(*args, **named)
        missing = func._schema.arguments[len(args) :]
        arguments = [*args, *(named.get(argument.name, argument.default_value) for argument in missing)]
        values = given if isinstance(given, tuple | list) else (given,)
        if not all(isinstance(value, Tensor) for value in values):
            raise RecordError(f"the function reads a number of a tensor ({func})")
        if torch.Tag.inplace_view in func.tags:
            raise RecordError(f"the function changes a tensor's shape in place ({func})")
        for argument, one in zip(func._schema.arguments, arguments, strict=True):
            in_list = isinstance(one, list | tuple) and any(isinstance(part, Tensor) for part in one)
            if in_list or (str(argument.type) == "Tensor" and not isinstance(one, Tensor)):
                raise RecordError(f"the function gives {func} a number or a list for the tensor {argument.name}")
        reads = [self._registers.get(id(one), -1) if isinstance(one, Tensor) else -1 for one in arguments]
        # An integer may stand where the schema says float; a constant has to be of the schema's own type.
        typed = [
            float(one) if isinstance(one, int) and str(argument.type) == "float" else one
            for one, argument in zip(arguments, func._schema.arguments, strict=True)
        ]
        shares = [self._memory.get(_address(value), -1) for value in values]
        first = self._program.call(func._schema.name, func._schema.overload_name, tuple(typed), reads, shares)
        self._kept += [*args, *values]
        for i, value in enumerate(values):
            self._registers[id(value)] = first + i
            self._memory.setdefault(_address(value), first + i)
        return given


def _address(tensor: Tensor) -> int:
    """Of the memory that it is a part of."""
    return tensor.untyped_storage().data_ptr()
