"""A tokenizer.json for a model of any vocabulary and no training: the words of a load are one token each, every id has a text.

So a prompt of N words has N tokens, and whatever a model of random weights says can be shown: speed needs no more.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from service.bench.workload import words

SPECIAL = ("<unk>", "<s>", "</s>")
"""Ids 0, 1 and 2."""

_LEARNED = 4096


def write_word_tokenizer(directory: str | Path, vocab_size: int) -> None:
    """Writes tokenizer.json with exactly `vocab_size` ids, of which a few thousand at most are learned, in under a second."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, _LEARNED),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Enough draws that each word is among them many times.
    tokenizer.train_from_iterator([" ".join(words(50_000, random.Random(0).random))], trainer)
    definition = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    # Of no merge, so no text is encoded to them.
    vocabulary |= {f"Ġx{token_id}": token_id for token_id in range(len(vocabulary), vocab_size)}
    (Path(directory) / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
