"""Where the C++ operators cannot be built or loaded, a reason stands in for them, and the engine goes on with plain torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import BuildError, build
from kernels.cpu.build import _compiler, library_path, runnable


def chosen(**environment: str) -> str:
    """What a new process says of its choice."""
    code = "from kernels.cpu import choose; print(choose('auto').reason)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def fake_compiler(path: Path, says: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    reason = chosen(SLUICE_CACHE=str(file))
    assert reason.startswith("plain torch: ")
    assert reason.endswith("; set SLUICE_CACHE to another folder")


def test_a_library_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path))
    library = library_path()
    library.parent.mkdir(parents=True)
    library.write_text("no library")
    reason = chosen(SLUICE_CACHE=str(tmp_path))
    assert reason.startswith("plain torch: ")
    assert "cannot be used" in reason


def test_a_machine_without_a_compiler_is_told() -> None:
    assert chosen(CXX="no-such-compiler").startswith("plain torch: no C++ compiler (no-such-compiler); install g++")


def test_clang_is_refused_before_it_fails(tmp_path: Path) -> None:
    clang = fake_compiler(tmp_path / "c++", "Debian clang version 14.0.6")
    assert "is clang, which cannot compile the operators" in chosen(CXX=str(clang))


def test_a_compiler_may_have_words_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = fake_compiler(tmp_path / "g++", "g++ (of a test) 99")
    plain = library_path()
    monkeypatch.setenv("CXX", f"env {other}")
    assert _compiler() == ["env", str(other)]
    assert library_path() != plain


def test_no_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("SLUICE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(BuildError, match="set SLUICE_CACHE"):
        library_path()


@pytest.mark.skipif(
    len(runnable()) < 2, reason="this processor has plain C++ alone; it runs where there is AVX2, as in continuous integration"
)
def test_what_the_system_refuses_is_passed_over_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux may refuse the registers of AMX."""
    best, second, *_ = runnable()
    offered = build._offered
    monkeypatch.setattr(build, "_offered", lambda name, tell: name != best and offered(name, tell))
    try:
        assert build.choose("auto").instruction_set == second
        with pytest.raises(BuildError, match=f"does not let this process use {best}; leave engine.cpu_isa at auto"):
            build.choose(best)
    finally:
        monkeypatch.undo()
        assert build.choose("auto").instruction_set == best
