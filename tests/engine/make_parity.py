"""Writes tests/engine/data/parity.json: what transformers' own greedy generate says to 40 varied prompts in float32.

    .venv/bin/python -m tests.engine.make_parity [MODEL_DIR]

Prompts of similar length share a batch, padded on the left. They are made here, so the file can be made anew with another
model. Takes a few minutes on 2 cores.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parent / "data" / "parity.json"
NUM_TOKENS = 64
BATCH = 17

_SHORT = (
    "What is the capital of France?",
    "Explain why the sky is blue in one sentence.",
    "Write a haiku about a log file.",
    "Name three uses of a message queue.",
    "Translate 'good morning' into Spanish, French and German.",
    "How many legs does a spider have?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23? Show your steps.",
    "Who wrote Pride and Prejudice?",
    "List the planets of the solar system.",
)
_UNICODE = (
    "Wie heißt die Hauptstadt von Österreich? Grüße aus Köln!",
    "¿Cuál es la capital de España y qué idioma se habla allí?",
    "日本の首都はどこですか。",
    "Привет! Как дела? Расскажи о Москве.",
    "🙂🚀 What do these emojis mean? 👩‍👩‍👧‍👦",
    "مرحبا، ما هي عاصمة مصر؟",
    "Zażółć gęślą jaźń – co to znaczy?",
    "naïve café résumé coöperate — define each word",
)
_CODE = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Fix this SQL:\nSELEC name FORM users WHER id = 3;",
    '{"name": "sluice", "parts": ["engine", "service"',
    "#include <stdio.h>\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "Write a Python function that reverses a linked list.",
    "git log --oneline | head -5\n",
)
_RAW = ("The quick brown fox", "Once upon a time, in a land far away,", "1, 2, 3, 4, 5, 6,", "a", "In conclusion,")
_TOPICS = ("rivers", "clocks", "bridges", "glaciers", "compilers", "lighthouses")


def _article(topic: str, num_paragraphs: int) -> str:
    """Long, repetitive but not periodic text."""
    return "\n\n".join(
        f"Section {i}. A study of {topic} in the year {1800 + 7 * i} counted {i * i + 3} of them along {2 * i + 1} miles; "
        f"{'most' if i % 3 else 'few'} were older than {40 + 11 * i} years, and item {i * 37 % 101} was measured twice by hand."
        for i in range(1, num_paragraphs + 1)
    )


def prompts() -> list[tuple[str, list[dict[str, str]] | str]]:
    """(kind, messages or raw text), 40 of them."""

    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    found: list[tuple[str, list[dict[str, str]] | str]] = [("chat", ask(text)) for text in _SHORT]
    found += [("unicode", ask(text)) for text in _UNICODE]
    found += [("code", text if i % 2 == 0 else ask(text)) for i, text in enumerate(_CODE)]
    found += [("raw", text) for text in _RAW]
    sizes = (16, 18, 22, 26, 30, 32)
    found += [
        ("long", ask(f"{_article(topic, size)}\n\nSummarise the study of {topic}."))
        for topic, size in zip(_TOPICS, sizes, strict=True)
    ]
    history = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "My name is Ada and I like bridges."},
        {"role": "assistant", "content": "Hello Ada. Bridges are fine structures."},
        {"role": "user", "content": "Which is the longest one?"},
        {"role": "assistant", "content": "The Danyang–Kunshan Grand Bridge."},
    ]
    questions = (
        "What is my name?",
        "How long is it?",
        "And the second longest?",
        "Say goodbye in French.",
        "Why do I like them?",
    )
    found += [("multi-turn", [*history, {"role": "user", "content": question}]) for question in questions]
    return found


def main() -> None:
    """Generates and writes."""
    default = Path.home() / ".cache" / "sluice" / "models" / "SmolLM2-135M-Instruct"
    model_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    eos = model.generation_config.eos_token_id
    cases = []
    for kind, prompt in prompts():
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        cases.append({"kind": kind, "prompt": ids})
    by_length = sorted(cases, key=lambda case: len(case["prompt"]))
    for first in range(0, len(by_length), BATCH):
        batch = by_length[first : first + BATCH]
        width = max(len(case["prompt"]) for case in batch)
        tokens = torch.tensor([[eos] * (width - len(case["prompt"])) + case["prompt"] for case in batch])
        mask = torch.tensor([[0] * (width - len(case["prompt"])) + [1] * len(case["prompt"]) for case in batch])
        out = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=eos)
        for case, said in zip(batch, out[:, width:].tolist(), strict=True):
            case["expected"] = said[: said.index(eos) + 1] if eos in said else said
        print(f"{first + len(batch)} of {len(cases)}: up to {width} prompt tokens", file=sys.stderr)
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    head = json.dumps(
        {
            "model": model_dir.name,
            "dtype": "float32",
            "num_tokens": NUM_TOKENS,
            "eos": eos,
            "transformers": transformers.__version__,
        }
    )
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(f'{head[:-1]},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
