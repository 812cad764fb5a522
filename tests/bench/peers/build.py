"""Builds the peers' environments and model files under the cache directory, once: `python -m tests.bench.peers.build`.

`${SLUICE_CACHE:-~/.cache/sluice}/peers/NAME-VERSION/`: `env/` (a virtual environment), `build.log`, and `built.json`, written
last: without it, or without its Python, the directory is no environment and is built anew. One builder at a time; a second one
waits. A peer that cannot be built is an `Unavailable` with one line that says why: the benchmark names it, and does not leave it out
in silence.
"""

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.config import cache_dir
from service.errors import SetupError
from tests.bench.peers.recipes import RECIPES, Recipe

_REQUIREMENTS = """
import sys
from importlib.metadata import requires
from packaging.requirements import Requirement
name, left_out = sys.argv[1], set(sys.argv[2:])
for text in requires(name) or ():
    one = Requirement(text)
    if one.name not in left_out and (one.marker is None or one.marker.evaluate({"extra": ""})):
        one.marker = None
        print(one)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An environment that runs. `versions`: every package in it."""

    python: Path
    versions: dict[str, str]
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """A peer that cannot run here, and why, in one line."""

    reason: str


def in_one_line(error: Exception) -> str:
    """An error's whole message."""
    return " ".join(str(error).split())


class PeerError(RuntimeError):
    """One line: what failed, and where the log is."""


def ensure(recipe: Recipe) -> Built | Unavailable:
    """The peer's environment, built first where it is missing."""
    home = cache_dir() / "peers" / f"{recipe.name}-{recipe.version}"
    if built := _read(home):
        return built
    try:
        with locked(home):
            return _read(home) or _build(recipe, home)
    except PeerError as error:
        return Unavailable(reason=str(error))


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Holds the lock of a directory in the cache, beside it."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f".{home.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(home: Path) -> Built | None:
    try:
        facts = json.loads((home / "built.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    python = home / "env/bin/python"
    # An environment links to the interpreter that it was made with, which may be gone.
    return Built(python=python, versions=facts["versions"], said=facts["said"]) if python.is_file() else None


def _build(recipe: Recipe, home: Path) -> Built:
    missing = [program for program in recipe.builds_with if shutil.which(program) is None]
    if missing:
        raise PeerError(f"{recipe.name} {recipe.version} cannot be built: no {' and no '.join(missing)} on the path")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    print(f"building {recipe.name} {recipe.version} (log: {home}/build.log) …", file=sys.stderr, flush=True)
    python, start = home / "env/bin/python", time.monotonic()
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
    _logged(home, [sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, str(home / "env")])
    for arguments in recipe.installs:
        _logged(home, [*install, *arguments])
    if recipe.requirements_of:
        asked = _logged(home, [str(python), "-c", _REQUIREMENTS, recipe.requirements_of, *sorted(recipe.left_out)])
        (home / "requirements.txt").write_text("\n".join([asked, *recipe.pinned]), encoding="utf-8")
        _logged(home, [*install, "-r", str(home / "requirements.txt")])
    said = _logged(home, [str(python), "-c", recipe.check]).strip().splitlines()[-1]
    listed = _logged(home, [sys.executable, "-m", "uv", "pip", "list", "--format", "json", "--python", str(python)])
    facts: dict[str, Any] = {
        "versions": {package["name"]: package["version"] for package in json.loads(listed)},
        "said": said,
        "build_s": round(time.monotonic() - start),
    }
    (home / "built.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return Built(python=python, versions=facts["versions"], said=said)


def _logged(home: Path, command: Sequence[str]) -> str:
    """Standard output of a command. Raises `PeerError` with the last line that it said."""
    with (home / "build.log").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
        log.write(done.stdout)
    if done.returncode != 0:
        lines = [line.strip() for line in (home / "build.log").read_text("utf-8", "replace").splitlines() if line.strip()]
        raise PeerError(f"{home.name} cannot be built: {lines[-1][:300]} (exit code {done.returncode}; log: {home}/build.log)")
    return done.stdout


def main() -> int:
    """Builds everything; exit code 3 when something cannot be built, each said in one line."""
    from tests.bench.peers.ggufs import FORMATS, ensure_gguf
    from tests.bench.peers.models import DEMO

    failed = False
    for recipe in RECIPES:
        if isinstance(made := ensure(recipe), Unavailable):
            print(f"error: {made.reason}", file=sys.stderr)
            failed = True
    try:
        for name in FORMATS:
            ensure_gguf(DEMO, name)
    except SetupError as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        failed = True
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
