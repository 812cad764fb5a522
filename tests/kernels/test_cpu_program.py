"""A recorded function gives what the function gives, for other inputs too, and refuses what it cannot record."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.cpu import choose
from kernels.cpu.program import RecordError, record

SIZE, WIDE = 32, 96


@pytest.fixture(autouse=True)
def _loaded() -> Iterator[None]:
    if not choose("auto").instruction_set:
        pytest.fail("the C++ operators cannot be built here; install g++", pytrace=False)
    with torch.inference_mode():
        yield


def _layer(memory: Tensor) -> object:
    """A function of two inputs with our operators, views, a list of tensors, defaults, an integer for a float, and a write."""
    linear = torch.ops.sluice_cpu.linear.default
    wide = torch.ops.sluice_cpu.pack.default(torch.randn(WIDE, SIZE), "float32", False, 0)
    narrow = torch.ops.sluice_cpu.pack.default(torch.randn(SIZE, SIZE), "float32", False, 0)

    def layer(x: Tensor, where: Tensor) -> Tensor:
        q, _, v = linear(x, wide, None, 0, None, None, None).view(x.shape[0], 3, SIZE).split([1, 1, 1], dim=1)
        memory.index_copy_(0, where, v[:, 0])
        return linear(q[:, 0].contiguous(), narrow, None, 0.0, None, memory.index_select(0, where), None).add(x, alpha=2)

    return layer


def test_a_program_gives_what_the_function_gives_for_inputs_that_come_later() -> None:
    memory = torch.zeros(8, SIZE)
    layer = _layer(memory)
    first, then = ([torch.randn(3, SIZE), torch.tensor(where)] for where in ([1, 5, 7], [0, 2, 3]))
    recorded, program = record(layer, first)
    assert torch.equal(recorded, layer(*first))
    given, written = program.run(then), memory.clone()
    memory.zero_()
    assert torch.equal(given, layer(*then))
    assert torch.equal(written[[0, 2, 3]], memory[[0, 2, 3]])


def test_a_program_gives_fresh_memory_each_time() -> None:
    _, program = record(torch.neg, [torch.zeros(4)])
    one, other = program.run([torch.ones(4)]), program.run([torch.full((4,), 2.0)])
    assert (one.tolist(), other.tolist()) == ([-1.0] * 4, [-2.0] * 4)


def _deep(residual_from_afar: bool) -> Callable[[Tensor], Tensor]:
    """A function whose operators outnumber the places that their outputs need: some are read at once, some layers later, some through a
    view or after a write in place."""
    linear, norm = torch.ops.sluice_cpu.linear.default, torch.ops.sluice_cpu.rms_norm.default
    weights = [torch.ops.sluice_cpu.pack.default(torch.randn(SIZE, SIZE) / 4, "float32", False, 0) for _ in range(24)]
    wide = torch.ops.sluice_cpu.pack.default(torch.randn(WIDE, SIZE) / 4, "float32", False, 0)
    ones = torch.ones(SIZE)

    def deep(x: Tensor) -> Tensor:
        first = kept = norm(x, ones, 1e-5)
        for i, weight in enumerate(weights):
            _, middle, _ = linear(kept, wide, None, 0.0, None, None, None).view(-1, 3, SIZE).unbind(1)
            kept = linear(norm(kept, ones, 1e-5), weight, None, 0.0, None, kept, None)
            if i % 5 == 0:
                kept = linear(middle.clone(), weight, None, 0.0, None, kept, None)
            if i % 7 == 0:
                kept.view(-1).clamp_(min=-1.0)
        return linear(kept, weights[0], None, 0.0, None, first if residual_from_afar else None, None)

    return deep


@pytest.mark.parametrize("residual_from_afar", [False, True])
def test_outputs_share_memory_as_soon_as_nobody_reads_them(residual_from_afar) -> None:
    """Between programs of other sizes too, and on whichever thread."""
    deep = _deep(residual_from_afar)
    programs = {rows: record(deep, [torch.randn(rows, SIZE)])[1] for rows in (1, 3, 40)}
    for _ in range(3):
        for rows, program in programs.items():
            x = torch.randn(rows, SIZE)
            given = [program.run([x]) for _ in range(2)]
            assert all(torch.equal(one, deep(x)) for one in given)
            keeping = torch.full_like(x, torch.nan)
            _, writing = record(lambda x, out: out.copy_(deep(x)), [x, keeping])
            for later in (x, x.neg()):
                writing.start([later, keeping]).synchronize()
                assert torch.equal(keeping, deep(later))
            assert torch.equal(given[0], deep(x))


@pytest.mark.parametrize("residual_from_afar", [False, True])
def test_the_number_of_rows_may_change_from_run_to_run(residual_from_afar) -> None:
    linear, deep = torch.ops.sluice_cpu.linear.default, _deep(residual_from_afar)
    square = torch.ops.sluice_cpu.pack.default(torch.randn(SIZE, SIZE) / 4, "float32", False, 0)

    def of_some(x: Tensor, rows: Tensor) -> Tensor:
        middle = linear(x, square, None, 0.0, None, None, None)
        return deep(linear(middle, square, None, 0.0, None, middle, None).index_select(0, rows)).neg()

    _, program = record(of_some, [torch.randn(5, SIZE), torch.tensor([4])])
    for rows, some in ((3, [1]), (40, [0, 39, 7]), (40, [2, 4]), (40, [5, 6]), (1, []), (1, [0]), (300, [299])):
        inputs = [torch.randn(rows, SIZE), torch.tensor(some, dtype=torch.int64)]
        for _ in range(2):
            assert torch.equal(program.run(inputs), of_some(*inputs))


def test_a_copy_gives_what_the_program_gives_and_each_stays_prepared_for_its_own_rows() -> None:
    deep = _deep(residual_from_afar=True)
    _, program = record(deep, [torch.randn(3, SIZE)])
    copies = {rows: program.copy() for rows in (1, 3, 40)}
    for rounds, (rows, copy) in itertools.product(range(2), copies.items()):
        x, dispatched = torch.randn(rows, SIZE), []
        for one in (program, copy.copy(), copy):
            with torch.autograd.profiler.profile() as seen:
                given = one.run([x])
            assert torch.equal(given, deep(x))
            dispatched.append(sum(event.name == "sluice_cpu::rms_norm" for event in seen.function_events))
        assert (dispatched[0] == dispatched[1] > 0, dispatched[2] < dispatched[1]) == (True, rounds > 0)


BROAD = 208  # some panels of every instruction set, so that rows are read after others' sums are written


def _reads_more_than_each_number(x: Tensor, linear: Callable[..., Tensor], weight: Tensor) -> Tensor:
    return linear(x, weight, None, 0.0, None, x, None)


def _of_another_type(x: Tensor, linear: Callable[..., Tensor], weight: Tensor) -> Tensor:
    return linear(linear(x, weight, None, 0.0, None, None, None), weight, None, 0.0, None, x, torch.bfloat16).float()


def _read_later(x: Tensor, linear: Callable[..., Tensor], weight: Tensor) -> Tensor:
    once = linear(linear(x, weight, None, 0.0, None, None, None), weight, None, 0.0, None, x, None)
    return linear(once, weight, None, 0.0, None, x, None)


def _read_later_through_a_view(x: Tensor, linear: Callable[..., Tensor], weight: Tensor) -> Tensor:
    parts = x.view(-1, 2, BROAD // 2)
    once = linear(linear(x, weight, None, 0.0, None, None, None), weight, None, 0.0, None, x, None)
    return linear(once, weight, None, 0.0, None, parts.flip(1).view(-1, BROAD), None)


def _a_view(x: Tensor, linear: Callable[..., Tensor], weight: Tensor) -> Tensor:
    once = linear(x, weight, None, 0.0, None, None, None)
    return linear(once, weight, None, 0.0, None, x.view(-1, BROAD), None)


@pytest.mark.parametrize(
    "sums", [_reads_more_than_each_number, _of_another_type, _read_later, _read_later_through_a_view, _a_view]
)
def test_a_residual_that_somebody_else_reads_is_not_written_over(sums) -> None:
    linear = torch.ops.sluice_cpu.linear.default
    weight = torch.ops.sluice_cpu.pack.default(torch.randn(BROAD, BROAD) / 8, "float32", False, 0)

    def function(x: Tensor) -> Tensor:
        first = linear(x, weight, None, 0.0, None, None, None)
        return linear(sums(first, linear, weight), weight, None, 0.0, None, None, None).neg()

    _, program = record(function, [x := torch.randn(500, BROAD)])
    assert all(torch.equal(program.run([x]), function(x)) for _ in range(3))


def test_sums_upon_sums_take_the_memory_of_one() -> None:
    """By what torch's profiler sees of the memory that a first run takes, in a thread that has none yet."""
    linear = torch.ops.sluice_cpu.linear.default
    weight = torch.ops.sluice_cpu.pack.default(torch.randn(BROAD, BROAD) / 8, "float32", False, 0)
    wide = torch.ops.sluice_cpu.pack.default(torch.randn(3 * BROAD, BROAD) / 8, "float32", False, 0)

    def sums(x: Tensor, back: Tensor) -> Tensor:
        x = linear(x, weight, None, 0.0, None, None, None)
        for _ in range(4):
            x = linear(linear(x, wide, None, 0.0, None, None, None), back, None, 0.0, None, x, None)
        return x.neg()

    back = torch.ops.sluice_cpu.pack.default(torch.randn(BROAD, 3 * BROAD) / 8, "float32", False, 0)
    x = torch.randn(300, BROAD)
    _, program = record(lambda x: sums(x, back), [x])
    taken: list[int] = []

    def first_run() -> None:
        with torch.inference_mode(), torch.autograd.profiler.profile(profile_memory=True) as seen:
            given = program.run([x])
        assert torch.equal(given, sums(x, back))
        taken.extend(event.cpu_memory_usage for event in seen.function_events if event.name == "aten::empty")

    thread = threading.Thread(target=first_run)
    thread.start()
    thread.join()
    one = x.numel() * x.itemsize
    assert sorted(taken) == [2 ** (one - 1).bit_length(), 2 ** (3 * one - 1).bit_length()]


