"""A GGUF file becomes a directory that our loader reads to the same weights, or is refused by name and leaves nothing behind."""

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import engine
from engine.errors import CheckpointError
from tests.engine.models.paged import Sequences, load

HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS = 16, 24, 2, 1, 2
TOKENS = ["<|end|>", "<|start|>", *"abcdefgh", "Ġ", "ab", "cd"]
TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"


def write_gguf(
    path: Path, *, architecture: str = "llama", extra: str = "", without: str = "", counts: dict[str, int] | None = None
) -> dict[str, np.ndarray]:
    """A tiny model with random float32 weights; returns them under their GGUF names. `counts`: fields beside its own."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    for key, value in (counts or {}).items():
        writer.add_uint32(key, value)
    if without != "tokenizer":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
        writer.add_token_merges(["a b", "c d"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_pad_token_id(0)
        writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(3)
    size = HIDDEN // HEADS
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (KV_HEADS * size, HIDDEN),
            f"blk.{i}.attn_v.weight": (KV_HEADS * size, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_up.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, WIDE),
        }
    if extra:
        shapes[extra] = (size // 2,)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items() if name != without}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    return tmp_path / "tiny.gguf"


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "tiny.gguf")


def test_the_directory_loads_with_the_files_weights_and_tokenizer(gguf_file, tmp_path):
    tensors = write_gguf(gguf_file)
    shares: list[float] = []
    made = engine.import_gguf(gguf_file, tmp_path / "models" / "tiny", lambda share, what: shares.append(share))
    loaded = load(made, cpu_isa="torch")
    targets = loaded.model.targets()
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }.items():
        assert torch.equal(targets[ours], torch.from_numpy(tensors[theirs]).bfloat16())
    assert loaded.plan.eos_token_ids == (0,)
    assert bool(Sequences(loaded, 1, 8).step({0: [1, 2, 3]}).isfinite().all())
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.encode("abcd") == [TOKENS.index("ab"), TOKENS.index("cd")]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|start|>ab<|end|>"
    assert (shares[0], shares[-1], shares) == (0.0, 1.0, sorted(shares))
    assert leftovers(tmp_path / "models") == ["tiny"]


CONTENTS = {
    "other format": (b"PK\x03\x04" + bytes(100), "is no GGUF file"),
    "no header": (b"GGUF\x03\0\0\0", "is truncated: 8 bytes do not hold a GGUF header"),
    "other version": (b"GGUF" + struct.pack("<IQQ", 9, 1, 1), "has GGUF version 9"),
    "absurd counts": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "more than it can hold"),
    "nothing inside": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "is truncated or damaged|has architecture None"),
}


@pytest.mark.parametrize(("content", "reason"), CONTENTS.values(), ids=CONTENTS)
def test_what_is_no_gguf_is_refused(gguf_file, tmp_path, content, reason):
    gguf_file.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        engine.import_gguf(gguf_file, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(gguf_file, tmp_path, share):
    write_gguf(gguf_file)
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        engine.import_gguf(gguf_file, tmp_path / "out")
    assert leftovers(tmp_path) == []


MODELS = {
    "architecture": ({"architecture": "bloom"}, "has architecture 'bloom'; supported are llama, mistral, qwen2, qwen3"),
    "rope factors": ({"extra": "rope_freqs.weight"}, "scales its rotary frequencies"),
    "no embedding": ({"without": "token_embd.weight"}, "holds no language model"),
    "no tokenizer": ({"without": "tokenizer"}, "holds no tokenizer"),
}


@pytest.mark.parametrize(("options", "reason"), MODELS.values(), ids=MODELS)
def test_a_model_that_would_be_read_wrongly_is_refused(gguf_file, tmp_path, options, reason):
    write_gguf(gguf_file, **options)
    with pytest.raises(CheckpointError, match=reason):
        engine.import_gguf(gguf_file, tmp_path / "out")
    assert leftovers(tmp_path) == []


VALUES = {
    "elements beyond all bounds": ("tokenizer.ggml.token_type", "<IQ", (0, 1 << 40), "claims 1099511627776 values"),
    "elements beyond the file": ("tokenizer.ggml.token_type", "<IQ", (0, 1 << 20), "takes 1048576 bytes where"),
    "texts beyond the file": ("tokenizer.ggml.merges", "<IQ", (8, 1 << 20), "claims a text of"),
    "an array of arrays": ("tokenizer.ggml.token_type", "<IQ", (9, 1), "is an array of type 9"),
    "a text beyond all bounds": ("tokenizer.ggml.model", "<Q", (1 << 63,), "claims a text of 9223372036854775808 bytes"),
    "no UTF-8": ("tokenizer.ggml.model", "<QB", (4, 0x90), "is not valid UTF-8"),
    "a layer too few": ("llama.block_count", "<I", (1,), "is 1, but the file holds the tensors of 2 layers"),
    "a layer too many": ("llama.block_count", "<I", (3,), "is 3, but the file holds the tensors of 2 layers"),
    "absurdly many layers": (
        "llama.block_count",
        "<I",
        ((1 << 31) - 1,),
        "must be a whole number from 1 to 1024, not 2147483647",
    ),
    "no heads": ("llama.attention.head_count", "<I", (0,), "must be a whole number from 1 to 4096, not 0"),
}


@pytest.mark.parametrize(("key", "form", "values", "reason"), VALUES.values(), ids=VALUES)
def test_a_value_that_cannot_be_is_refused_by_file_and_key(gguf_file, tmp_path, key, form, values, reason):
    write_gguf(gguf_file)
    content = bytearray(gguf_file.read_bytes())
    # The value stands behind the key and its four bytes of type.
    struct.pack_into(form, content, content.index(key.encode()) + len(key) + 4, *values)
    gguf_file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: .*{re.escape(key)}.* {re.escape(reason)}"):
        engine.import_gguf(gguf_file, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_the_count_of_another_architecture_is_held_to_the_layers_too(gguf_file, tmp_path):
    """transformers would take it, and leave a layer out."""
    write_gguf(gguf_file, counts={"qwen2.block_count": 1})
    with pytest.raises(CheckpointError, match=r"qwen2\.block_count is 1, but the file holds the tensors of 2 layers"):
        engine.import_gguf(gguf_file, tmp_path / "out")


def test_whatever_transformers_raises_names_the_file(gguf_file, tmp_path):
    write_gguf(gguf_file, counts={"mistral.attention.head_count": 3})
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: transformers cannot read it: "):
        engine.import_gguf(gguf_file, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_missing_layer_is_refused_and_leaves_nothing_behind(gguf_file, tmp_path):
    write_gguf(gguf_file, without="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight|up_proj"):
        engine.import_gguf(gguf_file, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_directory_that_holds_something_is_never_overwritten(gguf_file, tmp_path):
    write_gguf(gguf_file)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="out: exists already"):
        engine.import_gguf(gguf_file, tmp_path / "out")
    assert leftovers(tmp_path / "out") == ["mine"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.gguf: cannot be read: No such file"):
        engine.import_gguf(tmp_path / "gone.gguf", tmp_path / "out")
