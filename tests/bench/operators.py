"""Each operator of the CPU at SmolLM2-135M's shapes, beside what bandwidth and arithmetic allow.

    python -m tests.bench.operators [--rows 1,8,32,512] [--dtype bfloat16]

Operators come from `kernels.ops.for_device("cpu")`; a linear or attention is theirs where they have one, else torch's. Weights
and KV are taken in turn from as many copies as together exceed the last-level cache four times: in a step nothing is left in it
from the step before. Norms have their input from the caches, as in a step, where the operator before has just written it: memory bounds
them not, and they have no limit here. limit = the longer of bytes / measured bandwidth and operations / measured matmul rate; where the
processor has no bfloat16 products, theirs are of whole numbers, which that rate does not bound.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention.cpu_paged import CpuPagedAttention
from engine.attention.torch_paged import TorchPagedAttention
from engine.openmp import prefer_short_spin
from kernels.ops import Operators, for_device
from tests.bench import report
from tests.bench.cpu_attention import DIM, KV_HEADS, Q_HEADS, Case
from tests.bench.peers import machine
from tests.bench.systems.probing import Probe

LINEARS = {
    "qkv": (576, 960, False),
    "attention output": (576, 576, False),
    "gate/up": (576, 3072, True),
    "down": (1536, 576, False),
    "head": (576, 49152, False),
}
"""Inputs, outputs, and whether SiLU·mul follows."""

ATTENTIONS = {
    "decode 1/512": (1, 512, 1),
    "decode 8/512": (8, 512, 1),
    "decode 32/512": (32, 512, 1),
    "prefill 512": (1, 512, 512),
}
"""Sequences, context, chunk."""

HIDDEN = 576
CACHES = 4

Call = Callable[[], object]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32,512")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seconds", type=float, default=0.4, help="for each operator")
    return parser.parse_args()


def main() -> None:
    prefer_short_spin()
    arguments, began = parse(), report.environment()
    dtype = getattr(torch, arguments.dtype)
    where = machine.description()
    torch.set_num_threads(where["cores"])
    ops, probe = (
        for_device("cpu"),
        Probe({"threads": where["cores"], "last_level_cache_bytes": where["last_level_cache_bytes"]}),
    )
    before = probe.probe()
    bytes_per_s = before["read_gb_per_s"] * 1e9
    flop_per_s = max(before["fp32_gflop_per_s"], before["bf16_gflop_per_s"]) * 1e9
    results: dict[str, Any] = {}
    cases = itertools.chain(
        _linears(ops, [int(rows) for rows in arguments.rows.split(",")], dtype, where["last_level_cache_bytes"]),
        _attentions(ops, dtype, where["last_level_cache_bytes"]),
        _norms(ops, dtype),
    )
    for name, calls, num_bytes, flop in cases:
        took = _times_us(calls, arguments.seconds)
        results[name] = {"us": report.spread(took, 1) | {"blocks": len(took)}}
        if not num_bytes:
            continue
        read_us, compute_us = num_bytes / bytes_per_s * 1e6, flop / flop_per_s * 1e6
        limit = max(read_us, compute_us)
        results[name] |= {
            "limit_us": round(limit, 1),
            "share_of_limit": round(limit / statistics.median(took), 3),
            "bound": "bandwidth" if read_us > compute_us else "arithmetic",
        }
    results["probe"] = {"before": before, "after": probe.probe()}
    document = report.emit("operators", vars(arguments) | {"operators": ops.name}, results, began)
    document["environment"] |= where
    report.print_report(document)


Measured = tuple[str, list[Call], float, float]
"""Name, calls to be made in turn, bytes of memory moved (0: from the caches, no limit) and operations of one call."""


def _linears(ops: Operators, row_counts: list[int], dtype: torch.dtype, cache_bytes: int) -> "itertools.chain[Measured]":
    def of_shape(name: str, inputs: int, outputs: int, gated: bool) -> list[Measured]:
        num_bytes = inputs * outputs * dtype.itemsize
        one = torch.randn(outputs, inputs, dtype=dtype)
        weights = [one.clone() for _ in range(_copies(num_bytes, cache_bytes))]
        apply = _linear(ops, weights, gated, str(dtype).removeprefix("torch."))
        found = []
        for rows in row_counts:
            if name == "head" and rows > 64:
                continue
            x = torch.randn(rows, inputs, dtype=ops.hidden_dtype or dtype)
            calls = [lambda one=one, x=x: one(x) for one in apply]
            found.append((f"linear {name} x {rows}", calls, float(num_bytes), 2.0 * rows * inputs * outputs))
        return found

    return itertools.chain.from_iterable(of_shape(name, *shape) for name, shape in LINEARS.items())


def _linear(ops: Operators, weights: list[Tensor], gated: bool, form: str) -> list[Callable[[Tensor], Tensor]]:
    linear, pack = getattr(ops, "linear", None), getattr(ops, "pack_weight", None)
    if linear is not None and pack is not None:
        packed = [pack(weight, form, gated, 0) for weight in weights]
        return [lambda x, one=one: linear(x, one, None, 0.0, None, None, None) for one in packed]
    if gated:
        return [lambda x, one=one: ops.silu_mul(functional.linear(x, one)) for one in weights]
    return [lambda x, one=one: functional.linear(x, one) for one in weights]


def _attentions(ops: Operators, dtype: torch.dtype, cache_bytes: int) -> list[Measured]:
    """As the engine has it: over a layer's paged cache, rotary positions and the writing of keys and values included."""
    backend = CpuPagedAttention() if ops.attends else TorchPagedAttention()
    found = []
    for name, (sequences, context, chunk) in ATTENTIONS.items():
        num_bytes = 2 * sequences * context * KV_HEADS * DIM * dtype.itemsize
        pairs = sequences * (context * chunk - chunk * (chunk - 1) // 2)
        case = Case(backend, sequences, context, chunk, _copies(num_bytes, cache_bytes), dtype)
        found.append((f"attention {name}", [*case.layers()], float(num_bytes), 4.0 * pairs * Q_HEADS * DIM))
    return found


def _norms(ops: Operators, dtype: torch.dtype) -> list[Measured]:
    dtype = ops.hidden_dtype or dtype
    weight = torch.ones(HIDDEN, dtype=dtype)
    found = []
    for rows in (1, 32, 512):
        x = torch.randn(rows, HIDDEN, dtype=dtype)
        calls: list[Call] = [lambda x=x: ops.rms_norm(x, weight, 1e-5)]
        found.append((f"rms_norm x {rows}", calls, 0.0, 4.0 * x.numel()))
    return found


def _copies(num_bytes: int, cache_bytes: int) -> int:
    return max(2, min(256, -(-CACHES * cache_bytes // num_bytes)))


def _times_us(calls: list[Call], seconds: float) -> list[float]:
    """One time a call, after a tenth of a second of calls that do not count, at least one of them. At least three."""
    took: list[float] = []
    turn = itertools.cycle(calls)
    began = time.perf_counter()
    while time.perf_counter() - began < 0.1:
        next(turn)()
    while (start := time.perf_counter()) - began < 0.1 + seconds or len(took) < 3:
        next(turn)()
        took.append((time.perf_counter() - start) * 1e6)
    return took


if __name__ == "__main__":
    main()
