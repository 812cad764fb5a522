"""The sampler against a naive one, and its guarantees: batch mates, slots and order of equal values cannot matter."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.execution.sampler import Sampler
from engine.request import SamplingParams
from engine.scheduling.step import ChunkResult, SequenceStart
from kernels import ops
from kernels.draws import uniforms
from tests.engine.execution import naive_sampling as naive

CPU = torch.device("cpu")
BASE = SamplingParams(max_tokens=64, seed=7)


class Rows:
    """A sampler of some rows; keeps what each has said, as the runner does."""

    def __init__(
        self, params: list[SamplingParams], vocab: int, prompt: tuple[int, ...] = (1, 2, 3), stops: tuple[int, ...] = ()
    ) -> None:
        self.sampler = Sampler(num_slots=len(params), vocab_size=vocab, device=CPU, operators=ops.for_device("cpu"))
        self.said: list[list[int]] = [[] for _ in params]
        for slot, row in enumerate(params):
            self.sampler.start(
                SequenceStart(
                    slot=slot, token_ids=prompt, num_prompt_tokens=len(prompt), choice=0, sampling=row, stop_token_ids=stops
                )
            )

    def step(self, logits: torch.Tensor, slots: list[int]) -> list[ChunkResult]:
        positions = np.array([len(self.said[slot]) for slot in slots])
        results = self.sampler.collect(self.sampler.launch(logits, np.array(slots), positions))
        for slot, result in zip(slots, results, strict=True):
            self.said[slot] += result.token_ids
        return results


def _random_params(rng: random.Random, vocab: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=64,
        seed=rng.getrandbits(63),
        min_tokens=rng.choice([0, 0, 2]),
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5, 0.05]),
        top_k=rng.choice([0, 0, 1, 5, 40, vocab + 5]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.3]),
        presence_penalty=rng.choice([0.0, 1.5, -0.5]),
        frequency_penalty=rng.choice([0.0, 0.7]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
        logit_bias=rng.choice([{}, {5: 4.0, 6: -100.0}]),
    )


@pytest.mark.parametrize("vocab", [97, 1000, 8192])
def test_tokens_equal_a_naive_sampler(vocab: int) -> None:
    """48 rows of random parameters over 6 steps say what one-row-at-a-time float64 sampling says."""
    rng = random.Random(vocab)
    generator = torch.Generator().manual_seed(vocab)
    params = [_random_params(rng, vocab) for _ in range(48)]
    prompt, stops = [1, 2, 3], [4, 9]
    rows = Rows(params, vocab, tuple(prompt), tuple(stops))
    for position in range(6):
        logits = torch.randn(len(params), vocab, generator=generator) * 3
        expected = []
        for slot, row in enumerate(params):
            values = naive.adjusted(logits[slot].double().numpy(), row, prompt, rows.said[slot], stops)
            if row.temperature == 0.0:
                expected.append(int(values.argmax()))
            else:
                uniform = float(uniforms(torch.tensor([row.seed]), torch.tensor([0]), torch.tensor([position]))[0])
                expected.append(naive.draw(naive.filtered(values, row), uniform))
        assert [result.token_ids[0] for result in rows.step(logits, list(range(len(params))))] == expected


def test_batch_mates_and_slots_do_not_matter() -> None:
    """A row says the same alone, among others, and in another slot."""
    rng = random.Random(3)
    params = [_random_params(rng, 640) for _ in range(16)]
    logits = torch.randn(16, 640, generator=torch.Generator().manual_seed(3)) * 2
    together = Rows(params, 640).step(logits, list(range(16)))
    backwards = Rows(params[::-1], 640).step(logits.flip(0), list(range(16)))
    alone = [Rows([params[i]], 640).step(logits[i : i + 1], [0])[0] for i in range(16)]
    assert together == backwards[::-1] == alone


def test_launch_leaves_the_logits_alone() -> None:
    """Penalties, bias and filters work on copies."""
    params = replace(BASE, top_p=0.5, repetition_penalty=1.5, logit_bias={1: 3.0}, min_tokens=4)
    logits = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    Rows([params, replace(BASE, temperature=0.0)], 128, stops=(7,)).step(logits, [0, 1])
    assert torch.equal(logits, before)


def test_equal_values_all_stay_whatever_their_order() -> None:
    """Four equal best tokens: top-k 2 keeps all four, wherever they stand."""
    generator = random.Random(1)
    for _ in range(5):
        places = generator.sample(range(200), 4)
        logits = torch.zeros(1, 200)
        logits[0, places] = 9.0
        seen = set()
        for seed in range(64):
            seen.update(Rows([replace(BASE, seed=seed, top_k=2)], 200).step(logits, [0])[0].token_ids)
        assert seen == set(places)


def test_draws_follow_the_distribution() -> None:
    """40,000 draws of a 12-token distribution stay within chi-square's 1e-6 limit for 11 degrees."""
    probabilities = np.array([0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.04, 0.03, 0.02, 0.01, 0.007, 0.003])
    logits = torch.from_numpy(np.log(probabilities)).float().expand(400, -1).contiguous()
    rows = Rows([replace(BASE, seed=seed, max_tokens=200) for seed in range(400)], 12)
    for _ in range(100):
        rows.step(logits, list(range(400)))
    counts = np.bincount([token for said in rows.said for token in said], minlength=12)
    wanted = probabilities * counts.sum()
    assert counts.sum() == 40_000
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 49.0


