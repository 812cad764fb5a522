"""The bounds of a partition's window and of the intake, hit on purpose on a real broker: held all the time, and left again."""

import pytest

from service.kafka.budget import estimate
from service.telemetry.metrics import Metrics
from tests.integration.kafka_harness import Broker, eventually, serving
from tests.service.kafka.fakes import FakeGeneration

pytestmark = pytest.mark.kafka


class Peaks:
    """The largest values that the gauges were ever set to."""

    def __init__(self, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
        self.window = self.intake = self.paused = 0
        kafka = metrics.kafka
        set_window, set_intake = kafka.window, kafka.intake

        def window(topic: str, partition: int, offsets: int) -> None:
            self.window = max(self.window, offsets)
            set_window(topic, partition, offsets)

        def intake(*, tokens: int, paused_partitions: int) -> None:
            self.intake, self.paused = max(self.intake, tokens), max(self.paused, paused_partitions)
            set_intake(tokens=tokens, paused_partitions=paused_partitions)

        monkeypatch.setattr(kafka, "window", window)
        monkeypatch.setattr(kafka, "intake", intake)


@pytest.fixture
def broker(kafka_server: str) -> Broker:
    return Broker(kafka_server)


async def test_a_window_that_is_full_holds_its_partition_alone_until_its_oldest_has_ended(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation, metrics = FakeGeneration(), Metrics()
    peaks = Peaks(metrics, monkeypatch)
    async with serving(broker.section(window_offsets=16), generation, metrics=metrics) as transport:
        await eventually(lambda: transport.status().partitions == 2)
        await broker.say("hold the first", *(f"prompt {number}" for number in range(59)))
        await eventually(lambda: transport.status().paused_partitions == 1)
        assert len(await broker.results(15)) == 15
        await broker.say("elsewhere", partition=1)
        held = await broker.results(16)
        # Fifteen behind the first have ended, and nothing beyond the window was begun.
        assert {int(result["source"]["offset"]) for result in held if result["source"]["partition"] == 0} == set(range(1, 16))
        assert len(generation.calls) == 17
        generation.let_all_go()
        results = await broker.results(61)
    assert (len(results), peaks.window, peaks.paused) == (61, 16, 1)
    assert len({result["request_id"] for result in results}) == 61


async def test_the_intake_stops_at_its_budget_and_goes_on_below_it(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, metrics = FakeGeneration(), Metrics()
    peaks = Peaks(metrics, monkeypatch)
    cost = estimate(b'{"prompt": "hold prompt 00"}')
    section = broker.section(intake_high_tokens=10 * cost, intake_low_tokens=5 * cost)
    async with serving(section, generation, metrics=metrics) as transport:
        await eventually(lambda: transport.status().partitions == 2)
        texts = [f"hold prompt {number:02}" for number in range(40)]
        for partition in (0, 1):
            await broker.say(*texts[20 * partition : 20 * partition + 20], partition=partition)
        await eventually(lambda: transport.status().paused_partitions == 2)
        # It stops above the budget: by the record that passes it, and no more.
        assert (len(generation.calls), transport.status().intake_tokens) == (11, 11 * cost)
        for text in generation.started_texts()[:6]:
            generation.let_go(text)
        await eventually(lambda: len(generation.calls) > 11)
        await eventually(lambda: transport.status().paused_partitions == 2)
        assert transport.status().intake_tokens == 11 * cost
        generation.let_all_go()
        results = await broker.results(40)
        await eventually(lambda: transport.status().intake_tokens == 0)
    assert (len({result["request_id"] for result in results}), peaks.intake) == (40, 11 * cost)
