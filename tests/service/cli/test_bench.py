"""`sluice bench`: what it refuses, and what it reports of a replica and of an endpoint that is not there."""

import pytest

from service.cli.bench import _loads
from tests.service.cli.cli_run import Sluice


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://h/v1", "--target", "h:1"], "name different endpoints"),
        (["--target", "localhost"], "--target 'localhost': write it as host:port"),
        (["--target", "h:1,h:2"], "load is put on one replica"),
        (["--url", "h:8000"], "write it as http://host:port/v1"),
        (["--url", "http://h/v1", "--endpoint", "responses"], "choose one of chat/completions, completions"),
        (["--lengths", "normal"], "choose one of fixed, sharegpt, powerlaw"),
        (["--load", "0.1-0.9"], "write it as 0.1..0.9"),
        (["--load", "0.9..0.1"], "write it as 0.1..0.9"),
        (["--load", "0.5,3"], "write it as 0.1..0.9"),
        (["--load", "0.5", "--rate", "2"], "leave --rate away"),
        (["--load", "nan"], "write it as 0.1..0.9"),
        (["--rate", "inf"], "--rate inf: give a number"),
        (["--timeout", "inf"], "--timeout inf: give a number"),
        (["--deadline", "inf"], "--deadline inf: give a number"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(sluice: Sluice, arguments: list[str], said: str) -> None:
    code, out, err = sluice.run("bench", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize("option", ["--rate", "--duration", "--timeout", "--deadline"])
def test_what_is_no_number_is_refused_too(sluice: Sluice, option: str) -> None:
    code, out, err = sluice.run("bench", option, "nan")
    assert (code, out) == (2, "")
    assert option in err


def test_loads_begin_where_they_are_told_to() -> None:
    assert _loads("0.05..0.35", 0.0) == (0.05, 0.15, 0.25, 0.35)
    assert _loads("0.85..0.9", 0.0) == (0.85,)
    assert _loads("0.1..0.9", 0.0) == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert _loads("0.5,0.9", 0.0) == (0.5, 0.9)


@pytest.mark.parametrize(
    "where", [["--target", "127.0.0.1:9"], ["--brokers", "127.0.0.1:9"], ["--url", "http://127.0.0.1:9/v1"]]
)
def test_an_endpoint_that_is_not_there_is_a_dependency_out_of_reach(sluice: Sluice, where: list[str]) -> None:
    code, out, err = sluice.run("bench", *where)
    assert (code, out) == (3, "")
    assert "127.0.0.1:9" in err


def test_help_says_what_the_figures_mean(sluice: Sluice) -> None:
    code, out, _ = sluice.run("bench", "--help")
    assert code == 0
    assert all(
        word in out
        for word in (
            "E-TPS",
            "Goodput",
            "TTFT",
            "TPOT",
            "ITL",
            "Ctrl-C",
            "finished requests",
            "--load",
            "--shared-prefix-tokens",
        )
    )
