"""Steps of single tokens say bit for bit what the model's own Python says, recorded or run again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.attention.base import AttentionMetadata
from engine.execution.single_steps import Compute, SingleSteps
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_say_what_the_models_own_python_says(model_dir, dtype, monkeypatch):
    config = EngineConfig(model_dir=str(model_dir), dtype=dtype, num_blocks=64, enable_prefix_cache=False)
    monkeypatch.setattr(SingleSteps, "run", lambda self, compute, *inputs: compute(*inputs))
    own = _said(Engine(config), [3, 17, 40])
    monkeypatch.undo()
    recorded = Engine(config)
    # The second round runs what the first has recorded, over other blocks.
    first, again = _said(recorded, [3, 17, 40]), _said(recorded, [3, 17, 40])
    assert (first, again) == (own, own)


class FakeRecorder:
    """Notes what is recorded and what is run again; fails the recordings that are told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None

    def record(self, function, inputs):
        if self.error is not None:
            raise self.error
        self.calls.append(f"recorded {len(inputs[0])}")

        def program(later):
            self.calls.append(f"ran {len(later[0])}")
            return function(*later)

        return function(*inputs), program


def _step(steps: SingleSteps, compute: Compute, num_seqs: int) -> list[float]:
    numbers = torch.arange(num_seqs)
    metadata = AttentionMetadata(
        query_start_loc=torch.arange(num_seqs + 1, dtype=torch.int32),
        seq_lens=numbers + 1,
        block_tables=numbers[:, None],
        slot_mapping=numbers,
        num_single_token_chunks=num_seqs,
        max_query_len=1,
        max_seq_len=num_seqs,
    )
    return steps.run(compute, numbers, numbers, metadata, numbers).tolist()


def _sum(ids: Tensor, places: Tensor, metadata: AttentionMetadata, rows: Tensor) -> Tensor:
    return ids + places + metadata.seq_lens


def _ids(ids: Tensor, *_: object) -> Tensor:
    return ids


def test_each_number_of_sequences_is_recorded_once() -> None:
    recorder = FakeRecorder()
    steps = SingleSteps(recorder.record)
    assert [_step(steps, _sum, num_seqs) for num_seqs in (2, 3, 2)] == [[1, 4], [1, 4, 7], [1, 4]]
    assert recorder.calls == ["recorded 2", "recorded 3", "ran 2"]


def test_each_thing_wanted_of_a_step_is_recorded_apart() -> None:
    recorder = FakeRecorder()
    steps = SingleSteps(recorder.record)
    assert [_step(steps, compute, 2) for compute in (_sum, _ids, _sum, _ids)] == [[1, 4], [0, 1], [1, 4], [0, 1]]
    assert recorder.calls == ["recorded 2", "recorded 2", "ran 2", "ran 2"]


def test_a_recording_that_failed_is_made_anew() -> None:
    recorder = FakeRecorder()
    steps = SingleSteps(recorder.record)
    recorder.error = MemoryError()
    with pytest.raises(MemoryError):
        _step(steps, _ids, 1)
    recorder.error = None
    assert (_step(steps, _ids, 1), recorder.calls) == ([0], ["recorded 1"])
