"""The commands that speak to servers, as processes: Kafka's against a real broker, `stream` against a replica, and the demo."""

import asyncio
import json
import signal
from pathlib import Path

import pytest
from confluent_kafka import Producer

from service.kafka.embedded import EmbeddedBroker
from tests.integration.app_harness import Values, command, flags, gone, run, serve, values
from tests.integration.kafka_harness import Broker, make_class_topics
from tests.servers.model import model_dir

NUM_LETTERS, NUM_FOLLOW_UPS = 8, 4


def only(section: str, config: Values) -> list[str]:
    """`--set` for one section."""
    return flags({section: config[section]})


@pytest.mark.kafka
async def test_publish_waits_for_its_results_and_tail_shows_what_the_topics_hold(
    tiny_model_dir: Path, topics_of_its_own: Broker, tmp_path: Path
) -> None:
    broker = topics_of_its_own
    config = values(tiny_model_dir, broker=broker)
    kafka = only("kafka", config)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"line {index}", "sampling": {"max_tokens": 5}} for index in range(3)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    async with serve(config):
        code, out, errors = await run("publish", "--file", str(prompts), "--wait", "--json", *kafka)
        published = [json.loads(line) for line in out.splitlines()]
        results = [item for item in published if "status" in item]
        assert (code, errors) == (0, "")
        assert {item["request_id"] for item in results} == {item["request_id"] for item in published if "trace_id" in item}
        assert [item["usage"]["completion_tokens"] for item in results] == [5, 5, 5]
        code, out, _ = await run("tail", "--from", "beginning", "--count", "3", "--json", *kafka)
        assert (code, {json.loads(line)["request_id"] for line in out.splitlines()}) == (
            0,
            {item["request_id"] for item in results},
        )
        code, out, _ = await run("tail", "--chunks", "--from", "beginning", "--count", "1", "--json", *kafka)
        assert (code, json.loads(out)["type"]) == (0, "started")
        code, out, errors = await run("publish", "too much", "--max-tokens", "100000", "--wait", *kafka)
        assert (code, "too_many_tokens" in out, errors) == (1, True, "")


@pytest.mark.kafka
async def test_a_durable_prompt_from_the_command_line(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    config = values(tiny_model_dir, broker=topics_of_its_own, engine={"stand_in_tokens_per_s": 100.0})
    async with serve(config) as sluice:
        target = ("--target", sluice.facts["grpc"], "--json")
        code, out, errors = await run("submit", "hello", "--max-tokens", "30", "--seed", "5", *target)
        request_id = json.loads(out)["request_id"]
        assert (code, errors) == (0, "")
        code, out, _ = await run("get", request_id, "--wait", *target)
        result = json.loads(out)
        assert (code, result["status"], len(result["choices"][0]["token_ids"])) == (0, "finished", 30)
        code, out, errors = await run("attach", request_id, "--after-seq", "10", *target)
        said = [token for line in out.splitlines() for token in json.loads(line).get("token_ids", ())]
        assert (code, said, errors) == (0, result["choices"][0]["token_ids"][10:], "")
        code, out, _ = await run("cancel", request_id, *target)
        assert (code, json.loads(out)["was_running"]) == (0, False)
        code, out, _ = await run("submit", "hello", "--max-tokens", "3000", "--seed", "5", *target)
        request_id = json.loads(out)["request_id"]
        async with command("attach", request_id, "--target", sluice.facts["grpc"]) as attach:
            assert attach.process.stdout is not None
            assert await asyncio.wait_for(attach.process.stdout.read(1), 30)
            await run("cancel", request_id, *target)
            code, out = await attach.finish()
        assert (code, out[-1], attach.errors.startswith("error: cancelled: ")) == (1, "\n", True)
        code, out, errors = await run("get", f"{topics_of_its_own.topics.prompts}-0-99", "--target", sluice.facts["grpc"])
        assert (code, out) == (1, "")
        assert "unknown_request: request_id: " in errors
        code, out, _ = await run("tail", "--chunks", "--from", "1h", "--count", "2", "--json", *only("kafka", config))
        assert [json.loads(line)["type"] for line in out.splitlines()] == ["started", "delta"]


@pytest.mark.kafka
async def test_publish_writes_nothing_of_a_file_with_a_wrong_line(topics_of_its_own: Broker, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "good"}\n{"promt": "bad"}\n')
    kafka = only("kafka", values(tmp_path, broker=topics_of_its_own))
    code, out, errors = await run("publish", "--file", str(prompts), *kafka)
    assert (code, out) == (2, "")
    assert "line 2: unknown_field: promt" in errors


@pytest.mark.kafka
async def test_publish_writes_to_the_class_that_is_named(topics_of_its_own: Broker, tmp_path: Path) -> None:
    broker = topics_of_its_own
    make_class_topics(broker, "batch")
    kafka = only("kafka", values(tmp_path, broker=broker))
    code, out, errors = await run("publish", "hello", "--class", "batch", "--json", *kafka)
    assert (code, json.loads(out)["request_id"].rsplit("-", 2)[0], errors) == (0, f"{broker.topics.prompts}.batch", "")
    code, out, errors = await run("publish", "hello", "--class", "interactive", *kafka)
    assert (code, out) == (2, "")
    assert "queue_class: has no topic here: `sluice topics create --class interactive` makes" in errors


@pytest.mark.kafka
async def test_publish_of_a_prompt_that_no_record_holds_says_so(topics_of_its_own: Broker, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "x" * 3_000_000}))
    kafka = only("kafka", values(tmp_path, broker=topics_of_its_own))
    code, out, errors = await run("publish", "--file", str(prompts), *kafka)
    assert (code, out) == (1, "")
    assert errors.startswith("error: prompt_too_long: prompt: ")