def test_other_shapes_of_a_row_are_refused_by_operators_that_have_a_place() -> None:
    linear = torch.ops.sluice_cpu.linear.default
    weight = torch.ops.sluice_cpu.pack.default(torch.randn(SIZE, SIZE), "float32", False, 0)
    _, program = record(lambda x: linear(x.t().contiguous(), weight, None, 0.0, None, None, None).neg(), [torch.randn(SIZE, 3)])
    program.run([torch.randn(SIZE, 3)])
    with pytest.raises(RuntimeError, match="recorded for other shapes"):
        program.run([torch.randn(SIZE, 4)])
    x = torch.randn(SIZE, 3)
    assert torch.equal(program.run([x]), linear(x.t().contiguous(), weight, None, 0.0, None, None, None).neg())


def test_a_first_run_that_fails_leaves_nothing_behind() -> None:
    linear = torch.ops.sluice_cpu.linear.default
    weight = torch.ops.sluice_cpu.pack.default(torch.randn(SIZE, SIZE), "float32", False, 0)
    table = torch.randn(4, SIZE)

    def look_up(ids: Tensor) -> Tensor:
        rows = linear(torch.ops.sluice_cpu.embedding.default(table, ids), weight, None, 0.0, None, None, None)
        return rows.add(torch.ops.sluice_cpu.embedding.default(table, ids.remainder(5)))

    _, program = record(look_up, [torch.tensor([0, 1])])
    for ids in ([3, 4], [2, 3], [4, 0], [1, 1]):
        if 4 in ids:
            with pytest.raises(IndexError, match="outside the table of 4 rows"):
                program.run([torch.tensor(ids)])
        else:
            assert torch.equal(program.run([torch.tensor(ids)]), look_up(torch.tensor(ids)))


