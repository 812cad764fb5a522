"""llama.cpp through llama-cpp-python's C interface: a batch a step, the best token of each row, no text.

A context a case, so that its KV cache is as large as the case needs and no other case's cells lie in it. One KV cache for all
sequences (`kv_unified`) above 8 of them, its better mode there, unless the option says how it is to be. Prompts go in as one logical
batch, which llama.cpp computes in parts of `n_ubatch`.
"""

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from speaking import Recorder, serve

UNIFIED_ABOVE = 8


class LlamaCpp:
    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._threads = options["threads"]
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(options["gguf"].encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {options['gguf']}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[str, tuple[Any, list[list[int]]]] = {}

    def facts(self) -> dict[str, Any]:
        text = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, text, len(text))
        return {
            "llama-cpp-python": llama_cpp.__version__,
            "model": text.value.decode(),
            "instruction_set": llama_cpp.llama_print_system_info().decode().strip(),
            "threads": self._threads,
            "flash_attention": self._options.get("flash_attention", "auto"),
            "kv_unified": self._options.get("kv_unified", f"above {UNIFIED_ABOVE} sequences"),
        }

    def run(self, case: str, prompts: list[list[int]], new_tokens: int, keep: bool, recorder: Recorder) -> list[list[int]]:
        context, held = self._contexts.pop(case, (None, []))
        if context is None:
            context = self._context(len(prompts), len(prompts[0]) + new_tokens)
        memory = llama_cpp.llama_get_memory(context)
        if held == prompts:
            # The last token of a prompt is computed again: its logits are what the run begins with.
            for i, prompt in enumerate(prompts):
                llama_cpp.llama_memory_seq_rm(memory, i, len(prompt) - 1, -1)
            rows = [(prompt[-1], len(prompt) - 1, i, True) for i, prompt in enumerate(prompts)]
        else:
            llama_cpp.llama_memory_clear(memory, False)
            rows = [(t, at, i, at == len(p) - 1) for i, p in enumerate(prompts) for at, t in enumerate(p)]
        said: list[list[int]] = [[] for _ in prompts]
        for _ in range(new_tokens):
            best = self._decode(context, rows)
            recorder.step(dict.fromkeys(range(len(prompts)), 1))
            for i, token in enumerate(best):
                said[i].append(token)
            rows = [(tokens[-1], len(prompts[i]) + len(tokens) - 1, i, True) for i, tokens in enumerate(said)]
        if keep:
            self._contexts[case] = (context, prompts)
        else:
            self._contexts[case] = (context, [])
        return said

    def _context(self, num_seqs: int, tokens: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = num_seqs
        # Shared out evenly where each sequence has a cache of its own, each part a multiple of 256.
        params.n_ctx = num_seqs * (-(-tokens // 256) * 256)
        params.n_batch = num_seqs * tokens
        params.n_ubatch = min(512, num_seqs * tokens)
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = self._options.get("kv_unified", num_seqs > UNIFIED_ABOVE)
        if "flash_attention" in self._options:
            params.flash_attn_type = int(self._options["flash_attention"])
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        return context

    def _decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """One batch of (token, position, sequence, wanted); the best next token of each wanted row, in order."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for at, (token, position, sequence, wanted) in enumerate(rows):
                batch.token[at] = token
                batch.pos[at] = position
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                batch.logits[at] = wanted
            if code := llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode gave {code}")
        finally:
            llama_cpp.llama_batch_free(batch)
        best = []
        for at, row in enumerate(rows):
            if row[3]:
                pointer = llama_cpp.llama_get_logits_ith(context, at)
                best.append(int(np.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).argmax()))
        return best


if __name__ == "__main__":
    serve(LlamaCpp)