async def test_tail_of_topics_that_are_not_there_makes_none() -> None:
    # A broker that creates each topic that it is asked for.
    broker = EmbeddedBroker(port=0)
    await broker.start({"there.prompts": 1})
    try:
        for _ in range(2):
            code, out, errors = await run("tail", "--brokers", broker.bootstrap, "--set", "kafka.topic_prefix=nowhere.")
            assert (code, out) == (1, "")
            assert "topic nowhere.results does not exist; make it with `sluice topics create`" in errors
    finally:
        await broker.close()


@pytest.mark.kafka
async def test_publish_where_there_are_no_topics_says_how_to_make_them(kafka_server: str) -> None:
    code, out, errors = await run("publish", "hello", "--brokers", kafka_server, "--set", "kafka.topic_prefix=nowhere.")
    assert (code, out) == (1, "")
    assert "topic nowhere.prompts does not exist; make it with `sluice topics create`" in errors


@pytest.mark.kafka
async def test_publish_that_waits_in_vain_says_what_is_missing(topics_of_its_own: Broker, tmp_path: Path) -> None:
    kafka = only("kafka", values(tmp_path, broker=topics_of_its_own))
    code, out, errors = await run("publish", "hello", "--wait", "--timeout", "0.5", *kafka)
    assert code == 1
    assert f"no result for {out.split()[0]} within 0.5 s" in errors


@pytest.mark.kafka
async def test_tail_ends_with_130_on_ctrl_c(topics_of_its_own: Broker, tmp_path: Path) -> None:
    broker = topics_of_its_own
    kafka = only("kafka", values(tmp_path, broker=broker))
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    producer.produce(broker.topics.results, b"not ours")
    assert await asyncio.to_thread(producer.flush, 20) == 0
    async with command("tail", "--from", "beginning", "--json", *kafka) as tail:
        assert tail.process.stdout is not None
        line = await asyncio.wait_for(tail.process.stdout.readline(), 30)
        tail.send(signal.SIGINT)
        code, _ = await tail.finish()
    assert json.loads(line)["unreadable"] is True
    assert (code, tail.errors.strip()) == (130, "")


@pytest.mark.kafka
async def test_topics_are_created_once_and_checked(kafka_server: str, tmp_path: Path) -> None:
    broker = Broker(kafka_server)
    options = ["--brokers", kafka_server, "--set", f"kafka.topic_prefix={broker.prefix}new."]
    code, out, errors = await run("topics", "check", "--json", *options)
    assert (code, json.loads(out)["ok"]) == (1, False)
    code, out, errors = await run("topics", "create", "--partitions", "3", "--json", *options)
    assert (code, len(json.loads(out)["created"]), errors) == (0, 5, "")
    code, out, _ = await run("topics", "check", "--json", *options)
    assert (code, json.loads(out)["ok"], set(json.loads(out)["partitions"].values())) == (0, True, {3})
    code, out, _ = await run("topics", "create", *options)
    assert (code, out) == (0, "every topic exists already\n")
    code, out, _ = await run("topics", "create", "--class", "batch", "--json", *options)
    assert (code, json.loads(out)) == (0, {"created": [f"{broker.prefix}new.prompts.batch"]})
    code, out, _ = await run("topics", "check", "--json", *options)
    assert (code, json.loads(out)["ok"], set(json.loads(out)["partitions"].values())) == (0, True, {3})


