"""What the benchmark against peers concludes from what it saw, and how it keeps the systems apart."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.peers import build, models, summary, targets
from tests.bench.peers.blocks import Bench, Hold, HoldError
from tests.bench.peers.cases import CASES, Case
from tests.bench.peers.catalogue import CATALOGUE, default_systems
from tests.bench.peers.machine import Clock, foreign_share
from tests.bench.peers.process import SystemFailed, SystemProcess
from tests.bench.peers.recipes import Recipe
from tests.bench.published import page
from tests.bench.report import shown, spread
from tests.bench.services import service_rows
from tests.bench.systems.speaking import Recorder

Json = dict[str, Any]

SYSTEMS = Path(__file__).parent / "bench" / "systems"


def test_the_window_holds_the_steps_in_which_every_sequence_decodes() -> None:
    stamps = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    recorder = Recorder(2, 3, clock=lambda: next(stamps))
    for step in ({0: 1}, {0: 1, 1: 1}, {0: 1, 1: 1}, {1: 1}):
        recorder.step(step)
    assert recorder.result() == {
        "first_s": 2.0,
        "total_s": 4.0,
        "window_s": 1.0,
        "window_tokens": 2,
        "step_s": [1.0],
    }


def test_a_sequence_that_got_too_few_tokens_is_no_result() -> None:
    recorder = Recorder(2, 1)
    recorder.step({0: 1})
    with pytest.raises(ValueError, match=r"\[0, 1\] tokens, not 1"):
        recorder.result()


def test_peers_are_compared_in_what_is_their_fastest_format_on_the_processor() -> None:
    without, with_bf16 = default_systems(["avx2", "avx512_vnni"]), default_systems(["avx2", "avx512_bf16"])
    assert set(without) | set(with_bf16) <= set(CATALOGUE)
    assert {"vllm-fp32-compiled", "transformers-fp32", "llama.cpp-f16"} <= set(without)
    assert {"vllm-bf16-compiled", "transformers-bf16", "llama.cpp-bf16"} <= set(with_bf16)


def test_kept_prompts_stay_and_the_others_change_from_block_to_block() -> None:
    kept, fresh = CASES["decode 8/32"], CASES["prefill 512"]
    assert kept.prompts(0, 1) == kept.prompts(0, 2)
    assert fresh.prompts(0, 1) != fresh.prompts(0, 2)
    assert [len(prompt) for prompt in kept.prompts(0, 1)] == [33] * 8


def turn(rate: float, *, disturbed: bool = False) -> Json:
    return {"first_s": 1.0, "window_s": 1.0, "window_tokens": rate, "step_s": [0.1], "disturbed": disturbed}


def run_of(blocks: list[dict[str, Json]], *, commit: str = "c", case: str = "decode 8/32") -> Json:
    probe = {"read_gb_per_s": 10.0, "fp32_gflop_per_s": 100.0, "bf16_gflop_per_s": 50.0}
    facts = {"weight_bytes": 10**9, "num_parameters": 10**9, "kv_cache_bytes": 3200, "num_blocks": 10, "block_size": 16}
    facts |= {"vocab_size": 200_000, "hidden_size": 1_000}
    systems = {
        "sluice": {"label": "Sluice engine", "kind": "ours", "bits": 16, "facts": facts},
        "llama.cpp-bf16": {"label": "llama.cpp BF16", "kind": "peer", "bits": 16, "facts": {}},
        "vllm-bf16": {"label": "vLLM bf16", "kind": "peer", "bits": 16, "unavailable": "no AVX-512"},
    }
    return {
        "environment": {
            "commit": commit,
            "modified": False,
            "cpu": "x",
            "cores": 2,
            "memory_gib": 1,
            "time": "t",
            "instruction_sets": ["avx2"],
            "versions": {"torch": "2"},
        },
        "parameters": {
            "seed": 0,
            "model": "m",
            "threads": 2,
            "max_foreign_share": 0.05,
            "max_stolen_share": 0.03,
            "favoured": False,
        },
        "systems": systems,
        "blocks": [{"case": case, "block": i, "probe": probe, "turns": turns} for i, turns in enumerate(blocks)],
    }


def test_disturbed_turns_count_in_no_median_and_no_ratio() -> None:
    blocks = [
        {"sluice": turn(30), "llama.cpp-bf16": turn(10)},
        {"sluice": turn(99, disturbed=True), "llama.cpp-bf16": turn(20)},
        {"sluice": turn(50), "llama.cpp-bf16": turn(10)},
    ]
    case = summary.summarise([run_of(blocks)])["cases"]["decode 8/32"]
    assert case["systems"]["sluice"]["tokens_per_s"]["blocks"] == [30, 50]
    assert case["systems"]["sluice"]["disturbed"] == 1
    assert case["ratios"]["sluice"]["llama.cpp-bf16"]["blocks"] == [3, 5]


def test_the_limit_is_the_slower_of_reading_and_multiplying() -> None:
    case = summary.summarise([run_of([{"sluice": turn(30)}])])["cases"]["decode 8/32"]
    # 8 rows x 2 operations x 1e9 parameters at 100 GFLOP/s: 160 ms; 1 GB and 264 tokens of 20 bytes at 10 GB/s: 100 ms.
    assert case["limit"] == {"bandwidth_tokens_per_s": 80.0, "arithmetic_tokens_per_s": 50.0, "tokens_per_s": 50.0}


def test_of_a_prompt_one_row_goes_through_the_head() -> None:
    case = summary.summarise([run_of([{"sluice": turn(30)}], case="prefill 512")])["cases"]["prefill 512"]
    # 2 x (512 rows x 0.8e9 parameters + 0.2e9) at 100 GFLOP/s: 8.196 s.
    assert case["limit"]["arithmetic_tokens_per_s"] == 62.5


def test_runs_of_different_commits_do_not_merge() -> None:
    with pytest.raises(summary.MergeError, match="differ in commit"):
        summary.document([run_of([]), run_of([], commit="d")])


def test_runs_of_different_models_do_not_merge_and_a_run_that_names_none_is_of_the_demos() -> None:
    old, demo, other = run_of([]), run_of([]), run_of([])
    del old["parameters"]["model"]
    demo["parameters"]["model"] = models.DEMO
    other["parameters"] |= {"model": "qwen2.5-0.5b", "weights": "random"}
    assert len(summary.document([old, demo])["runs"]) == 2
    with pytest.raises(summary.MergeError, match=r"differ in model: .*qwen2\.5-0\.5b"):
        summary.document([old, other])


def test_runs_of_one_commit_merge_their_blocks() -> None:
    block = {"sluice": turn(30)}
    assert summary.document([run_of([block]), run_of([block])])["summary"]["cases"]["decode 8/32"]["blocks"] == 2


def outcome(rate: float, peer: float = 10) -> targets.Outcome:
    found = targets.outcomes(summary.summarise([run_of([{"sluice": turn(rate), "llama.cpp-bf16": turn(peer)}])]))
    return next(one for one in found if one.target.what == "batch 8" and one.case == "decode 8/32")


@pytest.mark.parametrize(("rate", "met"), [(25, True), (24.96, False), (24, False)])
def test_a_target_is_met_from_its_ratio_on(rate: float, met: bool) -> None:
    assert outcome(rate).met is met


def test_a_target_that_is_missed_by_a_hair_is_shown_as_missed() -> None:
    text = page(summary.document([run_of([{"sluice": turn(24.98), "llama.cpp-bf16": turn(10)}])]), {}, "bars.png")
    assert "| 2.5× | 2.498× | missed: 99.9% of it |" in text


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [(0.8954, [0.9], "0.895"), (0.9, [0.9], "0.90"), (1.234, [0.9], "1.23"), (2.9999, [2.5, 3], "2.9999")],
)
def test_a_figure_is_shown_on_its_side_of_a_bound(value: float, bounds: list[float], said: str) -> None:
    assert shown(value, bounds) == said


def test_the_services_targets_are_judged_before_rounding() -> None:
    documents = {
        "service": {"results": {"grpc_against_offline": spread([0.8954]), "kafka_against_offline": {"median": 0.9}}},
        "startup": {"results": {"parent_mib": 250.2}},
    }
    rows = {row.split(" | ")[0]: row for row in service_rows(documents).splitlines()}
    assert rows["| gRPC against the engine offline"].endswith("| 0.895× | missed: 99% of it |")
    assert rows["| Kafka to Kafka against the engine offline"].endswith("| 0.90× | met |")
    assert rows["| memory of the service"].endswith("| 250.20 MiB | missed: 100.1% of it |")


def test_a_turn_whose_whole_batch_never_decoded_has_failed() -> None:
    blocks = [{"sluice": turn(30) | {"window_s": 0.0, "window_tokens": 0}, "llama.cpp-bf16": turn(10)}]
    case = summary.summarise([run_of(blocks)])["cases"]["decode 8/32"]
    assert case["ratios"]["sluice"] == {}
    assert "tokens_per_s" not in case["systems"]["sluice"]
    assert "the whole batch never decoded" in case["systems"]["sluice"]["failed"][0]


def test_a_system_that_failed_before_its_first_turn_is_in_the_report() -> None:
    run = run_of([{"sluice": turn(30)}])
    run["systems"]["llama.cpp-bf16"]["failed"] = {"decode 8/32": "out of memory"}
    text = page(summary.document([run]), {}, "bars.png")
    assert "**failed at decode 8/32: out of memory**" in text
    assert "| llama.cpp BF16 | failed |" in text
    [found] = [
        one for one in targets.outcomes(summary.summarise([run])) if one.target.what == "batch 8" and one.case == "decode 8/32"
    ]
    assert found.ratio is None


def test_the_report_says_whose_first_tokens_are_sluices() -> None:
    blocks = [
        {
            "sluice": turn(30) | {"first_tokens_as_sluice": 1.0},
            "llama.cpp-bf16": turn(10) | {"first_tokens_as_sluice": share},
        }
        for share in (1.0, 0.75)
    ]
    assert "| llama.cpp BF16 | 87.5% |" in page(summary.document([run_of(blocks)]), {}, "bars.png")


def test_a_target_that_was_not_measured_says_why() -> None:
    found = targets.outcomes(summary.summarise([run_of([{"sluice": turn(30), "llama.cpp-bf16": turn(10)}])]))
    reasons = {(one.target.what, one.case): one.reason for one in found if one.ratio is None}
    assert reasons["INT8 against our bf16", "decode 8/32"] == "sluice-int8 took no part"
    assert reasons["prefill of 512", "prefill 512"] == "the case was not run"


def test_the_report_names_a_peer_that_cannot_run_and_a_missed_target() -> None:
    text = page(summary.document([run_of([{"sluice": turn(12), "llama.cpp-bf16": turn(10)}])]), {}, "bars.png")
    assert "| vLLM bf16 | unavailable: no AVX-512 |" in text
    assert "missed: 48% of it" in text
    assert "not measured: no `service` in these documents" in text


def test_the_report_names_the_model_and_says_where_its_weights_are_random() -> None:
    run = run_of([{"sluice": turn(12)}])
    assert "\nm, 2 threads" in page(summary.document([run]), {}, "bars.png")
    run["parameters"] |= {"model": "llama-3.2-1b", "weights": "random"}
    assert "\nllama-3.2-1b (random weights of its shape), 2 threads" in page(summary.document([run]), {}, "bars.png")


def test_a_machine_that_is_not_given_is_not_measured() -> None:
    hold = Hold("false")
    with pytest.raises(HoldError, match="false does not give the machine: exit code 1"):
        hold.take()
    hold.give_back()


def test_a_held_machine_stays_held_until_it_is_given_back(tmp_path: Path) -> None:
    hold = Hold(f"flock {tmp_path}/lock")
    hold.take()
    hold.take()
    taken = ["flock", "--nonblock", f"{tmp_path}/lock", "true"]
    assert subprocess.run(taken, check=False).returncode == 1
    hold.give_back()
    assert subprocess.run(taken, check=False).returncode == 0


def test_foreign_time_is_what_neither_the_system_nor_the_driver_used() -> None:
    before = Clock(at=0.0, busy_s=10.0, stolen_s=1.0)
    after = Clock(at=2.0, busy_s=13.0, stolen_s=1.2)
    assert foreign_share(before, after, own_cpu_s=2.0, cores=2) == (0.25, 0.05)


SPEAKER = f"""
import sys
sys.path.insert(0, {str(SYSTEMS)!r})
from speaking import serve

