"""The readers' side of the Kafka transport, put together: what runs here as readers see it, cancels, and durable requests for others.

Nothing connects before it is asked, but for the control topic's reader (`run`). `close` comes after the last reader has gone.
"""

import functools
from collections.abc import Callable

from service.config import KafkaSection
from service.kafka.cancels import Cancels
from service.kafka.clients import Clients
from service.kafka.control import ControlReader
from service.kafka.durable import DurableRequests
from service.kafka.live import LiveRequests
from service.kafka.log_reader import LogReader
from service.kafka.reader_fold import NumCharacters
from service.kafka.request_log import RequestLog
from service.kafka.submission import Submission
from service.kafka.tail import Tail
from service.kafka.topics import Topics


class Readers:
    """`live` and `cancels` are the owner's to fill and to ask, `log_reader` reads for it, too; `durable` is for the other transports."""

    def __init__(
        self,
        section: KafkaSection,
        clients: Clients,
        *,
        on_cancel: Callable[[str], object],
        wall_ns: Callable[[], int],
        num_characters: NumCharacters,
    ) -> None:
        topics = Topics(section.topic_prefix)
        make_reader = functools.partial(clients.reader, committed=True)
        # librdkafka's in-process broker answers no question about times.
        knows_times = not section.embedded
        self.cancels = Cancels(since_ms=wall_ns() // 1_000_000, on_cancel=on_cancel)
        self._control = ControlReader(make_reader, topics.control, self.cancels, knows_times=knows_times)
        self.log_reader = LogReader(
            make_consumer=make_reader,
            make_admin=clients.admin,
            group_id=section.group_id,
            knows_times=knows_times,
        )
        self._tail = Tail(make_reader, topics)
        self._submission = Submission(clients.producer)
        self._log = log = RequestLog(self.log_reader, self._tail, topics, wall_ns=wall_ns)
        self.live = LiveRequests(on_end=log.remember)
        self.durable = DurableRequests(
            log=log, live=self.live, cancels=self.cancels, submission=self._submission, topics=topics,
            wall_ns=wall_ns, num_characters=num_characters,
        )  # fmt: skip

    def forget(self, topic: str) -> None:
        """A topic of prompts was deleted: another of its name has other requests under the same ids."""
        self._log.forget(topic)

    async def run(self) -> None:
        """Reads the control topic until cancelled."""
        await self._control.run()

    async def close(self) -> None:
        """Ends every client; idempotent."""
        await self._tail.close()
        await self._submission.close()
        await self.log_reader.close()
