"""What a run's samples come down to: rates, latencies and errors. Pure.

Words as in the house: TTFT and E2E from the instant at which a request was due; TPOT = (last - first) / (n - 1) of a request; ITL = the
gap between messages that bring tokens, as a reader sees them; goodput = requests that meet their targets, a second; E-TPS = output
tokens of requests that met their deadline, a second. Quantiles are by nearest rank.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from service.bench.drive import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a request is asked to keep, in seconds; 0: not asked. `deadline_s` is for the whole request."""

    deadline_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Milliseconds of one latency; `count` values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run. `elapsed_s`: from its start to the last end. `errors`: how many requests ended with which code.

    `steady_requests_per_s`: of a closed loop while every place was taken, which is what the endpoint can do at that concurrency;
    `num_steady` requests ended by then.
    `added_ttft_ms`: TTFT less the engine's own part (first scheduled to first token), where the endpoint tells it.
    `e_tps`: None where no deadline was asked for. Latencies are of finished requests; `late_ms` of all.
    `late_ms`: how long after its due instant a request was sent: large values mean that this process could not keep up.
    """

    num_requests: int
    num_finished: int
    errors: dict[str, int]
    elapsed_s: float
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    num_steady: int
    steady_requests_per_s: float
    output_tokens_per_s: float
    e_tps: float | None
    goodput_per_s: float
    ttft_ms: Quantiles | None
    tpot_ms: Quantiles | None
    itl_ms: Quantiles | None
    e2e_ms: Quantiles | None
    added_ttft_ms: Quantiles | None
    late_ms: Quantiles | None
    p99_over_median: float | None

    def as_json(self) -> dict[str, Any]:
        """Numbers rounded to what they mean."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def summarize(samples: Sequence[Sample], started_s: float, targets: Targets) -> Summary:
    """Of requests that have ended, failed ones included."""
    finished = [sample for sample in samples if sample.answer is not None]
    elapsed_s = max((sample.ended_s for sample in samples), default=started_s) - started_s
    in_time = [sample for sample in finished if not targets.deadline_s or _e2e_s(sample) <= targets.deadline_s]
    good = [sample for sample in in_time if _keeps(sample, targets)]
    e2e = quantiles([_e2e_s(sample) for sample in finished])
    num_steady, steady_s = _steady(samples, started_s)

    def rate(count: float) -> float:
        return count / elapsed_s if elapsed_s else 0.0

    return Summary(
        num_requests=len(samples),
        num_finished=len(finished),
        errors=dict(sorted(Counter(sample.code for sample in samples if sample.answer is None).items())),
        elapsed_s=elapsed_s,
        prompt_tokens=sum(sample.answer.prompt_tokens for sample in finished if sample.answer),
        cached_prompt_tokens=sum(sample.answer.cached_prompt_tokens for sample in finished if sample.answer),
        output_tokens=_tokens(finished),
        requests_per_s=rate(len(finished)),
        num_steady=num_steady,
        steady_requests_per_s=num_steady / steady_s if steady_s > 0 else 0.0,
        output_tokens_per_s=rate(_tokens(finished)),
        e_tps=rate(_tokens(in_time)) if targets.deadline_s else None,
        goodput_per_s=rate(len(good)),
        ttft_ms=_of(finished, ttft_s),
        tpot_ms=_of(finished, tpot_s),
        itl_ms=quantiles([gap for sample in finished for gap in _gaps_s(sample)]),
        e2e_ms=e2e,
        added_ttft_ms=_of(finished, _added_ttft_s),
        late_ms=quantiles([sample.sent_s - sample.due_s for sample in samples]),
        p99_over_median=e2e.p99 / e2e.p50 if e2e is not None and e2e.p50 else None,
    )


def quantiles(seconds: Sequence[float]) -> Quantiles | None:
    """None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] * 1e3

    mean = sum(ordered) / len(ordered) * 1e3
    return Quantiles(count=len(ordered), mean=mean, p50=at(0.5), p90=at(0.9), p99=at(0.99), max=ordered[-1] * 1e3)


def ttft_s(sample: Sample) -> float | None:
    """None while no token has come."""
    return sample.arrivals[0][0] - sample.due_s if sample.arrivals else None


def tpot_s(sample: Sample) -> float | None:
    """None below two tokens, or where all of them came at once."""
    count = 0 if sample.answer is None else sample.answer.completion_tokens
    if count < 2 or len(sample.arrivals) < 2:
        return None
    return (sample.arrivals[-1][0] - sample.arrivals[0][0]) / (count - 1)


def _added_ttft_s(sample: Sample) -> float | None:
    first_s = ttft_s(sample)
    if first_s is None or sample.answer is None or sample.answer.engine_ttft_s is None:
        return None
    return first_s - sample.answer.engine_ttft_s


def _e2e_s(sample: Sample) -> float:
    return sample.ended_s - sample.due_s


def _gaps_s(sample: Sample) -> list[float]:
    stamps = [stamp for stamp, _ in sample.arrivals]
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


def _keeps(sample: Sample, targets: Targets) -> bool:
    first, each = ttft_s(sample), tpot_s(sample)
    keeps_ttft = not targets.ttft_s or (first is not None and first <= targets.ttft_s)
    return keeps_ttft and (not targets.tpot_s or each is None or each <= targets.tpot_s)


def _steady(samples: Sequence[Sample], started_s: float) -> tuple[int, float]:
    """How many ended until the last request was sent (after that places stay empty), and the seconds until then."""
    last_sent_s = max((sample.sent_s for sample in samples), default=started_s)
    ended = sum(sample.answer is not None and sample.ended_s <= last_sent_s for sample in samples)
    return ended, last_sent_s - started_s


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(sample.answer.completion_tokens for sample in samples if sample.answer)


def _of(samples: Sequence[Sample], measure: Callable[[Sample], float | None]) -> Quantiles | None:
    return quantiles([value for sample in samples if (value := measure(sample)) is not None])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value
