"""A pytest plugin: the C++ operators with AVX-512 emulated by SIMDe, and AMX by amx.h, stand in for those that this machine would build.

`pytest -p tests.kernels.emulation.plugin tests/kernels/test_cpu_linear.py` then runs each test for the sets of `EMULATED`, which
this processor lacks.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

from kernels.cpu import build

EMULATED = tuple(name for name in build.NATIVE if name.startswith(("amx", "avx512")) and name not in build.runnable())
HERE = Path(__file__).resolve().parent


def _order(source: Path) -> tuple[str, bool]:
    # What is emulated comes last and replaces a file of its name.
    return source.name, source.parent == HERE


def library() -> Path:
    """Builds what is emulated, once for these sources."""
    sources = sorted([*build._SOURCES.glob("*.cpp"), *build._SOURCES.glob("*.h"), *HERE.glob("*.h")], key=_order)
    told = hashlib.sha256(repr((torch.__version__, EMULATED)).encode())
    for source in sources:
        told.update(source.name.encode() + source.read_bytes())
    directory = build.library_path().parent.parent / f"emulated-{told.hexdigest()[:16]}"
    built = directory / "sluice_cpu.so"
    with build._alone(directory):
        if not built.exists():
            _build(sources, built)
    return built


def _build(sources: list[Path], built: Path) -> None:
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(dir=built.parent) as work:
        place = Path(work)
        for source in sources:
            lines = source.read_text("utf-8").splitlines(keepends=True)
            # With the target named, the compiler would use the instructions that are to be emulated.
            kept = [
                line
                for line in lines
                if not (source.name.startswith(("isa_avx512", "isa_amx")) and "#pragma GCC target" in line)
            ]
            (place / source.name).write_text("".join(kept), "utf-8")
        names = (*(f"isa_{name}.cpp" for name in EMULATED), *build._BASE)
        (place / "objects").mkdir()
        cpp_extension.load(
            "sluice_cpu",
            [str(place / name) for name in names],
            extra_cflags=[*build._FLAGS, "-O1", "-mavx2", "-mfma", "-mf16c", f"-I{place}"],
            extra_ldflags=["-fopenmp"],
            build_directory=str(place / "objects"),
            is_python_module=False,
        )
        shutil.move(place / "objects" / "sluice_cpu.so", built)


torch.ops.load_library(str(library()))
build.runnable = lambda: EMULATED
