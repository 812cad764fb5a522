"""A Gluon kernel's programs on the CPU: their Python with plain torch in place of Gluon, each warp group in a thread of its own.

Finds wrong indices, masks, phases and deadlocks; says nothing of layouts, fences or what a GPU does with them. Barriers count and
wait by parity as `mbarrier` does, so that one waited for two phases ahead lets through, as it would.
"""

import random
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_here = threading.local()
PATIENCE_SECONDS = 30


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x)


class Pointer:
    """A place, or places, in a tensor's elements; reading or writing outside raises."""

    def __init__(self, elements: Tensor, offset: Any = 0) -> None:
        self.elements, self.offset = elements.view(-1), offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.elements, _tensor(self.offset) + _tensor(offset).long())

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.elements.dtype)


class Shared:
    """Shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i: Any) -> "Shared":
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))

    def store(self, x: Tensor) -> None:
        assert x.shape == self.data.shape
        self.data.copy_(x)

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()


class Barrier:
    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phase, self.changed = 0, threading.Condition()

    def arrive(self, count: int) -> None:
        with self.changed:
            self.pending -= count
            assert self.pending >= 0
            if not self.pending:
                self.pending, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase & 1 != int(parity), PATIENCE_SECONDS), "nobody comes"
        if random.random() < 0.3:
            time.sleep(random.random() * 0.002)


class Barriers:
    def __init__(self, number: int) -> None:
        self.all: list[Barrier | None] = [None] * number

    def index(self, i: Any) -> "Place":
        return Place(self, int(i))


class Place:
    """One of some barriers."""

    def __init__(self, barriers: Barriers, i: int) -> None:
        self.barriers, self.i = barriers, i

    def init(self, count: int) -> None:
        self.barriers.all[self.i] = Barrier(count)

    @property
    def barrier(self) -> Barrier:
        barrier = self.barriers.all[self.i]
        assert barrier is not None, "never initialised"
        return barrier


def _load(pointer: Pointer, mask: Any = None, other: Any = 0.0) -> Tensor:
    places, m = torch.broadcast_tensors(_tensor(pointer.offset).long(), _tensor(True if mask is None else mask))
    inside = (places >= 0) & (places < pointer.elements.numel())
    assert (inside | ~m).all(), "read outside"
    return torch.where(m, pointer.elements[torch.where(m, places, 0)], torch.tensor(other, dtype=pointer.elements.dtype))


def _store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    places, x, m = torch.broadcast_tensors(_tensor(pointer.offset).long(), _tensor(x), _tensor(True if mask is None else mask))
    assert ((places >= 0) & (places < pointer.elements.numel()) | ~m).all(), "written outside"
    pointer.elements[places[m]] = x[m].to(pointer.elements.dtype)


def _copy(target: Shared, pointer: Pointer) -> None:
    target.store(_load(pointer))


def _product(a: Shared, b: Shared, total: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    product = a.data.float() @ b.data.float()
    return total + product if use_acc else product


def _nothing(*_arguments: Any, **_settings: Any) -> None:
    return None


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared | Barriers:
    """Memory that holds NaN, as memory may; of 64 bits, barriers."""
    return Barriers(shape[0]) if dtype == torch.int64 else Shared(torch.full(shape, float("nan"), dtype=dtype))


def _specialize(roles: list[tuple[Callable[..., None], tuple]], warps: list[int], registers: list[int]) -> None:
    """Runs each role in a thread of its own; raises the first error of any."""
    errors: list[BaseException] = []
    program = _here.program

    def one(role: Callable[..., None], arguments: tuple) -> None:
        _here.program = program
        try:
            role(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised by the one who waits
            errors.append(error)

    threads = [threading.Thread(target=one, args=role) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


_gl = types.SimpleNamespace(
    BlockedLayout=_nothing, SliceLayout=_nothing, NVMMADistributedLayout=_nothing, NVMMASharedLayout=_nothing,
    DotOperandLayout=_nothing, int32=torch.int32, int64=torch.int64, uint32=torch.int64, float32=torch.float32,
    arange=lambda a, b, layout=None: torch.arange(a, b, dtype=torch.int32),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, x, dtype, layout: torch.full(shape, x, dtype=dtype),
    minimum=lambda a, b: torch.minimum(_tensor(a), _tensor(b).to(_tensor(a).dtype)),
    maximum=lambda a, b: torch.maximum(_tensor(a), _tensor(b).to(_tensor(a).dtype)),
    where=lambda condition, a, b: torch.where(condition, a, b), static_range=range,
    exp2=torch.exp2, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), convert_layout=lambda x, layout: x,
    load=_load, store=_store, program_id=lambda axis: torch.tensor(_here.program, dtype=torch.int32),
    allocate_shared_memory=_allocate, warp_specialize=_specialize,
)  # fmt: skip
_mbarrier = types.SimpleNamespace(
    MBarrierLayout=_nothing, init=lambda place, count: place.init(count), wait=lambda place, parity: place.barrier.wait(parity),
    arrive=lambda place: place.barrier.arrive(1),
)  # fmt: skip
_async_copy = types.SimpleNamespace(
    mbarrier_arrive=lambda place, increment_count: place.barrier.arrive(128), commit_group=_nothing, wait_group=_nothing
)


def run(module: types.ModuleType, kernel: str, programs: int, arguments: list[Any], constants: dict[str, int]) -> None:
    """Runs a Gluon module's kernel in a grid of one axis, one program after another. Raises what an assertion finds."""
    names: dict[str, Any] = {
        "gl": _gl,
        "mbarrier": _mbarrier,
        "async_copy": _async_copy,
        "_async_load": _copy,
        "_barrier": _nothing,
        "fence_async_shared": _nothing,
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda pending, deps: deps[0],
        "__builtins__": __builtins__,
    }
    for name, function in vars(module).items():
        if hasattr(function, "fn") and name not in names:
            names[name] = types.FunctionType(function.fn.__code__, names, name)
    for _here.program in range(programs):
        names[kernel](*arguments, **constants)
