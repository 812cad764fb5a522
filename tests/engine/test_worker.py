"""The engine's child process, for real: HELLO, streams, refusals, ends and faults."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, FrameError
from engine.frames import MAX_FRAME_BYTES, PROTOCOL_VERSION, Abort, Close, FrameDecoder, encode
from engine.output import EngineFailure, StepOutput
from engine.request import Request, SamplingParams
from engine.stand_in import StandInEngine
from engine.worker import failure_of
from tests.engine.child import PATIENCE_S, Child, Wire, child, command
from tests.engine.driving import Listener, run
from tests.engine.tiny_model import write_tiny_model

CONFIG = EngineConfig(kind="stand-in")
FAULT = "SLUICE_STAND_IN_FAULT"


def _ask(name: str = "a", max_tokens: int = 30, n: int = 1, prompt: tuple[int, ...] = (100, 200)) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens, seed=3, n=n))


def _end_of(engine: Child) -> EngineFailure:
    """Reads to the end of the stream; its last frame."""
    last = None
    while (payload := engine.receive()) is not None:
        last = payload
    assert isinstance(last, EngineFailure)
    return last


def test_it_says_hello_and_what_it_is() -> None:
    """Protocol, facts, its own pid; no torch in a stand-in; nothing on standard output."""
    with child(CONFIG) as engine:
        hello, progress = engine.hello()
        assert hello.protocol_version == PROTOCOL_VERSION
        assert hello.facts.pid == engine.process.pid
        assert replace(hello.facts, pid=0) == replace(StandInEngine(CONFIG).facts, pid=0)
        assert progress[0].phase == "starting"
        assert "libtorch" not in Path(f"/proc/{engine.process.pid}/maps").read_text()
        engine.send(Close())
        assert engine.process.communicate(timeout=PATIENCE_S) == (b"", b"")


def test_requests_stream_to_their_ends() -> None:
    """The tokens of an engine in this process, one OUTPUT frame a step."""
    requests = [_ask("a"), _ask("b", max_tokens=5, n=2), _ask("c", prompt=(7, 8, 9))]
    with child(CONFIG) as engine:
        engine.hello()
        assert engine.run(requests).tokens() == run(StandInEngine(CONFIG), requests).tokens()


def test_a_step_without_tokens_is_heard_too() -> None:
    """The sign of life of a slow step."""
    with child(replace(CONFIG, stand_in_tokens_per_s=5.0)) as engine:
        engine.hello()
        engine.send(_ask(max_tokens=3))
        steps = engine.hear(Listener(), 1)
        assert any(not output.every() for output in steps)
        assert [output.stats.step for output in steps] == list(range(1, len(steps) + 1))


def test_an_abort_ends_a_stream() -> None:
    """`cancelled`, and the child goes on serving."""
    with child(replace(CONFIG, stand_in_tokens_per_s=50.0)) as engine:
        engine.hello()
        engine.send(_ask(max_tokens=5000))
        engine.send(Abort(request_id="a"))
        engine.send(Abort(request_id="nobody"))
        listener = Listener()
        engine.hear(listener, 1)
        assert listener.said["a", 0].reason == "cancelled"
        assert len(engine.run([_ask("b", max_tokens=2)]).said["b", 0].tokens) == 2


def test_a_refused_request_is_answered_and_nothing_else_notices() -> None:
    """One error output for each choice, with the typed error's code; the next request is served."""
    with child(CONFIG) as engine:
        engine.hello()
        listener = engine.run([_ask("bad", n=2, prompt=(10**6,)), _ask("long", max_tokens=9000), _ask("good")])
        said = listener.said
        assert [said["bad", c].error_code for c in (0, 1)] == ["invalid_field", "invalid_field"]
        assert (said["long", 0].reason, said["long", 0].error_code) == ("error", "too_many_tokens")
        assert said["good", 0].reason == "length"


def test_close_and_end_of_file_end_it_with_0() -> None:
    """Also in the middle of work."""
    for way in ("close", "end of file"):
        with child(replace(CONFIG, stand_in_tokens_per_s=20.0)) as engine:
            engine.hello()
            engine.send(_ask(max_tokens=5000))
            engine.receive()
            if way == "close":
                engine.send(Close())
            else:
                engine.connection.close()
            assert engine.wait() == 0


def test_bytes_that_are_no_frame_end_it() -> None:
    """FATAL, exit code 4."""
    with child(CONFIG) as engine:
        engine.hello()
        engine.connection.sendall(b"\xff" * 100)
        assert "frame" in _end_of(engine).message
        assert engine.wait() == 4


def test_a_frame_for_the_parent_is_refused() -> None:
    """HELLO to a child is a broken parent."""
    with child(CONFIG) as engine:
        hello, _ = engine.hello()
        engine.send(hello)
        assert "not for the child" in _end_of(engine).message
        assert engine.wait() == 4


def test_an_interrupt_is_the_parents_business() -> None:
    """SIGINT and SIGHUP change nothing; SIGTERM ends it at once."""
    with child(CONFIG) as engine:
        engine.hello()
        engine.process.send_signal(signal.SIGINT)
        engine.process.send_signal(signal.SIGHUP)
        assert len(engine.run([_ask(max_tokens=3)]).said["a", 0].tokens) == 3
        engine.process.send_signal(signal.SIGTERM)
        assert engine.wait() == -signal.SIGTERM


