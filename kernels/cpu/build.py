"""Builds the C++ operators once with torch's extension loader, and says which instruction set runs, or why none does.

The library lies in `${SLUICE_CACHE:-~/.cache/sluice}/build/` under a name made of its sources, torch and the compiler: a change of any
of them builds anew, nothing else does. In it is the best instruction set that the processor has; another, when it is named, is built beside
it. Two processes never build at once, and a build that was cut short leaves nothing behind.
A machine without a compiler is no error: the caller takes the plain-torch operators.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

NATIVE = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "scalar")
"""Instruction sets that the operators are written for."""

_SOURCES = Path(__file__).resolve().parent
_NEEDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"},
}
_NEEDS["avx512_vnni"] = _NEEDS["avx512"] | {"avx512_vnni"}
_NEEDS["avx512_bf16"] = _NEEDS["avx512_vnni"] | {"avx512_bf16"}
_NEEDS["amx"] = _NEEDS["avx512_vnni"] | {"amx_tile", "amx_bf16", "amx_int8"}
# No contraction: where a product and a sum are one rounding is written in the sources, or inlining and the compiler would decide it,
# place by place, and with it the bits of a row.
_FLAGS = ["-O2", "-std=c++20", "-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi", "-Wno-unknown-pragmas"]

_BASE = (
    "program.cpp",
    "attention_bindings.cpp",
    "bindings.cpp",
    "single_tokens.cpp",
    "memory.cpp",
    "thread_pool.cpp",
    "dispatch.cpp",
)
"""What every instruction set is called through, those that take the compiler longest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What computes on a CPU. `instruction_set`: one of `NATIVE`, "" for plain torch; `reason` says why, in one sentence."""

    instruction_set: str
    reason: str


class BuildError(Exception):
    """The operators cannot be built here; the text says what is missing or where the compiler's words are."""


def choose(wanted: str, tell: Callable[[str], None] = lambda what: None) -> Choice:
    """Builds if need be, loads, selects. wanted: "auto", "torch" or one of `NATIVE`.

    `tell` hears of a build before it starts. Raises `BuildError` when a named instruction set cannot be had; with "auto" that is a
    choice of plain torch.
    """
    if wanted == "torch":
        return Choice(instruction_set="", reason="plain torch, as configured")
    best = runnable()
    if wanted != "auto" and wanted not in best:
        raise BuildError(f"instruction set {wanted!r} is not one that this processor has: {', '.join(best)}")
    try:
        name = next(name for name in (best if wanted == "auto" else (wanted,)) if _offered(name, tell))
    except BuildError as error:
        if wanted != "auto":
            raise
        return Choice(instruction_set="", reason=f"plain torch: {error}")
    except StopIteration:
        raise BuildError(f"the system does not let this process use {wanted}; leave engine.cpu_isa at auto") from None
    torch.ops.sluice_cpu.select.default(name)
    why = "the best that this processor has" if wanted == "auto" else "as configured"
    return Choice(instruction_set=name, reason=f"C++ operators with {name}, {why}")


def runnable() -> tuple[str, ...]:
    """Those of `NATIVE` that this processor has, best first."""
    flags: set[str] = set()
    names = list(NATIVE)
    if platform.machine() in ("x86_64", "AMD64"):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "vendor_id" and value.strip() == "GenuineIntel":
                # Intel's dot product of bf16 takes longer than the two products of floats that it stands for: with fixed point and VNNI a
                # prompt is computed 2.7 times as fast (Emerald Rapids).
                names.remove("avx512_bf16")
                names.insert(names.index("avx512_vnni") + 1, "avx512_bf16")
            elif name.strip() == "flags":
                flags = set(value.split())
                break
    return tuple(name for name in names if name == "scalar" or (flags and _NEEDS[name] <= flags))


def library_path() -> Path:
    """Where the built library lies, built or not. Raises `BuildError` when there is no compiler to build it with, or no place."""
    version = _version(*_compiler())
    told = hashlib.sha256(repr((torch.__version__, sys.version_info[:2], version, runnable()[0], _FLAGS)).encode())
    for source in sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")]):
        told.update(source.name.encode() + source.read_bytes())
    try:
        cache = Path(os.environ.get("SLUICE_CACHE") or Path.home() / ".cache" / "sluice")
    except RuntimeError as error:
        raise BuildError("there is no home directory; set SLUICE_CACHE") from error
    return cache / "build" / f"sluice_cpu-{told.hexdigest()[:16]}" / "sluice_cpu.so"


def _compiler() -> list[str]:
    """As a command, which may have words of its own (CXX="ccache g++")."""
    named = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(named[0]) is None:
        raise BuildError(f"no C++ compiler ({named[0]}); install g++ for operators that are several times faster")
    if any("clang" in line for line in _version(*named)):
        # It does not take `#pragma GCC target`, by which each source says what it is compiled for.
        raise BuildError(f"{shlex.join(named)} is clang, which cannot compile the operators; install g++, or name it in CXX")
    return named


@functools.cache
def _version(*compiler: str) -> list[str]:
    """The first line that it says of itself."""
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[:1]


def _offered(name: str, tell: Callable[[str], None]) -> bool:
    """Whether an instruction set can be selected, once its library is built and loaded: the system may refuse its registers."""
    best = runnable()[0]
    if not hasattr(torch.ops.sluice_cpu, "linear"):
        _load(library_path(), _BASE, best, tell)
    if name != best and name not in torch.ops.sluice_cpu.available.default():
        _load(library_path().with_name(f"sluice_cpu_{name}.so"), (), name, tell)
    return name in torch.ops.sluice_cpu.available.default()


def _load(library: Path, sources: tuple[str, ...], isa: str, tell: Callable[[str], None]) -> None:
    try:
        if not library.exists():
            with _alone(library.parent):
                if not library.exists():
                    tell(f"building the C++ operators for {isa}, once (about a minute)")
                    _build(library, (f"isa_{isa}.cpp", *sources))
        torch.ops.load_library(str(library))
        # A second instruction set's library takes the threads from the first one's.
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        # Of another user, full, read-only, or not to be run from.
        raise BuildError(f"{library.parent} cannot be used ({error}); set SLUICE_CACHE to another folder") from error


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the directory's lock; the kernel frees it when the holder dies."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(library: Path, sources: tuple[str, ...]) -> None:
    from torch.utils import cpp_extension

    # The interpreter's own folder has the ninja that was installed beside it, whether or not the environment is activated.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    os.environ["CXX"] = shlex.join(_compiler())
    if not cpp_extension.is_ninja_available():
        raise BuildError("ninja is missing; pip install ninja")
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        log = library.parent / "build.log"
        try:
            cpp_extension.load(
                library.stem,
                [str(_SOURCES / name) for name in sources],
                extra_cflags=_FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=work,
                is_python_module=False,
                is_standalone=False,
                verbose=False,
            )
        except (RuntimeError, subprocess.CalledProcessError) as error:
            log.write_text(str(error), "utf-8")
            raise BuildError(f"the compiler failed; its words are in {log}") from error
        # Torch numbers the file where an earlier try of this process has failed.
        [made] = Path(work).glob(f"{library.stem}*.so")
        made.rename(library)
