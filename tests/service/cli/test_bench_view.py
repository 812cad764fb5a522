"""What `sluice bench` prints of its runs."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from service.bench.drive import Limits, Sample
from service.bench.lengths import Lengths
from service.bench.run import Plan, Run
from service.bench.summary import Targets, summarize
from service.bench.target import Answer
from service.bench.workload import Workload
from service.cli import output
from service.cli.bench_view import Report

PLAN = Plan(workload=Workload(lengths=Lengths(shape="fixed", prompt_tokens=5, output_tokens=4)), limits=Limits(max_requests=2))


def report(*, as_json: bool, num_failed: int = 0) -> Report:
    """Of a run with one request that ended well."""
    answer = Answer(prompt_tokens=5, completion_tokens=4)
    samples = [Sample(due_s=0, sent_s=0, ended_s=2, arrivals=((1, 1), (2, 3)), answer=answer)]
    samples += num_failed * [Sample(due_s=0, sent_s=0, ended_s=2, arrivals=(), answer=None, code="overloaded")]
    work: Any = SimpleNamespace(runs=[Run(name="16 in flight", summary=summarize(samples, 0.0, Targets()), concurrency=16)])
    asked = {"model": "", "temperature": 0.0, "ignore_eos": True}
    return Report(PLAN, work, seed=7, asked=asked, began="2026-11-28T00:00:00Z", as_json=as_json)


def test_where_requests_failed_the_latencies_say_of_how_many_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    report(as_json=False, num_failed=2).show()
    assert "16 in flight: latencies of 1 finished, 2 failed" in capsys.readouterr().out
    report(as_json=False).show()
    assert "latencies of" not in capsys.readouterr().out


def test_without_a_deadline_e_tps_is_a_dash(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.out, "_width", 200)  # a row a line, however wide the terminal is
    report(as_json=False).show()
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("16 in flight") and "1/1" in line]
    assert row.split()[-3:] == ["-", "5", "0"]


def test_the_document_says_where_when_and_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    report(as_json=True).show()
    said = json.loads(capsys.readouterr().out)
    assert (said["time"], said["runs"][0]["e_tps"]) == ("2026-11-28T00:00:00Z", None)
    assert said["cpu"]
    assert {name: said["parameters"][name] for name in ("model", "temperature", "ignore_eos", "seed")} == {
        "model": "",
        "temperature": 0.0,
        "ignore_eos": True,
        "seed": 7,
    }
