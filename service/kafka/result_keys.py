"""The results topic as the memory of idempotency keys: which results of a partition carry one, and what such a result says."""

from schemas.v1 import inference_pb2
from service.kafka.chunk_records import offset_of
from service.kafka.idempotency import IdempotencyWindow, Known
from service.kafka.log_reader import LogReader
from service.kafka.records import HEADER_IDEMPOTENCY, HEADER_PROMPT_DIGEST, InRecord, TopicPartition
from service.kafka.request_log import read_result


class ResultKeys:
    """Reads with the clients of `reader`."""

    def __init__(self, reader: LogReader, topic: str) -> None:
        self._reader, self._topic = reader, topic

    def partition(self, of: TopicPartition) -> TopicPartition:
        """Where the results of the prompts of `of` stand."""
        return TopicPartition(self._topic, of.partition)

    async def restore(self, window: IdempotencyWindow, of: TopicPartition, *, begin: int, end: int) -> None:
        """Reads the keys of the results in [begin, end) into the window of a new owner. Raises `RequestError` (it may pass)."""

        def keyed(record: InRecord) -> bool:
            ours = offset_of(record.key, of.topic, of.partition) >= 0
            return ours and any(name == HEADER_IDEMPOTENCY for name, _ in record.headers)

        for record in await self._reader.find(self.partition(of), begin, end, keyed):
            headers = dict(record.headers)
            known = Known(
                result_offset=record.offset,
                request_id=(record.key or b"").decode("utf-8", "replace"),
                digest=headers.get(HEADER_PROMPT_DIGEST, b""),
                time_ms=record.timestamp,
            )
            window.restore(headers[HEADER_IDEMPOTENCY], known)

    async def result(self, of: TopicPartition, known: Known) -> inference_pb2.Result | None:
        """What a remembered key stands for; None when it is gone. Raises `RequestError` (it may pass)."""
        key = known.request_id.encode()

        def wanted(record: InRecord) -> bool:
            return record.key == key

        partition = self.partition(of)
        _, end = await self._reader.bounds(partition)
        found = await self._reader.find(partition, known.result_offset, end, wanted, enough=wanted)
        terminal = read_result(found[0]) if found else None
        return None if terminal is None else terminal.result
