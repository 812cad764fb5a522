"""What an engine in one's own process does behind the back of the operating system: in a child of fork(), and where memory ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.tiny_model import write_tiny_model

FORKED = """
import os, sys
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams
from tests.engine.driving import run

def said(engine, name):
    sampling = SamplingParams(max_tokens=30, seed=1, temperature=0.0, ignore_eos=True)
    heard = run(engine, [Request(request_id=name, prompt_token_ids=(5, 6, 7), sampling=sampling)])
    return heard.said[name, 0].tokens

engine = Engine(EngineConfig(model_dir=sys.argv[1], device="cpu", num_threads=2, overlap=sys.argv[2], num_blocks=64))
before = said(engine, "a")
child = os.fork()
if child == 0:
    os._exit(said(engine, "b") != before)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

WITHOUT_MEMORY = """
import resource, torch
from engine.execution.memory import lacks_memory
from kernels.cpu.build import choose

torch.set_num_threads(1)
choose("auto")
ops = torch.ops.sluice_cpu
packed = ops.pack.default(torch.randn(64, 4096), "float32", False, 32)
rows = torch.randn(20_000, 4096).bfloat16()  # wide, they take 328 MB
call = lambda x: ops.linear.default(x, packed, None, 0.0, None, None, torch.float32)
call(rows[:4].contiguous())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
most = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), most))
try:
    call(rows)
    raise SystemExit("it was computed")
except (MemoryError, RuntimeError) as error:
    assert lacks_memory(error), error
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert call(rows).isfinite().all()
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120, cwd=Path.cwd()
    )


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_an_engine_goes_on_in_a_child_of_fork(tmp_path: Path, overlap: str) -> None:
    """Its threads are not there any more."""
    done = run_python(FORKED, str(write_tiny_model(tmp_path / "tiny")), overlap)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_operator_without_memory_is_an_error_that_can_be_survived() -> None:
    done = run_python(WITHOUT_MEMORY)
    assert (done.returncode, done.stderr) == (0, "")