def test_a_token_filtered_out_is_never_drawn() -> None:
    """2,000 draws under top-p 0.6 stay inside the smallest set of that mass."""
    logits = torch.log(torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]])).expand(200, -1).contiguous()
    rows = Rows([replace(BASE, seed=seed, top_p=0.6) for seed in range(200)], 5)
    for _ in range(10):
        rows.step(logits, list(range(200)))
    assert {token for said in rows.said for token in said} == {1, 3}


def test_a_flat_row_with_top_p_takes_the_exact_path() -> None:
    """A flat distribution, where no short prefix reaches the mass, draws over all that top-p keeps."""
    vocab = 20_000
    logits = torch.linspace(0, 1e-3, vocab).expand(64, -1).contiguous()
    rows = Rows([replace(BASE, seed=seed, top_p=0.5) for seed in range(64)], vocab)
    for _ in range(8):
        rows.step(logits, list(range(64)))
    drawn = [token for said in rows.said for token in said]
    # The best half by value is the upper half by id.
    assert min(drawn) >= vocab // 2 - 10
    assert len(set(drawn)) > 450


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_ends_alone(bad: float) -> None:
    """NaN or +inf in one row: that row is reported, the others say what they say without it."""
    params = [replace(BASE, seed=1), replace(BASE, seed=2, top_k=5), replace(BASE, temperature=0.0), BASE]
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(5))
    clean = Rows(params, 300).step(logits, [0, 1, 2, 3])
    spoiled = logits.clone()
    spoiled[1, 17] = bad
    results = Rows(params, 300).step(spoiled, [0, 1, 2, 3])
    assert results[1] == ChunkResult(finite=False)
    assert [results[i] for i in (0, 2, 3)] == [clean[i] for i in (0, 2, 3)]


def test_a_row_of_minus_infinity_is_not_finite() -> None:
    """No finite value at all is an error, some -inf are not."""
    logits = torch.zeros(2, 64)
    logits[0] = -torch.inf
    logits[1, :60] = -torch.inf
    results = Rows([BASE, BASE], 64).step(logits, [0, 1])
    assert [result.finite for result in results] == [False, True]
    assert results[1].token_ids[0] >= 60


def test_a_mask_does_not_hide_a_nan() -> None:
    """NaN at a stop id that the minimum length masks still ends the row."""
    logits = torch.zeros(1, 64)
    logits[0, 9] = torch.nan
    assert Rows([replace(BASE, min_tokens=2)], 64, stops=(9,)).step(logits, [0]) == [ChunkResult(finite=False)]


def test_logprobs_are_of_the_models_own_logits() -> None:
    """Chosen and best log-probabilities ignore temperature, bias and penalties; the best stand first, ties by id."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, -1.0, 2.0]])
    params = replace(BASE, temperature=0.0, logprobs=3, logit_bias={4: 50.0}, repetition_penalty=1.7)
    result = Rows([params], 6).step(logits, [0])[0]
    raw = torch.log_softmax(logits.double()[0], dim=-1).tolist()
    assert result.logprobs is not None
    assert result.token_ids == (4,)
    assert result.logprobs[0].logprob == pytest.approx(raw[4], abs=1e-6)
    assert [token for token, _ in result.logprobs[0].top] == [1, 2, 5]
    assert [value for _, value in result.logprobs[0].top] == pytest.approx([raw[1], raw[2], raw[5]], abs=1e-6)


def test_logprobs_zero_gives_the_chosen_token_alone() -> None:
    """logprobs 0: one entry without alternatives; None: nothing, in the same batch."""
    results = Rows([replace(BASE, logprobs=0), BASE], 64).step(torch.zeros(2, 64), [0, 1])
    assert results[0].logprobs is not None
    assert results[0].logprobs[0].top == ()
    assert results[0].logprobs[0].logprob == pytest.approx(-np.log(64), abs=1e-6)
    assert results[1].logprobs is None


def test_a_resumed_slot_penalises_what_was_said_before() -> None:
    """Starting with said tokens gives the penalties of having said them."""
    params = replace(BASE, temperature=0.0, frequency_penalty=1.0, presence_penalty=0.5)
    logits = torch.zeros(1, 8)
    logits[0, 3], logits[0, 5] = 4.0, 1.2
    sampler = Sampler(num_slots=1, vocab_size=8, device=CPU, operators=ops.for_device("cpu"))
    sampler.start(
        SequenceStart(slot=0, token_ids=(3, 3, 3, 3), num_prompt_tokens=1, choice=0, sampling=params, stop_token_ids=())
    )
    # 4.0 - 3 x 1.0 - 0.5 = 0.5 < 1.2; the prompt's own 3 does not count.
    assert sampler.collect(sampler.launch(logits, np.array([0]), np.array([3])))[0].token_ids == (5,)


def test_a_new_sequence_forgets_what_its_slot_held() -> None:
    """A slot's penalties, bias and minimum do not outlive its sequence."""
    params = replace(BASE, temperature=0.0, presence_penalty=2.0, logit_bias={1: 9.0}, min_tokens=5)
    rows = Rows([params], 8, stops=(2,))
    logits = torch.zeros(1, 8)
    logits[0, 2] = 1.0
    assert rows.step(logits, [0])[0].token_ids == (1,)
    plain = SequenceStart(
        slot=0, token_ids=(1,), num_prompt_tokens=1, choice=0, sampling=replace(BASE, temperature=0.0), stop_token_ids=(2,)
    )
    rows.sampler.start(plain)
    assert rows.step(logits, [0])[0].token_ids == (2,)
