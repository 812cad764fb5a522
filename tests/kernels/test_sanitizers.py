"""The C++ operators under the address, undefined-behaviour and thread sanitizers: drawn shapes, memory that ends where the arguments end.

They are built without torch (`tests/kernels/sanitized/`), once for these sources.
"""

import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels.cpu import build

HERE = Path(__file__).resolve().parent / "sanitized"
OPERATORS = Path(build.__file__).resolve().parent
FLAGS = ("-std=c++20", "-Og", "-fopenmp", "-Wno-psabi", "-Wno-unknown-pragmas", "-fno-sanitize-recover=all")
CHECKS = ("--param", "asan-instrumentation-with-call-threshold=0", "-fno-sanitize=null,object-size")
"""An access is checked by a call, and for null and its object's size by the address sanitizer alone: in line, and by both, AVX-512 took the
compiler over seven minutes."""
pytestmark = pytest.mark.timeout(900)  # the first to need a program builds it
SEEDS = 3
CASES = 40
"""Drawn calls of each operator for a seed and an instruction set."""


@pytest.fixture(scope="module")
def fuzz() -> Path:
    """What this processor runs best, AVX2 and plain C++ are in it."""
    runnable = build.runnable()
    return operators("address,undefined", [name for name in runnable if name in (runnable[0], "avx2", "scalar")])


@pytest.fixture(scope="module")
def threaded() -> Path:
    """AVX2 or plain C++: what threads share is written once, for every instruction set, and others take the compiler longer."""
    return operators("thread", [next(name for name in build.runnable() if name in ("avx2", "scalar"))])


@pytest.fixture(scope="module")
def pool() -> Path:
    return program("pool", [HERE / "pool.cpp", OPERATORS / "thread_pool.cpp"], ["-fsanitize=thread"])


def operators(sanitizer: str, sets: list[str]) -> Path:
    sources = [
        *(OPERATORS / f"isa_{name}.cpp" for name in sets),
        HERE / "fuzz.cpp",
        OPERATORS / "dispatch.cpp",
        OPERATORS / "thread_pool.cpp",
    ]
    return program("fuzz", sources, [f"-fsanitize={sanitizer}", *CHECKS])


def program(name: str, sources: list[Path], flags: list[str]) -> Path:
    """The built program."""
    try:
        compiler = build._compiler()
    except build.BuildError as error:
        pytest.skip(f"{error}; it runs wherever there is a compiler, as in continuous integration")
    told = hashlib.sha256(repr((compiler, name, flags, FLAGS)).encode())
    for path in sorted([*OPERATORS.glob("*.h"), *HERE.glob("*.h"), *sources]):
        told.update(path.name.encode() + path.read_bytes())
    directory = build.library_path().parent.parent / f"sanitized-{told.hexdigest()[:16]}"
    built = directory / name
    with build._alone(directory):
        if not built.exists():
            _build(compiler, sources, [*FLAGS, *flags, f"-I{OPERATORS}"], built)
    return built


def _build(compiler: list[str], sources: list[Path], flags: list[str], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as work:

        def compile_one(source: Path) -> str:
            made = f"{work}/{source.stem}.o"
            # A minute for vectors, whose instructions take any address; what they share with narrower ones is checked there.
            wide = ["-fno-sanitize=alignment"] if source.name.startswith(("isa_avx512", "isa_amx")) else []
            subprocess.run([*compiler, *flags, *wide, "-c", str(source), "-o", made], check=True)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        subprocess.run([*compiler, *flags, *objects, "-o", f"{work}/{built.name}"], check=True)
        Path(work, built.name).rename(built)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Leaks are not looked for: that needs rights which a container may lack.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip(
            "this compiler's thread sanitizer does not run where vm.mmap_rnd_bits is above 28; it runs where that is 28"
        )
    return done


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_operator_reads_or_writes_what_it_was_not_given(fuzz, seed):
    done = run(fuzz, str(seed), str(CASES))
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"avx2: {CASES} cases" in done.stdout or "avx2" not in build.runnable()
    assert f"scalar: {CASES} cases of each operator" in done.stdout


def test_the_sanitizers_watch(fuzz):
    done = run(fuzz, "planted")
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
    assert "0 bytes to the right of 255-byte region" in done.stderr


def test_the_threads_of_an_operator_share_nothing_unguarded(threaded):
    done = run(threaded, "0", str(CASES))
    assert done.returncode == 0, done.stderr[-4000:]
    assert f": {CASES} cases of each operator" in done.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("rounds", ["0", "3000"])
def test_what_a_job_wrote_is_seen_after_it(pool, seed, rounds, monkeypatch):
    """With threads that sleep at once, and with threads that look for work before they do."""
    monkeypatch.setenv("GOMP_SPINCOUNT", rounds)
    done = run(pool, str(seed), "2000")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2000 jobs" in done.stdout


def test_the_thread_sanitizer_watches(pool):
    done = run(pool, "planted")
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