async def test_a_stream_goes_on_when_the_engine_is_killed_under_it(tiny_model_dir: Path) -> None:
    arguments = ("stream", "hello", "--json", "--seed", "5", "--max-tokens", "60")
    async with serve(values(tiny_model_dir)) as sluice:
        _, whole, _ = await run(*arguments, "--target", sluice.facts["grpc"])
    async with serve(values(tiny_model_dir, engine={"stand_in_tokens_per_s": 30.0})) as sluice:
        child = await sluice.child()
        async with command(*arguments, "--target", sluice.facts["grpc"]) as stream:
            assert stream.process.stdout is not None
            head = [await asyncio.wait_for(stream.process.stdout.readline(), 30) for _ in range(4)]
            child.kill()
            code, rest = await stream.finish()
        await gone(child)
    killed = b"".join(head).decode() + rest
    assert (code, stream.errors) == (0, "")
    assert tokens(killed) == tokens(whole)
    assert len(tokens(whole)) == 60


def tokens(lines: str) -> list[int]:
    """The tokens that `stream --json` printed; each event must go on where the last one ended."""
    said: list[int] = []
    for event in map(json.loads, lines.splitlines()):
        if "seq" in event:
            assert event["seq"] == len(said)
            said += event["token_ids"]
    return said


async def test_stream_says_what_was_refused(tiny_model_dir: Path) -> None:
    async with serve(values(tiny_model_dir)) as sluice:
        code, out, errors = await run("stream", "a", "--max-tokens", "100000", "--target", sluice.facts["grpc"])
    assert (code, out) == (1, "")
    assert errors.startswith("error: too_many_tokens: sampling.max_tokens: ")


async def test_the_demo_shows_every_answer_a_table_and_the_trace(tiny_model_dir: Path) -> None:
    stand_in = ("--set", "engine.kind=stand-in", "--set", f"model.path={tiny_model_dir}")
    code, out, errors = await run("demo", *stand_in)
    assert (code, errors) == (0, "")
    assert out.count(": 48 tokens\n") == NUM_LETTERS + NUM_FOLLOW_UPS
    for words in (
        "TTFT ms",
        "send prompts",
        "process prompts",
        f"chat {tiny_model_dir.name}",
        "prefill",
        "decode",
        "send results",
    ):
        assert words in out


@pytest.mark.model
async def test_the_demo_of_the_real_model_finishes_every_request_and_takes_the_second_round_from_cache() -> None:
    code, out, errors = await run("demo", "--json", environment={"OMP_NUM_THREADS": "2"})
    assert (code, "Traceback" in errors) == (0, False)
    requests = json.loads(out)["requests"]
    assert [request["status"] for request in requests] == ["finished"] * (NUM_LETTERS + NUM_FOLLOW_UPS)
    cached = [int(request["usage"].get("cached_prompt_tokens", 0)) for request in requests[NUM_LETTERS:]]
    assert min(cached) > 0
    assert "Paris" in requests[0]["choices"][0]["text"]


@pytest.mark.model
async def test_generate_answers_with_the_real_model() -> None:
    code, out, errors = await run(
        "generate", "What is the capital of France?", "--max-tokens", "8", "--model", str(model_dir())
    )
    assert (code, errors) == (0, "")
    assert out.startswith("The capital of France is Paris")


async def test_ctrl_c_ends_generate_with_130_and_its_child(tiny_model_dir: Path) -> None:
    slow = values(tiny_model_dir, engine={"stand_in_tokens_per_s": 0.5})
    async with command("generate", "hello", *flags(slow)) as generate:
        child = await generate.child()
        generate.send(signal.SIGINT)
        code, _ = await generate.finish()
    assert (code, generate.errors.strip()) == (130, "")
    await gone(child)