def test_it_dies_with_its_parent_even_when_it_hangs() -> None:
    """The kernel ends it when its parent is killed, though the socket is still open here."""
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE_S)
    with ours, theirs:
        spawn = (
            "import subprocess\n"
            f"p = subprocess.Popen({command(theirs.fileno(), CONFIG)!r}, pass_fds=({theirs.fileno()},))\n"
            "print(p.pid, flush=True); p.wait()"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", spawn],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, FAULT: "hang@2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        engine = Wire(ours)
        engine.hello()
        engine.send(_ask())
        assert isinstance(engine.receive(), StepOutput)
        parent.kill()
        parent.communicate()
        gone, alive = psutil.wait_procs([worker], timeout=PATIENCE_S)
        assert ([process.pid for process in gone], alive) == ([worker.pid], [])


@pytest.mark.parametrize(("fault", "code"), [("exit@3", 41), ("raise@3", 1)])
def test_a_stand_in_fails_in_the_step_it_is_told_to(fault: str, code: int) -> None:
    """Two steps are heard, then it ends with the fault's exit code."""
    with child(CONFIG, {FAULT: fault}) as engine:
        engine.hello()
        engine.send(_ask())
        heard = []
        while (payload := engine.receive()) is not None:
            heard.append(payload)
        assert [p.stats.step for p in heard if isinstance(p, StepOutput)] == [1, 2]
        assert [p.code for p in heard if isinstance(p, EngineFailure)] == (["engine_failed"] if code == 1 else [])
        assert engine.wait() == code


def test_a_stand_in_speaks_garbage_when_told_to() -> None:
    """The parent's decoder refuses the third step."""
    with child(CONFIG, {FAULT: "garbage@3"}) as engine:
        engine.hello()
        engine.send(_ask())
        with pytest.raises(FrameError):
            engine.hear(Listener(), 1)


def test_a_poison_prompt_ends_a_stand_in() -> None:
    """poison@T: harmless prompts are served, the one that holds T ends the process."""
    with child(CONFIG, {FAULT: "poison@4242"}) as engine:
        engine.hello()
        assert engine.run([_ask(max_tokens=2)]).said["a", 0].reason == "length"
        engine.send(_ask("b", prompt=(1, 4242)))
        assert engine.wait() == 41


@pytest.mark.parametrize(
    ("config", "field", "message"),
    [
        ("not json", "engine", "does not decode"),
        (json.dumps({"kind": "stand-in", "block_size": 0}), "engine.block_size", "at least 1"),
        (json.dumps({"kind": "stand-in", "nice": 20}), "engine.nice", "[0, 19]"),
        (json.dumps({"kind": "stand-in", "num_threads": 1025}), "engine.num_threads", "at most 1024"),
        (json.dumps({"kind": "stand-in", "max_num_seqs": 65_537}), "engine.max_num_seqs", "at most 65536"),
        (json.dumps({"kind": "paged", "model_dir": "/nonexistent"}), "", "/nonexistent"),
    ],
)
def test_what_cannot_be_loaded_is_said_before_the_end(config: str, field: str, message: str) -> None:
    """FATAL names the setting or the file; exit code 2; one JSON line on standard error."""
    with child(config) as engine:
        failure = _end_of(engine)
        assert (failure.field, failure.retriable) == (field, False)
        assert message in failure.message
        assert engine.wait() == 2
        _, stderr = engine.process.communicate()
        assert json.loads(stderr.decode().splitlines()[-1])["event"] == "engine failed"


@pytest.mark.parametrize("name", ["\ud800", "x" * MAX_FRAME_BYTES], ids=["half a surrogate pair", "endless"])
def test_a_name_that_no_frame_can_hold_is_said_all_the_same(name: str) -> None:
    """A checkpoint calls its tensors what it likes."""
    for error in (CheckpointError("a.safetensors", "is spare", tensor=name), ValueError(name)):
        failure, _ = failure_of(error)
        assert list(FrameDecoder().feed(encode(failure))) == [failure]


def test_a_real_engine_says_in_a_child_what_it_says_here(tmp_path: Path) -> None:
    """A tiny model: progress while loading, equal tokens."""
    config = EngineConfig(model_dir=str(write_tiny_model(tmp_path / "tiny")), num_threads=1, num_blocks=128)
    requests = [_ask(f"r{i}", prompt=tuple(range(5, 9 + 11 * i))) for i in range(4)]
    with child(config) as engine:
        hello, progress = engine.hello()
        assert hello.facts.architecture == "LlamaForCausalLM"
        assert progress[-1].fraction == 1.0
        heard = engine.run(requests)
        engine.send(Close())
        assert engine.wait() == 0
    assert heard.tokens() == run(Engine(config), requests).tokens()


def test_a_ready_engine_on_a_cpu_keeps_no_code_that_loading_alone_has_run(tmp_path: Path) -> None:
    """Of torch's libraries some 300 MiB are resident once it is imported."""
    config = EngineConfig(model_dir=str(write_tiny_model(tmp_path / "tiny")), num_threads=1, num_blocks=128)
    with child(config) as engine:
        engine.hello()
        assert psutil.Process(engine.process.pid).memory_info().shared < 100 * 2**20


@pytest.mark.parametrize("nice", [0, 7])
def test_every_thread_of_an_engine_on_a_cpu_stands_back(tmp_path: Path, nice: int) -> None:
    config = EngineConfig(model_dir=str(write_tiny_model(tmp_path / "tiny")), num_threads=2, num_blocks=128, nice=nice)
    with child(config) as engine:
        engine.hello()
        engine.run([_ask("r0", prompt=tuple(range(5, 60)))])
        threads = [int(name) for name in os.listdir(f"/proc/{engine.process.pid}/task")]
        base = os.getpriority(os.PRIO_PROCESS, 0)
        assert len(threads) > 1
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {max(base, nice)}
