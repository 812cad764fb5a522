"""The settings of the Kafka transport."""

from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from service.addresses import fault_of
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

    instance_id: str = Field(default="", max_length=200)
    """A name that this replica keeps over restarts (a StatefulSet's pod name): back within session_timeout_ms it has its partitions
    again, and no other replica is disturbed. Empty: partitions are shared out anew at once when it stops."""

    delivery: Literal["auto", "exactly_once", "at_least_once"] = "auto"
    """`auto` tries at start whether the broker fences producers and hides aborted records, and says what it found. `at_least_once`
    needs no transactions: a crash may repeat a terminal record."""

    topic_prefix: str = "sluice."
    """Topics are <prefix>prompts, results, chunks, dlq and control."""

    partitions: int = Field(default=6, ge=1)
    """Of topics that `sluice topics create` makes: the most replicas that can share the work."""

    replication_factor: int = Field(default=-1, ge=-1)
    """Of topics that `sluice topics create` makes; -1: three, or as many as there are brokers."""

    create_topics: bool = False
    """Create missing topics at start, as `sluice topics create` does."""

    topic_refresh_ms: int = Field(default=10_000, ge=500)
    """The brokers are asked for their topics this often: a topic of a class that comes or goes is noticed at the second asking."""

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

    topic_tenants: tuple[str, ...] = ()
    """Whose the prompts of a topic are, where no header is believed or none is there: "topic=tenant" each. Tenants share room fairly."""

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How to reach the brokers, in Kafka's words. Credentials over SASL_PLAINTEXT can be read on the way."""

    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = "SCRAM-SHA-512"
    """How to say who this is, with a SASL_ protocol."""

    sasl_username: str = ""
    """For PLAIN and SCRAM."""

    sasl_password: SecretStr = SecretStr("")
    """For PLAIN and SCRAM; better from the environment (SLUICE_KAFKA__SASL_PASSWORD) or from sasl_password_file than in this file."""

    sasl_password_file: str = ""
    """A file that holds the password alone, as a mounted secret; read anew for each client, so that it may be rotated."""

    sasl_oauth_token_file: str = ""
    """For OAUTHBEARER: a file that holds the token; read anew at each connection."""

    sasl_oauth_token_command: tuple[str, ...] = ()
    """For OAUTHBEARER, instead of a file: a program and its arguments (no shell) that prints the token within 10 s."""

    sasl_oauth_refresh_s: float = Field(default=60.0, gt=0)
    """A token that the command printed is used for this long; less than a token lives."""

    ssl_ca: str = ""
    """PEM file of the authorities that brokers' certificates must come from; empty: the system's. Host names are always checked."""

    ssl_certificate: str = ""
    """PEM file of this client's certificate and its chain (mutual TLS)."""

    ssl_key: str = ""
    """PEM file of its private key."""

    ssl_key_password: SecretStr = SecretStr("")
    """Of ssl_key, when it is encrypted; better from the environment (SLUICE_KAFKA__SSL_KEY_PASSWORD)."""

    @field_validator("bootstrap_servers")
    @classmethod
    def _each_is_an_address(cls, servers: str) -> str:
        for address in servers.split(","):
            # 0: the embedded broker takes any free port.
            if fault := fault_of(address.strip(), least_port=0):
                raise PydanticCustomError("address", "{fault}", {"fault": fault})
        return servers

    @model_validator(mode="after")
    def _security_is_whole(self) -> Self:
        if fault := _security_fault(self):
            raise PydanticCustomError("security", "{fault}", {"fault": fault})
        return self

    @field_validator("topic_tenants")
    @classmethod
    def _each_names_both(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        named: dict[str, str] = {}
        for pair in pairs:
            topic, _, tenant = pair.partition("=")
            if not (topic and tenant):
                raise PydanticCustomError("pair", "{pair}: write it as topic=tenant", {"pair": pair})
            if topic in named:
                fault = "{pair}: {topic} has been given to {tenant} already; name each topic once"
                raise PydanticCustomError("pair", fault, {"pair": pair, "topic": topic, "tenant": named[topic]})
            named[topic] = tenant
        return pairs

    def tenant_of(self, topic: str) -> str:
        """The tenant whose prompts a topic holds; "" when it is nobody's in particular."""
        return next((pair[len(topic) + 1 :] for pair in self.topic_tenants if pair.startswith(f"{topic}=")), "")


def _security_fault(section: KafkaSection) -> str:
    """What of the security settings is missing, doubled, or would be passed over in silence; "" when they fit together."""
    tls, sasl = section.security_protocol.endswith("SSL"), section.security_protocol.startswith("SASL")
    password = bool(section.sasl_password.get_secret_value())
    if section.embedded and section.security_protocol != "PLAINTEXT":
        return "security_protocol must be PLAINTEXT with the embedded broker"
    if not tls and (section.ssl_ca or section.ssl_certificate or section.ssl_key):
        return f"ssl_ca, ssl_certificate and ssl_key are of no use with security_protocol {section.security_protocol}"
    if bool(section.ssl_certificate) != bool(section.ssl_key):
        return "ssl_certificate and ssl_key go together"
    if section.ssl_key_password.get_secret_value() and not section.ssl_key:
        return "ssl_key_password is of no use without ssl_key"
    if password and section.sasl_password_file:
        return "sasl_password and sasl_password_file are both set; set one"
    if section.sasl_oauth_token_file and section.sasl_oauth_token_command:
        return "sasl_oauth_token_file and sasl_oauth_token_command are both set; set one"
    secrets = password or section.sasl_username or section.sasl_password_file
    tokens = section.sasl_oauth_token_file or section.sasl_oauth_token_command
    if not sasl:
        unused = f"sasl_ settings are of no use with security_protocol {section.security_protocol}; set SASL_SSL"
        return unused if secrets or tokens else ""
    if section.sasl_mechanism == "OAUTHBEARER":
        return "" if tokens else "sasl_mechanism OAUTHBEARER needs sasl_oauth_token_file or sasl_oauth_token_command"
    if not (section.sasl_username and (password or section.sasl_password_file)):
        return f"sasl_mechanism {section.sasl_mechanism} needs sasl_username and sasl_password_file (or sasl_password)"
    return ""
