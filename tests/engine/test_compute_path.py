"""What `sluice doctor` learns of the engine: the operators that it would bind, and what it would refuse, asked in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu.build import runnable
from tests.engine.tiny_model import CONTEXT, write_tiny_model


def ask(model_dir: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    config = json.dumps({"model_dir": str(model_dir), "device": "cpu", "num_threads": 1, **settings})
    command = [sys.executable, "-m", "engine.compute_path", config]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("cpu_isa", "operators", "reason"),
    [
        ("scalar", "cpu_scalar", "C++ operators with scalar, as configured"),
        ("auto", f"cpu_{runnable()[0]}", f"C++ operators with {runnable()[0]}, the best that this processor has"),
        ("torch", "reference", "plain torch, as configured"),
    ],
)
def test_the_operators_and_why(model_dir, cpu_isa, operators, reason):
    done = ask(model_dir, cpu_isa=cpu_isa)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["operators"], found["reason"]) == (operators, reason)
    assert (found["on_cpu"], found["threads"], found["model_fault"]) == (True, 1, "")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda:99"}, "cuda:99"),
        ({"attention_backend": "flash"}, "engine.attention_backend 'flash' is unknown"),
        ({"max_model_len": CONTEXT + 1}, f"engine.max_model_len is {CONTEXT + 1}"),
        ({"quantize": "int8"}, "engine.quantize 'int8' needs the C++ operators of a CPU"),
        ({"kv_cache_dtype": "int8"}, "engine.kv_cache_dtype int8 needs the C++ operators of a CPU"),
    ],
)
def test_what_the_engine_would_refuse_is_an_error_of_the_configuration(model_dir, settings, said):
    done = ask(model_dir, cpu_isa="torch", **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_that_are_cut_are_a_fault_of_the_model(tmp_path):
    weights = write_tiny_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = json.loads(ask(tmp_path, cpu_isa="torch").stdout)
    assert "1 bytes beyond the end of the file" in found["model_fault"]
