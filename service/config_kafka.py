"""The settings of the Kafka transport."""

from pydantic import Field

from service.config_base import Section


class KafkaSection(Section):
    """Prompts in, chunks and results out."""

    enabled: bool = True
    """Without it Sluice serves gRPC alone."""

    bootstrap_servers: str = "127.0.0.1:19092"
    """Comma-separated host:port."""

    embedded: bool = False
    """Start librdkafka's in-process broker on bootstrap_servers' port. In memory, at-least-once, not durable: for a first try."""

    group_id: str = "sluice"
    """Consumer group: replicas with the same group share the prompts."""

    topic_prefix: str = "sluice."
    """Topics are <prefix>prompts, results, chunks, dlq and control."""

    partitions: int = Field(default=6, ge=1)
    """Of topics that `sluice topics create` makes: the most replicas that can share the work."""

    replication_factor: int = Field(default=-1, ge=-1)
    """Of topics that `sluice topics create` makes; -1: three, or as many as there are brokers."""

    create_topics: bool = False
    """Create missing topics at start, as `sluice topics create` does."""

    session_timeout_ms: int = Field(default=10_000, ge=1_000)
    """A replica that is silent for this long loses its partitions."""

    heartbeat_interval_ms: int = Field(default=1_000, ge=100)
    """How often a replica speaks to the group; also how fast others learn of a change."""

    max_poll_records: int = Field(default=64, ge=1)
    """Records taken from one partition at a time."""

    max_partition_fetch_bytes: int = Field(default=1_048_576, ge=1_024)
    """Small, since a pause throws fetched data away."""

    window_offsets: int = Field(default=8_192, ge=16, le=16_384)
    """Offsets of a partition between the oldest unfinished and the newest taken; the done-bits must fit in the commit's 4 KiB metadata."""

    intake_high_tokens: int = Field(default=65_536, ge=1)
    """Estimated tokens taken and unfinished above which taking stops."""

    intake_low_tokens: int = Field(default=32_768, ge=0)
    """Below it taking goes on; wide apart, since pausing costs a fetch."""

    commit_interval_ms: int = Field(default=50, ge=5)
    """Results are flushed and offsets committed this often, sooner when idle."""

    chunk_interval_ms: int = Field(default=50, ge=1)
    """A chunk record is written at once for the first token, then when this time has passed …"""

    chunk_max_tokens: int = Field(default=16, ge=1)
    """… or this many tokens have gathered."""

    chunks_enabled: bool = True
    """Write tokens to the chunk topic as they are made."""

    max_result_bytes: int = Field(default=1_000_000, ge=1_024)
    """Largest result record; a larger one drops logprobs, then becomes result_too_large."""

    trusted_tenant_header: bool = False
    """Believe the sluice-tenant header: only where the topic is protected by ACLs."""
