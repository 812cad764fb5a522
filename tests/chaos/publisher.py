"""Publishes a run's prompts at an even pace with librdkafka, and keeps what the brokers acknowledged."""

import threading
from collections.abc import Callable

from confluent_kafka import KafkaError, Message, Producer

from tests.chaos.history import Acknowledged
from tests.chaos.prompts import PromptSpec
from tests.chaos.run_clock import RunClock

FLUSH_S = 120.0


class Publisher:
    """Runs in a thread of its own. `acknowledged` grows as the brokers answer."""

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        prompts: Callable[[int], PromptSpec],
        clock: RunClock,
        *,
        count: int,
        duration_s: float,
    ) -> None:
        """`count` prompts over the first `duration_s` seconds of `clock`."""
        self._clock = clock
        self._topic, self._prompts, self._count, self._duration_s = topic, prompts, count, duration_s
        # Idempotent: a record is written once, and its answer comes in the end, brokers that die meanwhile included.
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "linger.ms": 5,
                "message.timeout.ms": 0,
                "log_level": 0,
                "reconnect.backoff.max.ms": 1000,
            }
        )
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self.acknowledged: list[Acknowledged] = []
        self.failures: list[str] = []
        self.num_sent = 0
        self._ends: dict[int, int] = {}

    def start(self) -> None:
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether every prompt was sent and answered."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Waits for the last answer. Raises RuntimeError when a prompt was refused."""
        self._thread.join()
        if self.failures:
            raise RuntimeError(f"{len(self.failures)} prompts were not taken by the brokers: {self.failures[0]}")

    def _run(self) -> None:
        for index in range(self._count):
            due_s = self._duration_s * index / max(self._count, 1)
            while (wait_s := due_s - self._clock.elapsed()) > 0:
                self._producer.poll(min(wait_s, 0.05))
            self._send(self._prompts(index))
        if left := self._producer.flush(FLUSH_S):
            self.failures.append(f"{left} prompts were never answered")

    def _send(self, prompt: PromptSpec) -> None:
        def answered(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self.failures.append(str(error))
                return
            partition, offset = message.partition(), message.offset()
            if offset is None:
                # A broker that holds a repeated batch already may not say where: behind the last, for only this producer writes here.
                offset = self._ends.get(partition, 0)
            self._ends[partition] = offset + 1
            self.acknowledged.append(
                Acknowledged(
                    partition=partition,
                    offset=offset,
                    kind=prompt.kind,
                    num_tokens=prompt.num_tokens,
                    num_choices=prompt.num_choices,
                    answers=prompt.answers,
                    error=prompt.error,
                )
            )

        while True:
            try:
                self._producer.produce(
                    self._topic, prompt.value, partition=prompt.partition, headers=dict(prompt.headers), on_delivery=answered
                )
            except BufferError:
                self._producer.poll(0.1)
                continue
            break
        self.num_sent += 1
        self._producer.poll(0)
