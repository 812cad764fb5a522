"""What the stand-in engine says and claims: tokens as a pure function, one choice's progress, facts without a model."""

import json
import os
from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.output import EngineFacts, SequenceFacts
from engine.request import Request

_MASK = 2**64 - 1
_DEFAULT_VOCAB = 49_152
_DEFAULT_EOS = (2,)
_NUM_CONTROL = 64


def stand_in_token(state: int, position: int, vocab_size: int) -> int:
    """The token at an output position: SplitMix64 (Steele, Lea and Flood 2014) over the state of (prompt, seed, choice).

    Ids below 64 are left out where the vocabulary has more than twice as many: control tokens live there.
    """
    z = (state + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    first = _NUM_CONTROL if vocab_size > 2 * _NUM_CONTROL else 0
    return first + (z ^ (z >> 31)) % (vocab_size - first)


def stand_in_state(request: Request, choice: int) -> int:
    """64 bits of (prompt, seed, choice)."""
    digest = blake2b(array("q", (request.sampling.seed, choice)).tobytes(), digest_size=8)
    digest.update(array("i", request.prompt_token_ids).tobytes())
    return int.from_bytes(digest.digest(), "little")


@dataclass(slots=True, kw_only=True, eq=False)
class Choice:
    """One choice under way; `said` counts the tokens before a restart too."""

    request: Request
    choice: int
    state: int
    stops: frozenset[int]
    said: int
    added_ns: int
    num_prompt: int = field(init=False)
    due_ns: int = 0
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    num_steps: int = 0
    num_blocks: int = 0

    def __post_init__(self) -> None:
        self.num_prompt = len(self.request.prompt_token_ids)

    def facts(self) -> SequenceFacts:
        """What happened to it so far."""
        return SequenceFacts(
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=0,
            num_output_tokens=self.said,
            num_prefill_chunks=1 if self.first_scheduled_ns else 0,
            num_steps=self.num_steps,
            num_preemptions=0,
            num_blocks=self.num_blocks,
            added_ns=self.added_ns,
            first_scheduled_ns=self.first_scheduled_ns,
            first_token_ns=self.first_token_ns,
            last_token_ns=self.last_token_ns,
        )


def _vocabulary(model_dir: str) -> tuple[int, tuple[int, ...]]:
    """(size, end-of-sequence ids) of the model directory, so that its tokenizer can read what the stand-in says."""
    file = Path(model_dir) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        size, eos = content["vocab_size"], content.get("eos_token_id")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(file), "holds no readable vocab_size") from error
    if not isinstance(size, int) or size < 2:
        raise CheckpointError(str(file), "vocab_size must be a whole number above 1")
    ids = eos if isinstance(eos, list) else [eos]
    return size, tuple(i for i in ids if isinstance(i, int))


def stand_in_facts(config: EngineConfig) -> EngineFacts:
    """What the stand-in claims to be: its pool holds every slot's whole context. Raises `CheckpointError`."""
    vocab_size, eos = _vocabulary(config.model_dir) if config.model_dir else (_DEFAULT_VOCAB, _DEFAULT_EOS)
    context = config.max_model_len or config.stand_in_max_model_len
    return EngineFacts(
        model=Path(config.model_dir).name if config.model_dir else "stand-in",
        architecture="StandIn",
        dtype="none",
        kv_cache_dtype="none",
        device="none",
        operators="none",
        operators_reason="a stand-in computes nothing",
        quantize="",
        attention_backend="none",
        max_model_len=context,
        vocab_size=vocab_size,
        hidden_size=0,
        num_blocks=-(-context // config.block_size) * config.max_num_seqs,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=eos,
        num_parameters=0,
        weight_bytes=0,
        kv_cache_bytes=0,
        load_s=0.0,
        num_threads=1,
        pid=os.getpid(),
    )
