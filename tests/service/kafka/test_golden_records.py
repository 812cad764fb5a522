"""Records as other stacks wrote them to Apache Kafka 4.1, kept byte for byte, are read as what their senders meant.

Written by kcat 1.7.1, confluent-kafka 2.16, the console producer of Kafka 4.1.0, and by the CloudEvents Kafka binding 1.0.2's rules;
then consumed from the broker and stored: keys, values and headers in base64.
"""

import base64
import json
from pathlib import Path

import pytest

from service.errors import RequestError
from service.kafka.codec import Envelope, read_prompt
from tests.service.kafka.fakes import FakeRecord

RECORDS = {
    record["producer"]: record for record in json.loads(Path(__file__).with_name("golden_records.json").read_text("utf-8"))
}
LABELS = {
    "kcat with key and headers": "from kcat",
    "kcat bare": "",
    "confluent-kafka": "from confluent",
    "confluent-kafka protobuf": "",
    "CloudEvents binary": "event-1",
    "Java console producer": "from the console",
}


def golden(producer: str) -> FakeRecord:
    def raw(text: str | None) -> bytes | None:
        return None if text is None else base64.b64decode(text)

    record = RECORDS[producer]
    headers = [(name, raw(value)) for name, value in record["headers"]]
    return FakeRecord(raw(record["value"]), key=raw(record["key"]), headers=headers)  # type: ignore[arg-type]


@pytest.mark.parametrize(("producer", "label"), LABELS.items())
def test_another_stacks_record_is_the_prompt_that_it_sent(producer: str, label: str) -> None:
    read = read_prompt(golden(producer))
    sampling = read.prompt.sampling
    assert (read.prompt.text, sampling.max_tokens, sampling.seed, read.prompt.label) == ("hello", 3, 1, label)


def test_a_protobuf_sender_is_answered_in_protobuf() -> None:
    assert Envelope.of(golden("confluent-kafka protobuf")).media_type == "application/x-protobuf"


def test_a_structured_cloud_event_is_refused_by_its_content_type() -> None:
    with pytest.raises(RequestError) as caught:
        read_prompt(golden("CloudEvents structured"))
    assert (caught.value.code, caught.value.field) == ("unsupported_content_type", "content-type")


def test_every_golden_record_is_tested() -> None:
    assert set(RECORDS) == {*LABELS, "CloudEvents structured"}