def test_a_run_that_failed_keeps_nothing_of_its_inputs() -> None:
    """Whoever drops the last of Python's tensors needs Python's lock; a later run would wait for it, and its waiter for the run."""
    script = """
import torch
from kernels.cpu import choose
from kernels.cpu.program import record
assert choose("auto").instruction_set
embedding = torch.ops.sluice_cpu.embedding.default
with torch.inference_mode():
    _, program = record(lambda table, ids: embedding(table, ids), [torch.ones(4, 16), torch.tensor([3])])
    for ids in ([4], [3], [4], [3]):
        begun = program.start([torch.ones(4, 16), torch.tensor(ids)])
        if ids == [4]:
            try:
                begun.synchronize()
            except IndexError:
                print("refused")
        del begun
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.split() == ["refused"] * 2


def test_operators_that_are_selected_later_are_not_given_what_others_packed() -> None:
    linear = torch.ops.sluice_cpu.linear.default
    weight = torch.ops.sluice_cpu.pack.default(torch.randn(SIZE, SIZE), "float32", False, 0)
    x = torch.randn(3, SIZE)
    _, program = record(
        lambda x: linear(linear(x, weight, None, 0.0, None, None, None), weight, None, 0.0, None, None, None), [x]
    )
    before = program.run([x])
    try:
        choose("scalar")
        with pytest.raises(RuntimeError, match="packed was made for another instruction set"):
            program.run([x])
    finally:
        choose("auto")
    assert torch.equal(program.run([x]), before)


def test_ids_that_a_function_keeps_are_checked_in_every_run() -> None:
    table, ids = torch.randn(4, SIZE), torch.tensor([0, 3])
    _, program = record(lambda x: torch.ops.sluice_cpu.embedding.default(table, ids).add(x), [torch.zeros(2, SIZE)])
    program.run([torch.zeros(2, SIZE)])
    ids[1] = 4
    with pytest.raises(IndexError, match="outside the table of 4 rows"):
        program.run([torch.zeros(2, SIZE)])


def test_a_first_run_in_inference_mode_binds_no_later_one() -> None:
    linear = torch.ops.sluice_cpu.linear.default
    weight = torch.ops.sluice_cpu.pack.default(torch.randn(SIZE, SIZE), "float32", False, 0)
    with torch.inference_mode(False):
        x = torch.randn(3, SIZE)
        _, program = record(lambda x: linear(x, weight, None, 0.0, None, None, None).clamp_(min=0.0).neg(), [x])
        with torch.inference_mode():
            first = program.run([x])
        assert torch.equal(program.run([x]), first)


def test_dimensions_that_only_operators_look_at_may_change() -> None:
    assert record(lambda x: x.sum(dim=1), [torch.ones(2, 3)])[1].run([torch.ones(2, 5)]).tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("function", "inputs", "words"),
    [
        (lambda x: x.repeat(x.sum().item()), [torch.ones(3, dtype=torch.int64)], "reads a number of a tensor"),
        (lambda x: x.neg().t_(), [torch.ones(2, 2)], "changes a tensor's shape in place"),
        (torch.add, [torch.ones(2)] * 2, "one tensor stands for two inputs"),
    ],
)
def test_what_cannot_be_recorded_is_refused(function, inputs, words) -> None:
    with pytest.raises(RecordError, match=words):
        record(function, inputs)


@pytest.mark.parametrize(
    ("function", "place"), [(lambda x: x + 1, "other"), (lambda x: torch.cat([x, x]), "tensors"), (lambda x: x[x], "indices")]
)
def test_what_a_program_does_not_hold_is_refused(function, place) -> None:
    with pytest.raises(RecordError, match=f"for the tensor {place}"):
        record(function, [torch.ones(3, dtype=torch.int64)])


def test_what_goes_wrong_inside_is_raised_as_it_is() -> None:
    _, program = record(
        lambda table, ids: torch.ops.sluice_cpu.embedding.default(table, ids), [torch.ones(4, 16), torch.tensor([3])]
    )
    with pytest.raises(IndexError, match="outside the table of 4 rows"):
        program.run([torch.ones(4, 16), torch.tensor([4])])


def _slow(memory: Tensor) -> object:
    """A function that takes a while, since it has matrices to multiply, and adds what it gives to `memory`."""
    linear = torch.ops.sluice_cpu.linear.default
    square = torch.ops.sluice_cpu.pack.default(torch.eye(512), "float32", False, 0)

    def slow(x: Tensor, out: Tensor) -> Tensor:
        for _ in range(20):
            x = linear(x, square, None, 0.0, None, None, None)
        memory.add_(x)
        return out.copy_(memory)

    return slow


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_runs_beside_the_caller_come_one_after_another_in_order(threads) -> None:
    """While the caller multiplies too, and whoever waits helps."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        memory = torch.zeros(16, 512)
        slow = _slow(memory)
        _, program = record(slow, [torch.zeros(16, 512), torch.empty(16, 512)])
        for round in range(20):
            memory.zero_()
            outs = [torch.empty(16, 512) for _ in range(3)]
            begun = [program.start([torch.full((16, 512), float(i + 1)), out]) for i, out in enumerate(outs)]
            if round % 2:
                own = torch.zeros(16, 512)
                own_out = torch.empty(16, 512)
                _slow(own)(torch.ones(16, 512), own_out)
                assert own_out.eq(1.0).all()
            for number in (1, 0, 2) if round % 3 else (0, 1, 2):
                begun[number].synchronize()
            assert [out.unique().tolist() for out in outs] == [[1.0], [3.0], [6.0]]
    finally:
        torch.set_num_threads(before)


