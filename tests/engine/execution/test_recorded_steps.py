"""Recorded steps say bit for bit what the model's own Python says, of any number of tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.attention.base import AttentionMetadata
from engine.execution.recorded_steps import FEW, Compute, RecordedSteps, SingleTokens
from kernels.cpu.program import Program
from tests.engine.models.families import save
from tests.engine.tiny_model import VOCAB, write_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def _said(engine: Engine, lengths: list[int]) -> dict[str, list[tuple[int, float]]]:
    """Tokens and their log-probabilities of requests that end one after another: every number of sequences comes by."""
    said: dict[str, list[tuple[int, float]]] = {}
    for i, length in enumerate(lengths):
        prompt = tuple((7 * i + j * j) % VOCAB for j in range(length))
        sampling = SamplingParams(max_tokens=6 + 9 * i, seed=0, temperature=0.0, ignore_eos=True, logprobs=0)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    while engine.has_work:
        for output in engine.step().every():
            found = output.logprobs or ()
            said.setdefault(output.request_id, []).extend((one.token_id, one.logprob) for one in found)
    return said


@pytest.mark.parametrize("num_batched", [512, 16], ids=["whole prompts", "chunks"])
@pytest.mark.parametrize(
    ("dtype", "quantize", "kept"),
    [
        ("float32", "", "auto"),
        ("float32", "", "int8"),
        ("bfloat16", "", "auto"),
        ("bfloat16", "int8", "auto"),
        ("bfloat16", "int8", "int8"),
        ("bfloat16", "int4", "auto"),
    ],
)
def test_recorded_steps_say_what_the_models_own_python_says(model_dir, dtype, quantize, kept, num_batched):
    config = EngineConfig(
        model_dir=str(model_dir),
        dtype=dtype,
        quantize=quantize,
        kv_cache_dtype=kept,
        num_blocks=64,
        enable_prefix_cache=False,
        max_num_batched_tokens=num_batched,
    )
    in_python = Engine(config)
    in_python._loop._executor._recorded_steps = None
    own = _said(in_python, [3, 17, 40])
    recorded = Engine(config)
    # The second round runs what the first has prepared, over other blocks.
    first, again = _said(recorded, [3, 17, 40]), _said(recorded, [3, 17, 40])
    assert (first, again) == (own, own)


WITH_HEADS_OF_16 = {"hidden_size": 64, "head_dim": 16}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"sliding_window": 7}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        ("Qwen3", {}),
    ],
)
def test_any_number_of_tokens_runs_what_was_recorded(tmp_path, family, overrides):
    save(tmp_path, family, WITH_HEADS_OF_16 | overrides)
    config = EngineConfig(model_dir=str(tmp_path), num_blocks=16, block_size=16, overlap="on")
    runner = Engine(config)._loop._executor
    steps = runner._recorded_steps
    if steps is None:
        pytest.fail("the C++ operators cannot be built here; install g++", pytrace=False)
    with torch.inference_mode():
        # Chunks (tokens before, tokens) of one or two sequences, and the rows wanted.
        for chunks, rows in (
            ([(0, 48)], []),
            ([(0, 1)], [0]),
            ([(1, 30), (0, 5)], [29, 34, 3]),
            ([(31, 1), (5, 9)], [0, 9]),
            ([(14, 17)], [16]),
            ([(14, 17)], [2]),
        ):
            given = _chunks(chunks, torch.tensor(rows, dtype=torch.int64))
            assert torch.equal(steps.run_chunks(runner._hidden, *given), runner._hidden(*given))
        # What they have written into the cache is read by single tokens, of one sequence and of two.
        for places in ([31], [30, 20], [9]):
            ids, positions, metadata, _ = _chunks([(place, 1) for place in places], torch.tensor([]))
            batch = SingleTokens(
                input_ids=ids,
                positions=positions,
                query_start_loc=metadata.query_start_loc,
                seq_lens=metadata.seq_lens,
                block_tables=metadata.block_tables,
                slot_mapping=metadata.slot_mapping,
            )
            assert torch.equal(steps.run(runner._logits, batch), runner._logits(ids, positions, metadata))
            slots, tokens = torch.arange(len(places)), torch.empty(len(places), dtype=torch.int64)
            steps.start(runner._draw, batch, slots, tokens).synchronize()
            assert torch.equal(tokens, runner._tokens(ids, positions, metadata))
            assert torch.equal(runner._drawn[slots], tokens)


def _chunks(chunks: list[tuple[int, int]], rows: Tensor) -> tuple[Tensor, Tensor, AttentionMetadata, Tensor]:
    """A step's inputs for `Runner._hidden`; each sequence has three blocks of 16 tokens."""
    tables = torch.tensor([[3, 1, 2], [9, 8, 7]], dtype=torch.int32)[: len(chunks)]
    places = [torch.arange(before, before + count) for before, count in chunks]
    slots = [table[place // 16].long() * 16 + place % 16 for table, place in zip(tables, places, strict=True)]
    starts = torch.tensor([0, *(count for _, count in chunks)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(before + count for before, count in chunks)
    metadata = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=torch.tensor([before + count for before, count in chunks], dtype=torch.int32),
        block_tables=tables[:, : -(-longest // 16)].contiguous(),
        slot_mapping=torch.cat(slots),
        num_single_token_chunks=0,
        max_query_len=longest,
        max_seq_len=longest,
    )
    positions = torch.cat(places)
    return positions * 7 % 61, positions, metadata, rows


class Done:
    """A run that is over."""

    def __init__(self, result: object) -> None:
        self.result = result

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def synchronize(self) -> None:
        """Nothing is left to wait for."""


class FakeRecorder:
    """Notes what is recorded, copied and run again; fails the recordings that are told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None

    def record(self, function, inputs):
        if self.error is not None:
            raise self.error
        self.calls.append(f"recorded {len(inputs[0])}")
        return function(*inputs), self.program(function, "the first")

    def program(self, function, name) -> Program:
        def run(later):
            self.calls.append(f"{name} ran {len(later[0])}")
            return function(*later)

        def start(later):
            self.calls.append(f"{name} began {len(later[0])}")
            return Done(function(*later))

        def copy():
            return self.program(function, "a copy")

        return Program(run, start, copy)


def _batch(num_seqs: int) -> SingleTokens:
    numbers = torch.arange(num_seqs)
    return SingleTokens(
        input_ids=numbers,
        positions=numbers,
        query_start_loc=torch.arange(num_seqs + 1, dtype=torch.int32),
        seq_lens=numbers + 1,
        block_tables=numbers[:, None],
        slot_mapping=numbers,
    )


def _steps(recorder: FakeRecorder) -> RecordedSteps:
    return RecordedSteps(recorder.record, lambda columns: ())


def _step(steps: RecordedSteps, compute: Compute, num_seqs: int) -> list[float]:
    return steps.run(compute, _batch(num_seqs)).tolist()


def _sum(ids: Tensor, places: Tensor, metadata: AttentionMetadata, *_: Tensor) -> Tensor:
    return ids + places + metadata.seq_lens


def _ids(ids: Tensor, *_: object) -> Tensor:
    return ids


def test_each_number_of_sequences_runs_a_copy_of_its_own() -> None:
    recorder = FakeRecorder()
    steps = _steps(recorder)
    steps.record(_sum)
    copies = []
    for num_seqs in (2, 3, 2):
        assert _step(steps, _sum, num_seqs) == [3 * i + 1 for i in range(num_seqs)]
        copies.append(steps._program(_sum, _batch(num_seqs)))
    assert recorder.calls == ["recorded 3", "a copy ran 2", "a copy ran 3", "a copy ran 2"]
    assert copies[0] is copies[2] is not copies[1]


def test_each_thing_wanted_of_a_step_is_recorded_apart() -> None:
    recorder = FakeRecorder()
    steps = _steps(recorder)
    steps.record(_sum)
    steps.record(_ids)
    assert [_step(steps, compute, 2) for compute in (_sum, _ids, _sum, _ids)] == [[1, 4], [0, 1], [1, 4], [0, 1]]
    assert recorder.calls == ["recorded 3"] * 2 + ["a copy ran 2"] * 4


def test_it_is_recorded_with_a_few_tokens_that_write_nothing_and_chunks_run_it_as_it_is() -> None:
    recorder, mappings = FakeRecorder(), []
    steps = _steps(recorder)

    def compute(ids: Tensor, places: Tensor, metadata: AttentionMetadata, rows: Tensor) -> Tensor:
        mappings.append(metadata.slot_mapping.tolist())
        return (ids + places)[rows]

    def chunks(num_tokens: int, rows: list[int]) -> list[int]:
        batch = _batch(num_tokens)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
            seq_lens=batch.seq_lens,
            block_tables=batch.block_tables,
            slot_mapping=batch.slot_mapping,
            num_single_token_chunks=0,
            max_query_len=num_tokens,
            max_seq_len=num_tokens,
        )
        return steps.run_chunks(compute, batch.input_ids, batch.positions, metadata, torch.tensor(rows)).tolist()

    steps.record(compute, torch.tensor([0, 2]))
    assert [chunks(900, [899]), chunks(2, [1, 0])] == [[1798], [2, 0]]
    assert recorder.calls == ["recorded 3", "the first ran 900", "the first ran 2"]
    assert mappings == [[-1] * 3, list(range(900)), [0, 1]]


def test_a_recording_that_failed_may_be_made_anew() -> None:
    recorder = FakeRecorder()
    steps = _steps(recorder)
    recorder.error = MemoryError()
    with pytest.raises(MemoryError):
        steps.record(_ids)
    recorder.error = None
    steps.record(_ids)
    assert (_step(steps, _ids, 1), recorder.calls) == ([0], ["recorded 3", "a copy ran 1"])


def _into(ids: Tensor, places: Tensor, metadata: AttentionMetadata, out: Tensor) -> Tensor:
    return out.copy_(ids + places)


def test_a_step_may_be_begun() -> None:
    recorder = FakeRecorder()
    steps, out = _steps(recorder), torch.zeros(4, dtype=torch.int64)
    steps.record(_into, torch.zeros(FEW, dtype=torch.int64))
    steps.start(_into, _batch(4), out).synchronize()
    assert (out.tolist(), recorder.calls) == ([0, 2, 4, 6], ["recorded 3", "a copy began 4"])


def test_a_model_with_room_for_one_token_and_one_sequence_is_recorded_too(tmp_path) -> None:
    config = EngineConfig(
        model_dir=str(write_tiny_model(tmp_path)), num_blocks=2, block_size=16, max_num_seqs=1, max_model_len=1, overlap="on"
    )
    runner = Engine(config)._loop._executor
    assert set(runner._recorded_steps._programs) == {runner._hidden, runner._logits, runner._draw}
    assert not any(cache.k.any() or cache.v.any() for cache in runner._caches)


@pytest.mark.parametrize("wish", [{}, {"temperature": 0.8}, {"logprobs": 1}], ids=["greedy", "drawn", "with logprobs"])
def test_steps_beside_the_caller_say_what_steps_in_turns_say(model_dir, wish):
    """Sequences end one after another, by length and by a stop token; others come in the midst; one is aborted."""
    heard = {}
    for overlap in ("off", "on"):
        engine = Engine(EngineConfig(model_dir=str(model_dir), num_blocks=64, num_threads=2, overlap=overlap))
        said: dict[str, list[object]] = {}
        for number in range(90):
            if number % 7 == 0 and number < 50:
                add_late(engine, number, wish)
            if number == 30:
                engine.abort("14")
            for output in engine.step().every() if engine.has_work else ():
                said.setdefault(output.request_id, []).extend(
                    [*output.token_ids, *([output.finish_reason] * bool(output.finish_reason))]
                )
        assert not engine.has_work
        said["14"] = said["14"][:3]  # the abort is heard of a step earlier or later
        heard[overlap] = said
    assert heard["on"] == heard["off"]
    assert len(heard["on"]) == 8


def add_late(engine: Engine, number: int, wish: dict[str, float]) -> None:
    prompt = tuple((5 * number + j * j) % VOCAB for j in range(3 + number % 5))
    params = {"max_tokens": 12 + number % 9, "seed": number, "temperature": 0.0, "stop_token_ids": (7, 11)} | wish
    engine.add(Request(request_id=str(number), prompt_token_ids=prompt, sampling=SamplingParams(**params)))  # type: ignore[arg-type]
