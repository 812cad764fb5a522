"""`sluice topics create|check`: the topics on a cluster, and whether they fit together."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

import typer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from rich.markup import escape

from service.cli import output
from service.cli.kafka import OnBrokers, connected
from service.cli.options import grouped
from service.config import Settings
from service.errors import SetupError
from service.kafka import topic_check, topics
from service.kafka.budget import QueueClass
from service.kafka.connection import Connection
from service.kafka.topic_check import TopicReport
from service.kafka.topics import Topics

app = typer.Typer(no_args_is_help=True, help="Create or check the topics.")


@app.command()
@grouped
def create(
    common: OnBrokers,
    partitions: Annotated[
        int | None, typer.Option("--partitions", min=1, help="The most replicas that can share the work.", show_default=False)
    ] = None,
    replication_factor: Annotated[
        int | None, typer.Option("--replication-factor", help="-1: three, or as many as there are brokers.", show_default=False)
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="A class to make a topic for, too; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Create the topics that are missing; those that exist stay as they are."""
    settings = common.settings({"kafka": {"partitions": partitions, "replication_factor": replication_factor}})
    created = asyncio.run(_create(settings, _known(classes or ())))
    if common.as_json:
        output.print_json({"created": list(created)})
    elif created:
        output.out.print(f"created {', '.join(created)}")
    else:
        output.out.print("every topic exists already")


@app.command()
@grouped
def check(
    common: OnBrokers,
    longest_deadline: Annotated[
        int, typer.Option("--longest-deadline", min=1, help="Seconds that a prompt may wait; retention must be longer.")
    ] = 3600,
) -> None:
    """Compare the cluster with what Sluice needs (topics, copies, retention, rights); exit 1 when prompts cannot be served whole."""
    settings = common.settings()
    report = asyncio.run(_check(settings, longest_deadline * 1_000))
    if common.as_json:
        findings = [{"level": f.level, "topic": f.topic, "message": f.message} for f in report.findings]
        output.print_json({"ok": report.ok, "partitions": dict(report.partitions), "findings": findings})
    else:
        for name, count in sorted(report.partitions.items()):
            output.out.print(f"[dim]{escape(name)}: {count} partitions[/]")
        for finding in report.findings:
            colour = "red" if finding.level == "error" else "yellow"
            output.out.print(f"[{colour}]{finding.level}[/] {escape(finding.topic)} {escape(finding.message)}")
        if report.ok:
            output.out.print("[green]the topics fit[/]")
    if not report.ok:
        raise typer.Exit(1)


def _known(classes: Sequence[str]) -> tuple[QueueClass, ...]:
    for name in classes:
        if name not in topics.CLASSES:
            raise SetupError(f"--class {name}: no such class; those there are: {', '.join(topics.CLASSES)}")
    return tuple(name for name in topics.CLASSES if name in classes)


async def _create(settings: Settings, classes: Sequence[QueueClass]) -> tuple[str, ...]:
    kafka = settings.kafka
    async with _admin(settings) as admin:
        return await topics.create(
            admin,
            Topics(kafka.topic_prefix),
            partitions=kafka.partitions,
            replication_factor=kafka.replication_factor,
            classes=classes,
        )


async def _check(settings: Settings, longest_deadline_ms: int) -> TopicReport:
    async with _admin(settings) as admin:
        connection = Connection(settings.kafka)
        return await topic_check.check(admin, connection, settings.kafka, longest_deadline_ms=longest_deadline_ms)


@asynccontextmanager
async def _admin(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**Connection(settings.kafka).aiokafka())
    async with connected(admin, admin.close, settings):
        try:
            yield admin
        except KafkaError as error:
            raise SetupError(
                f"the broker refused: {error}; `sluice topics check` shows what is not allowed", exit_code=1
            ) from error
