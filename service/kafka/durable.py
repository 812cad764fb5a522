"""Durable requests for the other transports: submit, get, attach and cancel, on any replica, wherever the request runs or ran.

Guarantees: a submitted prompt is acknowledged after the Kafka write; an attached reader is given each token once (`ReaderFold`), from
memory while the request runs here and from the topics otherwise, changing over when it goes elsewhere; leaving a reader ends nothing.
Knows no gRPC.
"""

from collections.abc import AsyncIterator, Callable, Sequence

from schemas.v1 import inference_pb2
from service import wire
from service.contract import PromptRequest, ReaderEvent, Source
from service.kafka.cancels import Cancels
from service.kafka.control import cancel_record
from service.kafka.live import LiveRequest, LiveRequests
from service.kafka.reader_fold import NumCharacters, ReaderFold
from service.kafka.records import HEADER_CONTENT_TYPE, Headers, OutRecord
from service.kafka.request_log import Place, RequestLog
from service.kafka.submission import Submission, affinity_key
from service.kafka.topics import Topics, to_write


class AttachedRequest:
    """One reader's events, ended by `Finished` or `Failed`; closing it early leaves the request as it is."""

    def __init__(
        self, request_id: str, fold: ReaderFold, events: AsyncIterator[ReaderEvent], is_here: Callable[[], bool]
    ) -> None:
        self.request_id = request_id
        self._fold = fold
        self._events = events
        self._is_here = is_here

    @property
    def traceparent(self) -> str:
        """The W3C context of the generation that is read, "" while it is not known."""
        return self._fold.traceparent

    @property
    def here(self) -> bool:
        """Whether the request runs on this replica."""
        return self._is_here()

    def __aiter__(self) -> AsyncIterator[ReaderEvent]:
        return self._events

    async def aclose(self) -> None:
        """Ends the reading; idempotent."""
        await self._events.aclose()  # type: ignore[attr-defined]


class DurableRequests:
    """The requests of one Kafka group, as any replica sees them."""

    def __init__(
        self,
        *,
        log: RequestLog,
        live: LiveRequests,
        cancels: Cancels,
        submission: Submission,
        topics: Topics,
        wall_ns: Callable[[], int],
        num_characters: NumCharacters,
    ) -> None:
        """`num_characters` finds where the text goes on for a reader that tells its tokens alone."""
        self._num_characters = num_characters
        self._log, self._live, self._cancels = log, live, cancels
        self._submission, self._topics = submission, topics
        self._wall_ns = wall_ns

    def owns(self, request_id: str) -> bool:
        """Whether an id is that of a durable request, by its form."""
        return self._log.owns(request_id)

    async def submit(
        self, prompt: PromptRequest, *, key: str = "", queue_class: str = "", conversation_id: str = "", headers: Headers = ()
    ) -> Source:
        """Writes the prompt and tells where it stands. `headers` go with the record. Raises `RequestError`.

        `queue_class` as in `topics.to_write`.
        """
        return await self._submission.write(
            OutRecord(
                topic=await to_write(self._topics, queue_class, self._exists),
                key=affinity_key(prompt, key, conversation_id).encode(),
                value=wire.to_bytes(wire.prompt_to_proto(prompt)),
                headers=((HEADER_CONTENT_TYPE, wire.JSON.encode()), *headers),
            )
        )

    async def _exists(self, topic: str) -> bool:
        return await self._log.num_partitions(topic) > 0

    async def get(self, request_id: str) -> inference_pb2.Result:
        """The terminal record; one with status `pending` while there is none. Raises `RequestError`."""
        if (terminal := self._log.remembered(request_id)) is not None:
            return terminal.result
        place = await self._log.place(request_id)
        if place.ended:
            return (await self._log.result(place)).result
        return inference_pb2.Result(
            request_id=request_id, status=inference_pb2.Result.pending, source=wire.source_to_proto(place.source)
        )

    async def attach(self, request_id: str, after: Sequence[int] = (), after_text: Sequence[int] = ()) -> AttachedRequest:
        """The events after what the reader has: tokens, and characters (below 0: those of the tokens), one number a choice.

        Raises `RequestError`.
        """
        fold = ReaderFold(request_id, after, after_text, num_characters=self._num_characters)
        live = self._live.get(request_id)
        if live is not None and not live.serves(after, after_text):
            # It was begun elsewhere: the topic has what came before.
            live = None
        place = None
        if live is None and self._log.remembered(request_id) is None:
            place = await self._log.place(request_id)
        return AttachedRequest(
            request_id,
            fold,
            self._events(request_id, fold, live, place),
            lambda: self._live.get(request_id) is not None,
        )

    async def cancel(self, request_id: str) -> bool:
        """Ends it wherever it runs or waits; False when it had ended. Idempotent. Raises `RequestError`."""
        if self._log.remembered(request_id) is not None:
            return False
        place = await self._log.place(request_id)
        if place.ended:
            return False
        await self._submission.write(cancel_record(self._topics.control, request_id, time_ns=self._wall_ns()))
        self._cancels.add(request_id)
        return True

    async def _events(
        self, request_id: str, fold: ReaderFold, live: LiveRequest | None, place: Place | None
    ) -> AsyncIterator[ReaderEvent]:
        if live is not None:
            async for message in live.messages():
                for event in fold.take(message):
                    yield event
        elif place is None and (terminal := self._log.remembered(request_id)) is not None:
            for event in fold.take(terminal):
                yield event
        if fold.ended:
            return
        # Past, elsewhere, or gone from here while it was read.
        async for message in self._log.messages(place or await self._log.place(request_id)):
            for event in fold.take(message):
                yield event