class Echo:
    def __init__(self, options):
        print("a library talks")
        self.options = options
    def facts(self):
        return self.options
    def run(self, case, prompts, new_tokens, keep, recorder):
        if case == "bad":
            raise LookupError("no such case")
        for _ in range(new_tokens):
            recorder.step(dict.fromkeys(range(len(prompts)), 1))
        return prompts

serve(Echo)
"""


@pytest.fixture
def speaker(tmp_path: Path) -> Iterator[SystemProcess]:
    process = SystemProcess([sys.executable, "-c", SPEAKER], os.environ, tmp_path / "log")
    try:
        yield process
    finally:
        process.close()


def state(process: SystemProcess) -> str:
    [member] = process.members()
    return Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_system_answers_and_stands_still_until_it_is_asked_again(speaker: SystemProcess) -> None:
    assert speaker.ask({"op": "load", "threads": 2})["facts"] == {"op": "load", "threads": 2}
    deadline = time.monotonic() + 10
    while state(speaker) != "T" and time.monotonic() < deadline:
        pass
    assert state(speaker) == "T"
    answer = speaker.ask({"op": "run", "case": "any", "prompts": [[1], [2]], "new_tokens": 2, "keep": False})
    assert answer["tokens"] == [[1], [2]]
    assert answer["window_tokens"] == 2


def test_a_systems_error_is_told_and_ends_nothing(speaker: SystemProcess) -> None:
    speaker.ask({"op": "load"})
    with pytest.raises(SystemFailed, match="LookupError: no such case"):
        speaker.ask({"op": "run", "case": "bad", "prompts": [[1]], "new_tokens": 1, "keep": False})
    assert speaker.ask({"op": "run", "case": "good", "prompts": [[1]], "new_tokens": 1, "keep": False})["tokens"] == [[1]]


def test_a_system_that_fails_while_it_is_prepared_leaves_a_trace(speaker: SystemProcess) -> None:
    bench = Bench(["sluice"], model="m", threads=1, seed=0)
    speaker.ask({"op": "load"})
    bench._running["sluice"], bench.systems["sluice"] = speaker, {}
    bench.prepare(Case(name="bad", batch=1, prompt_tokens=1, new_tokens=1, keep=False))
    assert bench.systems["sluice"] == {"failed": {"bad": "LookupError: no such case"}}
    assert bench._running == {}


def test_a_system_that_ends_says_its_last_words(tmp_path: Path) -> None:
    process = SystemProcess([sys.executable, "-c", "import sys; sys.exit('no such library')"], os.environ, tmp_path / "log")
    with pytest.raises(SystemFailed, match="ended with 1: no such library"):
        process.ask({"op": "load"})
    process.close()


def test_a_peer_that_cannot_be_built_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path))
    recipe = Recipe(name="peer", version="1", installs=(), check="", builds_with=("no-such-compiler",))
    assert build.ensure(recipe) == build.Unavailable(reason="peer 1 cannot be built: no no-such-compiler on the path")


def test_a_built_peer_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path))
    home = tmp_path / "peers" / "peer-1"
    (home / "env/bin").mkdir(parents=True)
    (home / "env/bin/python").touch()
    (home / "built.json").write_text(json.dumps({"versions": {"torch": "2"}, "said": "AVX2"}))
    recipe = Recipe(name="peer", version="1", installs=(), check="", builds_with=("no-such-compiler",))
    assert build.ensure(recipe) == build.Built(python=home / "env/bin/python", versions={"torch": "2"}, said="AVX2")
    (home / "env/bin/python").unlink()
    assert build.ensure(recipe) == build.Unavailable(reason="peer 1 cannot be built: no no-such-compiler on the path")
