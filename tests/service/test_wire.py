"""The shared codec: what it reads, and what it refuses by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.v1 import inference_pb2
from service import contract, wire
from service.contract import PromptRequest, SamplingFields
from service.errors import CODES, RequestError
from service.resolution import check_sampling

FULL = PromptRequest(
    messages=(("system", "be brief"), ("user", "hé\n")),
    model="m",
    sampling=SamplingFields(
        max_tokens=4,
        temperature=0.0,
        top_k=-1,
        logit_bias={3: -1.5},
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        ignore_eos=False,
        n=2,
        seed=2**63 - 1,
    ),
    label="mine",
    ttl_ms=5,
    metadata={"k": "v"},
)


def outcome(value: bytes, content_type: str) -> str:
    """The code that refuses a value, or that it is a prompt; anything but a typed error goes through to the test."""
    try:
        read = wire.prompt_from_bytes(value, content_type)
    except RequestError as error:
        return error.code
    return "a prompt" if [read.text, read.messages, read.token_ids].count(None) == 2 else "neither"


REFUSED = {
    b"\xff": ("invalid_json", ""),
    b"": ("invalid_json", ""),
    b"[1]": ("invalid_json", ""),
    b'{"prompt": "a"': ("invalid_json", ""),
    b'\xef\xbb\xbf{"prompt": "a"}': ("invalid_json", ""),
    b"[" * 100_000: ("invalid_json", ""),
    b'{"prompt": "a", "prompt": "b"}': ("invalid_json", "prompt"),
    b'{"prompt": "a", "sampling": {"n": 1, "n": 2}}': ("invalid_json", "n"),
    b'{"prompt": "a", "wrong": 1}': ("unknown_field", "wrong"),
    b'{"prompt": "a", "sampling": {"maxTokens": 1}}': ("unknown_field", "sampling.maxTokens"),
    b'{"messages": [{"role": "user", "text": ""}]}': ("unknown_field", "messages[0].text"),
    b"{}": ("invalid_field", "prompt"),
    b'{"prompt": ""}': ("invalid_field", "prompt"),
    b'{"prompt": null}': ("invalid_field", "prompt"),
    b'{"prompt": 1}': ("invalid_field", "prompt"),
    b'{"prompt": "\\ud800"}': ("invalid_field", "prompt"),
    b'{"prompt": "a", "token_ids": [1]}': ("invalid_field", "token_ids"),
    b'{"messages": []}': ("invalid_field", "messages"),
    b'{"messages": ["a"]}': ("invalid_field", "messages[0]"),
    b'{"messages": [{"content": "a"}]}': ("invalid_field", "messages[0].role"),
    b'{"token_ids": []}': ("invalid_field", "token_ids"),
    b'{"token_ids": [1, -2]}': ("invalid_field", "token_ids[1]"),
    b'{"token_ids": {"ids": [4294967296]}}': ("invalid_field", "token_ids.ids[0]"),
    b'{"prompt": "a", "sampling": []}': ("invalid_field", "sampling"),
    b'{"prompt": "a", "sampling": {"max_tokens": -1}}': ("invalid_field", "sampling.max_tokens"),
    b'{"prompt": "a", "sampling": {"max_tokens": 1.5}}': ("invalid_field", "sampling.max_tokens"),
    b'{"prompt": "a", "sampling": {"max_tokens": true}}': ("invalid_field", "sampling.max_tokens"),
    b'{"prompt": "a", "sampling": {"max_tokens": "1"}}': ("invalid_field", "sampling.max_tokens"),
    b'{"prompt": "a", "sampling": {"max_tokens": ' + b"9" * 5_000 + b"}}": ("invalid_field", "sampling.max_tokens"),
    b'{"prompt": "a", "sampling": {"temperature": NaN}}': ("invalid_field", "sampling.temperature"),
    b'{"prompt": "a", "sampling": {"temperature": -Infinity}}': ("invalid_field", "sampling.temperature"),
    b'{"prompt": "a", "sampling": {"top_p": 1e999}}': ("invalid_field", "sampling.top_p"),
    b'{"prompt": "a", "sampling": {"top_p": "0.5"}}': ("invalid_field", "sampling.top_p"),
    b'{"prompt": "a", "sampling": {"ignore_eos": 1}}': ("invalid_field", "sampling.ignore_eos"),
    b'{"prompt": "a", "sampling": {"seed": 18446744073709551616}}': ("invalid_field", "sampling.seed"),
    b'{"prompt": "a", "sampling": {"logit_bias": {"x": 1}}}': ("invalid_field", "sampling.logit_bias.x"),
    b'{"prompt": "a", "sampling": {"logit_bias": {"1": NaN}}}': ("invalid_field", "sampling.logit_bias.1"),
    b'{"prompt": "a", "sampling": {"stop": ["a", ""]}}': ("invalid_field", "sampling.stop[1]"),
    b'{"prompt": "a", "sampling": {"stop": ["' + b"s" * 257 + b'"]}}': ("invalid_field", "sampling.stop[0]"),
    b'{"prompt": "a", "sampling": {"stop": [' + b",".join([b'"s"'] * 17) + b"]}}": ("invalid_field", "sampling.stop"),
    b'{"prompt": "a", "label": "' + b"l" * 257 + b'"}': ("invalid_field", "label"),
    b'{"prompt": "a", "ttl_ms": -5}': ("invalid_field", "ttl_ms"),
    b'{"prompt": "a", "metadata": {"k": 1}}': ("invalid_field", "metadata.k"),
    b'{"prompt": "a", "metadata": {"k": "' + b"v" * 257 + b'"}}': ("invalid_field", "metadata"),
}


@pytest.mark.parametrize(("value", "expected"), REFUSED.items(), ids=range(len(REFUSED)))
def test_json_that_cannot_be_served_is_refused_by_code_and_field(value: bytes, expected: tuple[str, str]) -> None:
    with pytest.raises(RequestError) as caught:
        wire.prompt_from_bytes(value)
    assert (caught.value.code, caught.value.field) == expected


@pytest.mark.parametrize(
    ("field", "values", "range_"),
    [
        ("max_tokens", (-1, 0, 2**32, 10**13), "must lie in [1, 2^32 - 1]"),
        ("min_tokens", (-1, 2**32), "must lie in [0, max_tokens]"),
        ("top_k", (-(2**31) - 1, -2, 2**31), "must be -1 or 0 (off), or a count below 2^31"),
        ("logprobs", (-1, 21, 2**32), "must lie in [0, 20]"),
        ("n", (-1, 0, 17, 2**32), "must lie in [1, 16]"),
        ("seed", (-2, 2**63, 2**64 - 1, 10**23), "must lie in [0, 2^63 - 1]"),
    ],
)
def test_a_number_out_of_range_is_refused_in_the_same_words_wherever(field: str, values: tuple[int, ...], range_: str) -> None:
    for value in values:
        with pytest.raises(RequestError) as caught:
            check_sampling(wire.prompt_from_bytes(json.dumps({"prompt": "a", "sampling": {field: value}}).encode()).sampling)
        assert (caught.value.code, caught.value.field, caught.value.message) == ("invalid_field", f"sampling.{field}", range_)


def test_more_metadata_than_allowed_is_refused() -> None:
    pairs = ",".join(f'"k{index}": ""' for index in range(17))
    with pytest.raises(RequestError, match="17 pairs"):
        wire.prompt_from_bytes(f'{{"prompt": "a", "metadata": {{{pairs}}}}}'.encode())


def test_a_prompt_survives_json_and_protobuf() -> None:
    message = wire.prompt_to_proto(FULL)
    assert wire.prompt_from_bytes(wire.to_bytes(message)) == FULL
    assert wire.prompt_from_bytes(message.SerializeToString(), wire.PROTOBUF) == FULL


def test_messages_and_token_ids_may_be_plain_lists_or_canonical_objects() -> None:
    assert wire.prompt_from_bytes(b'{"token_ids": [1, 2]}') == wire.prompt_from_bytes(b'{"token_ids": {"ids": [1, 2]}}')
    plain = wire.prompt_from_bytes(b'{"messages": [{"role": "user", "content": "a"}]}')
    assert plain.messages == (("user", "a"),)
    assert plain == wire.prompt_from_bytes(b'{"messages": {"items": [{"role": "user", "content": "a"}]}}')


def test_absent_sampling_fields_differ_from_zero() -> None:
    sampling = wire.prompt_from_bytes(b'{"prompt": "a", "sampling": {"temperature": 0}}').sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.0, None, None)


@pytest.mark.parametrize("value", [b"\x0a\x05ab", b"\xff" * 9, b"\x0a\x02\xff\xfe"])
def test_bytes_that_are_no_prompt_message_are_refused(value: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        wire.prompt_from_bytes(value, wire.PROTOBUF)
    assert caught.value.code == "invalid_protobuf"


def test_unknown_binary_fields_are_ignored() -> None:
    value = inference_pb2.Prompt(prompt="a").SerializeToString() + b"\xf8\x07\x01"
    assert wire.prompt_from_bytes(value, wire.PROTOBUF).text == "a"


def test_a_protobuf_number_that_is_not_finite_is_refused() -> None:
    message = inference_pb2.Prompt(prompt="a", sampling=inference_pb2.Sampling(top_p=float("nan")))
    with pytest.raises(RequestError) as caught:
        wire.prompt_from_proto(message)
    assert (caught.value.code, caught.value.field) == ("invalid_field", "sampling.top_p")


@pytest.mark.parametrize("content_type", ["text/plain", "application/cloudevents+json", "application/json; charset=latin-1"])
def test_other_content_types_are_refused(content_type: str) -> None:
    with pytest.raises(RequestError) as caught:
        wire.prompt_from_bytes(b'{"prompt": "a"}', content_type)
    assert caught.value.code == "unsupported_content_type"


def test_a_content_type_may_name_its_charset() -> None:
    assert wire.prompt_from_bytes(b'{"prompt": "a"}', "Application/JSON; charset=UTF-8").text == "a"


@given(st.binary(max_size=200), st.sampled_from([wire.JSON, wire.PROTOBUF]))
def test_any_bytes_are_a_prompt_or_a_typed_error(value: bytes, content_type: str) -> None:
    assert outcome(value, content_type) in {"a prompt", *CODES}


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["prompt", "messages", "sampling", "n", "stop", "items", "role", "metadata", "x"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_prompt_or_a_typed_error(document: object) -> None:
    assert outcome(json.dumps(document).encode(), wire.JSON) in {"a prompt", *CODES}


def test_a_long_unknown_key_is_not_echoed_whole() -> None:
    with pytest.raises(RequestError) as caught:
        wire.prompt_from_bytes(b'{"' + b"k" * 5_000 + b'": 1}')
    assert len(caught.value.field) < 100


def test_events_say_what_the_contract_says() -> None:
    delta = contract.Delta(choice=1, seq=7, token_ids=(4, 5), text="ab", text_offset=3, finish_reason="length")
    message = wire.event_to_proto("r", delta, epoch=2)
    assert (message.request_id, message.seq, message.epoch, message.WhichOneof("event")) == ("r", 7, 2, "delta")
    assert (message.delta.choice, list(message.delta.token_ids), message.delta.finish_reason) == (
        1,
        [4, 5],
        inference_pb2.length,
    )
    failed = contract.Failed(
        error=RequestError("invalid_field", "bad", field="sampling.n"),
        choices=(),
        usage=contract.Usage(prompt_tokens=1, cached_prompt_tokens=0, completion_tokens=0),
        timings=contract.Timings(queue_ms=0, ttft_ms=0, tpot_ms=0, total_ms=0),
        seed=1,
        trace_id="",
    )
    answer = wire.event_to_proto("r", failed, said=9)
    assert (answer.seq, answer.failed.code, answer.failed.field, answer.failed.retriable) == (
        9,
        "invalid_field",
        "sampling.n",
        False,
    )


def test_json_out_is_snake_case_with_zeroes_shown() -> None:
    chunk = wire.chunk_to_proto(
        contract.Delta(choice=0, seq=0, token_ids=(), text="", text_offset=0), request_id="r", time_ns=0
    )
    assert b'"text_offset":"0"' in wire.to_bytes(chunk)
    assert b'"token_ids":[]' in wire.to_bytes(chunk)