def test_a_run_that_nobody_waits_for_ends_before_its_inputs_are_let_go() -> None:
    memory = torch.zeros(16, 512)
    _, program = record(_slow(memory), [torch.zeros(16, 512), torch.empty(16, 512)])
    memory.zero_()
    program.start([torch.ones(16, 512), torch.empty(16, 512)])
    assert memory.eq(1.0).all()


def test_what_goes_wrong_beside_the_caller_is_raised_to_whoever_waits() -> None:
    _, program = record(
        lambda table, ids: torch.ops.sluice_cpu.embedding.default(table, ids), [torch.ones(4, 16), torch.tensor([3])]
    )
    begun = program.start([torch.ones(4, 16), torch.tensor([4])])
    begun.wait()
    for _ in range(2):
        with pytest.raises(IndexError, match="outside the table of 4 rows"):
            begun.synchronize()
    program.start([torch.ones(4, 16), torch.tensor([3])]).synchronize()


def test_another_number_of_inputs_is_refused() -> None:
    _, program = record(torch.neg, [torch.zeros(4)])
    with pytest.raises(RuntimeError, match="run takes 1 inputs"):
        program.run([torch.zeros(4), torch.zeros(4)])


def test_recording_does_not_import_torchs_compiler() -> None:
    recorded = """
import sys, torch
from kernels.cpu import choose
from kernels.cpu.program import record
assert choose("auto").instruction_set
with torch.inference_mode():
    record(torch.neg, [torch.zeros(4)])
print("torch._dynamo" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", recorded], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "False"
