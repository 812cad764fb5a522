"""The benchmark against peers as a program: what it does when a part of it fails, and what it says of how systems were started."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from service.bench.summary import Targets, summarize
from service.errors import SetupError
from tests.bench import __main__ as suite
from tests.bench import decode, operators, published, report, service_load
from tests.bench.peers import __main__ as peers
from tests.bench.peers import blocks, build, catalogue, models, summary
from tests.bench.peers.machine import ticks_of
from tests.bench.peers.process import SystemFailed
from tests.bench.systems import speaking
from tests.bench.systems.probing import read_bytes
from tests.test_peer_benchmark import run_of, turn

Json = dict[str, Any]
SYSTEMS = Path(__file__).parent / "bench" / "systems"


class OneGoodBlock:
    """A `Bench` whose second block meets `fault`."""

    def __init__(self, fault: BaseException) -> None:
        self._fault = fault
        [run] = [run_of([{"sluice": turn(30)}])]
        self.systems: Json = run["systems"]
        self.probe_facts: Json = {}
        self._blocks = iter(run["blocks"])

    def __call__(self, *_: object, **__: object) -> "OneGoodBlock":
        return self

    def __enter__(self) -> "OneGoodBlock":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare(self, case: object) -> None:
        pass

    def block(self, case: object, index: int) -> Json:
        for block in self._blocks:
            return block
        raise self._fault


Peers = Callable[..., tuple[int, Json, str]]


@pytest.fixture
def run_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Peers:
    """Runs the program on a machine with a model, of a tree that is as committed: exit code, document, standard error."""
    monkeypatch.setattr(peers, "ensure_model", lambda name: tmp_path)
    monkeypatch.setattr(peers.signal, "signal", lambda *_: None)
    began = report.environment() | {"modified": False, "commit": "c"}
    monkeypatch.setattr(report, "environment", lambda: began)

    def run(*arguments: str) -> tuple[int, Json, str]:
        monkeypatch.setattr(sys, "argv", ["peers", "--cases", "decode 8/32", *arguments])
        code = peers.main()
        said = capsys.readouterr()
        return code, json.loads(said.out or "{}"), said.err

    return run


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (SystemFailed("it ended with -9: it said nothing"), 1, "it ended with -9: it said nothing"),
        (blocks.HoldError("false does not give the machine"), 2, "false does not give the machine"),
        (ZeroDivisionError(), 1, "ZeroDivisionError"),
    ],
)
def test_what_was_measured_before_a_fault_is_printed(
    fault: Exception, code: int, said: str, run_peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "Bench", OneGoodBlock(fault))
    ended, document, errors = run_peers("--blocks", "2")
    assert (ended, len(document["runs"][0]["blocks"]), document["runs"][0]["ended_early"]) == (code, 1, said)
    assert document["summary"]["cases"]["decode 8/32"]["systems"]["sluice"]["tokens_per_s"]["median"] == 30
    assert errors.endswith(f"error: {said}; what was whole by then is told\n")


def test_blocks_are_printed_even_where_nothing_can_be_made_of_them(run_peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "Bench", OneGoodBlock(KeyboardInterrupt()))
    monkeypatch.setattr(summary, "summarise", lambda runs: runs[0]["no such part"])
    code, document, _ = run_peers()
    assert (code, len(document["runs"][0]["blocks"])) == (1, 1)


def test_runs_that_will_not_merge_are_refused_before_anything_is_measured(
    run_peers: Peers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "measure", lambda *_: pytest.fail("it measured"))
    file = tmp_path / "old.json"
    file.write_text(json.dumps(summary.document([run_of([], commit="d")])))
    assert run_peers("--merge", str(file)) == (2, {}, "error: the runs differ in commit: c, d\n")


def test_a_run_of_a_modified_tree_stands_alone() -> None:
    modified = run_of([])
    modified["environment"]["modified"] = True
    assert len(summary.document([modified])["runs"]) == 1
    with pytest.raises(summary.MergeError, match="a modified tree merges with no other"):
        summary.document([modified, modified])


def test_the_document_has_its_cases_and_the_time_of_its_beginning(run_peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "Bench", OneGoodBlock(KeyboardInterrupt()))
    _, document, _ = run_peers()
    [run] = document["runs"]
    case = {"name": "decode 8/32", "batch": 8, "prompt_tokens": 33, "new_tokens": 33, "keep": True}
    assert run["parameters"]["cases"] == {"decode 8/32": case}
    assert run["environment"]["time"] == report.environment()["time"]


def without_a_model(*_: object) -> Path:
    raise SetupError("cannot fetch the demo's model:\nno network", exit_code=3)


def test_without_a_model_nothing_is_measured_and_one_line_says_why(run_peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ensure_model", without_a_model)
    assert run_peers() == (3, {}, "error: cannot fetch the demo's model: no network\n")


def test_without_a_model_the_builder_says_why_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "RECIPES", ())
    monkeypatch.setattr(models, "ensure_demo_model", without_a_model)
    assert build.main() == 3
    assert capsys.readouterr().err == "error: cannot fetch the demo's model: no network\n"


def test_a_system_without_its_model_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "ensure_model", without_a_model)
    found = catalogue.start_of("sluice", models.DEMO, 2)
    assert found == build.Unavailable(reason="cannot fetch the demo's model: no network")


@pytest.mark.parametrize("name", ["peers.__main__", "decode", "prefix", "service", "step", "startup", "service_load", "waste"])
@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_benchmark_of_no_rounds_is_refused(
    name: str, count: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = {"startup": "--starts", "service_load": "--alone", "waste": "--requests"}.get(name, "--blocks")
    monkeypatch.setattr(sys, "argv", [name, flag, count])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tests.bench.{name}").parse()
    assert ended.value.code == 2
    assert f"argument {flag}: " in capsys.readouterr().err


def test_a_document_without_blocks_becomes_a_page_without_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "peers.json"
    file.write_text(json.dumps(summary.document([run_of([])])))
    monkeypatch.setattr(sys, "argv", ["published", "--out", str(tmp_path / "page"), str(file)])
    assert published.main() == 0
    assert "No block was measured whole." in (tmp_path / "page.md").read_text()
    assert not (tmp_path / "page.png").exists()


def test_an_operator_that_works_in_the_caches_has_no_share_of_the_memorys_limit() -> None:
    norm = {"us": {"median": 1.5}}
    linear = {"us": {"median": 20.0}, "limit_us": 10.0, "share_of_limit": 0.5, "bound": "bandwidth"}
    suite_of = {"operators": {"results": {"rms_norm x 1": norm, "linear": linear}, "environment": report.environment()}}
    text = published.page(None, suite_of, "")
    assert "| rms_norm x 1 | 1.5 | – | – | caches |" in text
    assert "| linear | 20.0 | 10.0 | 50% | bandwidth |" in text


def test_norms_are_measured_without_a_limit() -> None:
    ops: Any = SimpleNamespace(hidden_dtype=None, rms_norm=lambda x, weight, eps: x)
    assert {num_bytes for _, _, num_bytes, _ in operators._norms(ops, torch.float32)} == {0.0}


def test_generate_begins_every_second_block() -> None:
    assert [decode.in_turn(("ours", "theirs"), block)[0] for block in range(4)] == ["ours", "theirs", "ours", "theirs"]


@pytest.mark.parametrize(("flags", "dtype"), [(["avx2"], "float32"), (["avx512_bf16"], "bfloat16")])
def test_generate_has_the_type_in_which_it_is_faster(flags: list[str], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.machine, "description", lambda: {"instruction_sets": flags})
    assert decode.peer_dtype() == dtype


def test_the_sweep_publishes_what_was_in_time() -> None:
    found = service_load.figures(summarize([], 0.0, Targets(deadline_s=3.0)))
    assert (found["e_tps"], found["goodput_per_s"]) == (0.0, 0.0)


def test_a_stray_line_beside_a_report_loses_nothing() -> None:
    text = json.dumps({"benchmark": "step", "results": {"a": {}}}, indent=1)
    assert suite.report_in(f"a library talks {{\n{text}\nand goes on\n")["results"] == {"a": {}}
    with pytest.raises(ValueError, match="no JSON object"):
        suite.report_in("a library talks\n")


def test_a_benchmark_that_prints_no_report_leaves_the_others_theirs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    package = tmp_path / "tests" / "bench"
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").touch()
    for name, program in {"good": 'print("{\\n\\"benchmark\\": \\"good\\"\\n}")', "bad": 'print("{")'}.items():
        (package / f"{name}.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")  # or the suite would set it, for this process too
    monkeypatch.setattr(sys, "argv", ["bench", "bad", "good"])
    assert suite.main() == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {"good": {"benchmark": "good"}}
    assert "error: bad printed no report" in said.err


def test_only_the_cores_that_may_be_used_count() -> None:
    stat = (
        "cpu 9 9 9 9 9 9 9 9 0 0\ncpu0 1 2 3 100 100 4 5 6 0 0\ncpu1 10 0 0 0 0 0 0 1 0 0\ncpu10 70 0 0 0 0 0 0 7 0 0\nintr 5 5"
    )
    assert ticks_of(stat, {0}) == (15, 6)
    assert ticks_of(stat, {0, 1}) == (25, 7)
    with pytest.raises(RuntimeError, match="does not count cpu2"):
        ticks_of(stat, {1, 2})


@pytest.mark.parametrize(
    ("cache", "memory", "expected"),
    [(2**25, 2**36, 2**28), (2**28, 2**36, 2**30), (2**30, 2**33, 2**30), (2**25, 2**30 + 8, 2**27)],
)
def test_the_probe_reads_more_than_the_cache_holds_and_no_more_than_an_eighth_of_the_memory(
    cache: int, memory: int, expected: int
) -> None:
    assert read_bytes(cache, memory) == expected


def test_a_report_says_how_a_system_was_started_and_where_nothing_lies() -> None:
    start = catalogue.Start(
        command=("python",),
        environment={
            "LD_PRELOAD": "/usr/lib/libtcmalloc_minimal.so.4:/home/x/env/lib/libiomp5.so",
            "GOMP_SPINCOUNT": "3000",
            "VLLM_API_KEY": "nobody's business",
            "HOME": "/home/x",
        },
        options={"gguf": "/home/x/m.Q8_0.gguf", "model_dir": "/home/x/models/m", "threads": 2, "format": "Q8_0"},
        versions={},
    )
    assert start.described() == {
        "options": {"gguf": "m.Q8_0.gguf", "model_dir": "m", "threads": 2, "format": "Q8_0"},
        "environment": {"LD_PRELOAD": "libtcmalloc_minimal.so.4:libiomp5.so", "GOMP_SPINCOUNT": "3000"},
    }


def test_tcmalloc_is_taken_from_where_distributions_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.ctypes.util, "find_library", lambda name: None)
    assert catalogue.find_tcmalloc(tmp_path) == ""
    for name in reversed(catalogue.TCMALLOC):
        file = tmp_path / catalogue.LIBRARIES[0] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        assert catalogue.find_tcmalloc(tmp_path) == str(file)


def llama_cpp_context(options: Json, num_seqs: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the system asks of a llama.cpp that is not there."""
    stand_in: Any = ModuleType("llama_cpp")
    stand_in.llama_context_default_params = SimpleNamespace
    stand_in.llama_init_from_model = lambda model, params: params
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
    monkeypatch.setitem(sys.modules, "speaking", speaking)
    spec = importlib.util.spec_from_file_location("llama_cpp_batch", SYSTEMS / "llama_cpp_batch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    system = module.LlamaCpp.__new__(module.LlamaCpp)
    system._options, system._threads, system._model = options, 2, None
    context: SimpleNamespace = system._context(num_seqs, tokens)
    return context


@pytest.mark.parametrize(
    ("name", "unified"), [("llama.cpp-bf16", True), ("llama.cpp-bf16-split", False), ("llama.cpp-q8-split", False)]
)
def test_split_variants_give_each_of_many_sequences_a_cache_with_room(
    name: str, unified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = llama_cpp_context(dict(catalogue.CATALOGUE[name].options), 32, 513 + 17, monkeypatch)
    assert context.kv_unified is unified
    assert context.n_ctx // context.n_seq_max >= 513 + 17
    assert context.n_ctx // context.n_seq_max % 256 == 0
