"""Turns a Llama-family GGUF file into a Hugging Face directory, once, through transformers' own GGUF support.

The directory appears complete or not at all. Knows the file format only as far as it has to in order to refuse what transformers
would crash on or read wrongly.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.loading.config_file import MAX_SIZES
from engine.loading.gguf_fields import read_fields

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""What the engine can run afterwards: names of `general.architecture`."""

_MAX_SHARD_SIZE = "4GB"
_BLOCK = re.compile(r"blk\.([0-9]{1,6})\.")
# What they are called in config.json.
_COUNTS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}


def import_gguf(gguf_file: str | Path, out_dir: str | Path, progress: Callable[[float, str], None] | None = None) -> Path:
    """Writes bfloat16 safetensors, config, generation config and tokenizer with chat template into `out_dir`; returns it.

    `out_dir` must not exist or be empty. `progress` gets (share done in [0, 1], what is being done). Takes about the memory of the
    model in bfloat16 twice. Raises `CheckpointError` that names the file and the reason, and then leaves nothing behind.
    """
    source, target = Path(gguf_file), Path(out_dir)
    tell = progress or (lambda share, what: None)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(str(target), "exists already; name a directory that does not exist yet")
    tell(0.0, "checking the file")
    _check_contents(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(str(target), f"cannot be written: {error.strerror}") from error
    try:
        _convert(source, partial, tell)
        partial.chmod(0o755)
        os.replace(partial, target)
    except OSError as error:
        raise CheckpointError(str(target), f"cannot be written: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # of whatever type: a library's, met by a file that no release of it was made for
        raise CheckpointError(str(source), f"cannot be converted: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    tell(1.0, "done")
    return target


def _check_contents(source: Path) -> None:
    """Refuses what transformers would not read, or would read wrongly."""
    from gguf import GGUFReader

    fields = read_fields(source)
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(str(source), f"has architecture {architecture!r}; supported are {known}")
    if fields.get(f"{architecture}.expert_count"):
        raise CheckpointError(str(source), "is a mixture of experts, which is not supported")
    try:
        names = {tensor.name for tensor in GGUFReader(source).tensors}
    except Exception as error:  # as above
        raise CheckpointError(str(source), f"is truncated or damaged ({type(error).__name__} while reading it)") from error
    if "rope_freqs.weight" in names or fields.get(f"{architecture}.rope.scaling.type", "none") != "none":
        raise CheckpointError(
            str(source),
            "scales its rotary frequencies, which transformers does not read from GGUF; use the safetensors release",
        )
    if not {"token_embd.weight", "output_norm.weight"} <= names:
        raise CheckpointError(str(source), "holds no language model (token_embd.weight or output_norm.weight is missing)")
    if fields.get("tokenizer.ggml.model") is None:
        raise CheckpointError(str(source), "holds no tokenizer (tokenizer.ggml.model is missing)")
    _check_counts(source, architecture, fields, names)


def _check_counts(source: Path, architecture: str, fields: dict[str, Any], names: set[str]) -> None:
    fields = {f"{architecture}.block_count": None} | fields
    layers = 1 + max((int(found[1]) for name in names if (found := _BLOCK.match(name))), default=0)
    for key, value in fields.items():
        # transformers takes the keys of any architecture it knows, whichever the file has.
        count = key.partition(".")[2]
        if count not in _COUNTS:
            continue
        most = MAX_SIZES[_COUNTS[count]]
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(str(source), f"{key} must be a whole number from 1 to {most}, not {value!r}")
        # Layers beyond the count would be left out in silence.
        if count == "block_count" and value != layers:
            raise CheckpointError(str(source), f"{key} is {value}, but the file holds the tensors of {layers} layers")


def _convert(source: Path, out_dir: Path, tell: Callable[[float, str], None]) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    # Newer releases would keep the blocks packed where they have a kernel for them; older ones always unpack and have no such class.
    packed = getattr(transformers, "GgufConfig", None)
    unpack = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    try:
        tell(0.1, "reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
        tell(0.4, "reading and dequantising the weights")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True, **unpack
        )
        model, report = loaded
    except Exception as error:  # as above
        raise CheckpointError(str(source), f"transformers cannot read it: {error}") from error
    # transformers fills what it did not find with random numbers and goes on.
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(kind):
            tensor = str(sorted(report[kind], key=str)[0])
            raise CheckpointError(str(source), f"does not fit its own architecture ({kind.replace('_', ' ')})", tensor=tensor)
    tell(0.8, "writing the directory")
    config = model.config
    # The object that came from a quantised file refuses to be saved: its weights go into a plain one of the same shape.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    plain.save_pretrained(out_dir, max_shard_size=_MAX_SHARD_SIZE)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out_dir, save_jinja_files=False)
