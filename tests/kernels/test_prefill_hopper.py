"""The logic of Hopper's prefill kernel, which no machine without a GPU can run, by threads and plain torch."""

import math

import pytest
import torch

from kernels import reference
from kernels.triton import paged_prefill_hopper, tuning
from kernels.triton.paged_plan import PagedPlan
from tests.kernels import gluon_on_cpu as cpu
from tests.kernels.paged_case import paged_case


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [((4, 1), 64, 16), ((8, 8), 64, 64), ((6, 2), 128, 16), ((16, 1), 128, 256)]
)
def test_chunks_after_any_context_are_those_of_plain_torch(heads: tuple[int, int], head_dim: int, block_size: int) -> None:
    """Two decodes in front, which it leaves alone; tiles and runs that end anywhere; surplus programs; K and V that are there once."""
    chunks = [(9, 1), (300, 1), (1, 1), (37, 37), (128, 128), (300, 5), (257, 129), (640, 2), (700, 64)]
    decodes = 2
    case = paged_case(chunks, heads=heads, head_dim=head_dim, block_size=block_size)
    group, num_tokens = heads[0] // heads[1], sum(n for _, n in chunks)
    plan = PagedPlan(
        seq_lens=case.seq_lens,
        query_start_loc=case.query_start_loc,
        block_tables=case.block_tables,
        num_decodes=decodes,
        num_tokens=num_tokens,
        max_seq_len=700,
    )
    work = plan.prefill_list(paged_prefill_hopper.BLOCK_M // group)
    out = torch.full(case.q.shape, float("nan"))
    memory = torch.empty(0).set_(case.k_cache.untyped_storage())
    caches = [cpu.Pointer(memory, cache.storage_offset()) for cache in (case.k_cache, case.v_cache)]
    lists = (case.block_tables, case.seq_lens, case.query_start_loc, work.starts, work.owners)
    cpu.run(
        paged_prefill_hopper,
        "prefill_hopper_kernel",
        (work.capacity + 1) * heads[1],
        [
            cpu.Pointer(out), cpu.Pointer(case.q), *caches, *(cpu.Pointer(x) for x in lists), plan.num_prefills, decodes,
            case.scale * math.log2(math.e), *case.q.stride()[:2], *case.k_cache.stride()[:3], case.block_tables.stride(0),
        ],
        {
            "NUM_KV_HEADS": heads[1], "GROUP": group, "D": head_dim, "BLOCK_SIZE": block_size,
            "TILE": tuning.HOPPER_PREFILL_TILE, "STAGES": tuning.HOPPER_PREFILL_STAGES,
        },
    )  # fmt: skip
    exact = reference.paged_attention(**case.arguments())
    assert out[:decodes].isnan().all()
    torch.testing.assert_close(out[decodes:], exact[decodes:], rtol=1e-5, atol=1e-5)
