"""Every setting of the service: one TOML file, then environment, then flags; unknown keys are refused by name.

`SLUICE_<SECTION>__<FIELD>` overrides the file; a command's flags override both. `deploy/sluice.toml` lists every field with
its default and explanation, and a test keeps it true. Defaults and their reasons stand at the fields.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from engine import EngineConfig
from service.addresses import fault_of
from service.config_base import Section as Section
from service.config_kafka import KafkaSection as KafkaSection
from service.errors import SetupError

T = TypeVar("T")
ENV_PREFIX = "SLUICE_"
# What Kubernetes tells every pod of a service called sluice-grpc: SLUICE_GRPC_PORT=tcp://10.0.0.1:50051 and its like.
_OF_KUBERNETES = re.compile(r".*_(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP))(_.*)?=.*|.*_PORT=(tcp|udp|sctp)://.*", re.DOTALL)


def _not_built(what: str) -> AfterValidator:
    """Refuses what would be passed over in silence; the field stays, so that files stay valid."""

    def refuse(value: T) -> T:
        if value:
            raise PydanticCustomError("not_built", "{what} not built yet; leave it out", {"what": what})
        return value

    return AfterValidator(refuse)


def cache_dir() -> Path:
    """Where models, test servers and builds are kept between runs: $SLUICE_CACHE, else ~/.cache/sluice."""
    return Path(os.environ.get("SLUICE_CACHE") or Path.home() / ".cache" / "sluice").expanduser()


class ModelSection(Section):
    """What is served."""

    path: str = ""
    """A Hugging Face directory (config.json, tokenizer.json, *.safetensors). Empty: the demo's model, as `make` sets it up."""

    name: str = ""
    """The name that callers use; empty: the directory's name."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and KV cache; `auto` is the checkpoint's own."""

    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """`dummy` makes random weights of the directory's shape, for benchmarks."""

    max_tokens_cap: int = Field(default=2048, ge=1)
    """max_tokens of a request that names none is at most this, so that one forgotten limit does not hold a slot for a whole context."""


class EngineSection(Section):
    """The engine child. Meanings and reasons: engine/config.py."""

    kind: Literal["paged", "stand-in"] = "paged"
    """`stand-in` says a deterministic function of (prompt, seed, position) without a model: for fault and throughput tests."""

    device: str = "auto"
    """`auto`: the first CUDA or ROCm device, else the CPU."""

    quantize: Literal["", "int8", "int4"] = ""
    """Store a plain checkpoint's weights in 8 or 4 bits when it is loaded, on a CPU: faster and smaller, not quite the same model."""

    screen_head: bool = True
    """Keep a plain head in 8 bits as well, on a CPU: greedy tokens, the very same ones, come sooner. A byte for each of its weights."""

    cpu_isa: Literal["auto", "torch", "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"] = "auto"
    """What computes on a CPU. `auto`: C++ operators with the best instruction set, built once; `torch`: plain torch, nothing built."""

    attention_backend: str = "auto"
    """`auto`: Triton on CUDA and ROCm; the C++ operators, else plain torch, on a CPU."""

    max_model_len: int = Field(default=0, ge=0)
    """Context in tokens; 0: the model's own, at most what the KV cache can hold."""

    block_size: int = Field(default=16, ge=1, le=256)
    """Tokens in a KV block."""

    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """`auto`: the model's. `int8`: keys and values in 8 bits, on a CPU: nearly twice the tokens in as many bytes of bfloat16, faster over
    long contexts, not quite the same model."""

    num_blocks: int = Field(default=0, ge=0)
    """Blocks in the pool; 0: from kv_cache_bytes."""

    kv_cache_bytes: int = Field(default=0, ge=0)
    """Memory for the KV cache in bytes; 0: 1 GiB on a CPU (half of all memory at most), 90 % of what is free on a GPU."""

    max_num_seqs: int = Field(default=64, ge=1, le=65_536)
    """Sequences that run at once."""

    preferred_num_seqs: int = Field(default=0, ge=0)
    """Sequences up to which a newcomer runs at once. With so many running, one more makes the tokens of all of them slower in proportion:
    it waits max_queue_delay_ms at most for one of them to end, which makes the slowest requests of a busy hour faster and first tokens
    of a rush later. 0: 16 on a CPU, max_num_seqs (nobody waits for that) on a GPU."""

    max_queue_delay_ms: int = Field(default=300, ge=0)
    """Most that a newcomer waits so; 0: not at all. A backlog that has waited longer fills max_num_seqs."""

    max_num_waiting: int = Field(default=1024, ge=1)
    """Sequences that may wait inside the engine."""

    max_num_batched_tokens: int = Field(default=512, ge=1)
    """Token budget of a step: bounds the gap that a prefill makes between others' tokens. A GPU is busy from some 2,000 on."""

    max_prefill_chunk: int = Field(default=0, ge=0)
    """One request's share of a step in prefill tokens; 0: the whole budget."""

    enable_prefix_cache: bool = True
    """Compute blocks of equal prefixes once (per tenant)."""

    overlap: Literal["auto", "on", "off"] = "auto"
    """Decide and launch the next step before this one's tokens are known; `auto`: on a GPU, and for greedy decodes on a CPU with two
    threads or more."""

    policy: Literal["fcfs", "priority"] = "fcfs"
    """Who runs next."""

    watermark: float = Field(default=0.01, ge=0, lt=0.5)
    """Share of the pool kept back when a waiting sequence is let in."""

    num_threads: int = Field(default=0, ge=0, le=1_024)
    """Compute threads on a CPU; 0: the cores that the process may use, by affinity and cgroup quota. How long they look for work
    before they sleep is OpenMP's setting: GOMP_SPINCOUNT (3000 rounds unless set) and OMP_WAIT_POLICY reach the engine from the
    service's environment."""

    pin_threads: bool = False
    """Keep each compute thread on a core of its own: for machines that nothing else uses."""

    nice: int = Field(default=5, ge=0, le=19)
    """POSIX nice value of an engine on a CPU: above 0 the service, and what else runs in the same container or session, gets a core
    sooner, and tokens reach their readers earlier; 0 where the engine competes with work that matters less."""

    stand_in_tokens_per_s: float = Field(default=0.0, ge=0)
    """Pace of one stand-in sequence; 0: as fast as it can."""

    stand_in_step_tokens: int = Field(default=1, ge=1)
    """Most tokens of one stand-in sequence in a step, as an engine that drafts would say."""

    stand_in_max_model_len: int = Field(default=8192, ge=1)
    """Context that the stand-in claims."""

    start_timeout_s: float = Field(default=600.0, gt=0)
    """A child that is not ready by then is killed and started again; loading a large checkpoint from a slow disk takes minutes."""

    hang_timeout_s: float = Field(default=30.0, gt=0)
    """A child that has work and completes no step for this long is killed and started again. A step is bounded by the token budget."""

    max_restarts: int = Field(default=5, ge=0)
    """Restarts within restart_window_s before the service gives up and reports itself not alive."""

    restart_window_s: float = Field(default=300.0, gt=0)
    """The window of max_restarts."""


class GrpcSection(Section):
    """The gRPC server."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 in a container."""

    port: int = Field(default=50051, ge=0, le=65_535)
    """0: any free one (printed at start)."""

    max_message_bytes: int = Field(default=4_194_304, ge=1_024)
    """Largest message in either direction."""

    stream_buffer_bytes: int = Field(default=262_144, ge=4_096)
    """What a slow reader may leave unread before deltas are merged."""

    slow_reader_timeout_s: float = Field(default=30.0, gt=0)
    """A reader that takes nothing for this long is ended with RESOURCE_EXHAUSTED."""

    coalesce_ms: int = Field(default=20, ge=0)
    """After the first token, tokens that come within this time share a message. Tokens leave the engine for Kafka at this pace, too."""

    heartbeat_s: float = Field(default=15.0, gt=0)
    """A silent stream says so this often."""

    keepalive_s: float = Field(default=30.0, gt=0)
    """HTTP/2 ping interval that finds dead peers."""

    trusted_tenant_metadata: bool = False
    """Believe the sluice-tenant metadata: only behind something that sets it from an identity."""


class HttpSection(Section):
    """The OpenAI-compatible server (not built yet: reserved so that files stay valid)."""

    enabled: Annotated[bool, _not_built("the HTTP routes are")] = False
    """Only false today."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: int = Field(default=8000, ge=0, le=65_535)
    """Port to listen on."""


class AdminSection(Section):
    """Health and metrics over HTTP."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 in a container."""

    port: int = Field(default=9464, ge=0, le=65_535)
    """/livez, /readyz and /metrics; 0: any free one."""

    drain_grace_s: float = Field(default=30.0, ge=0)
    """After SIGTERM running requests may finish for this long."""


class TracingSection(Section):
    """Spans to Jaeger or any OTLP collector."""

    otlp_endpoint: str = ""
    """host:port of an OTLP gRPC endpoint, e.g. 127.0.0.1:4317; https:// before it: over TLS. Empty: no spans, no cost."""

    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of traces kept that start here; a producer's own decision is followed."""

    service_name: str = "sluice"
    """service.name of the resource."""

    engine_step_every: Annotated[int, _not_built("spans of engine steps are")] = Field(default=0, ge=0)
    """One engine step in N becomes a span of its own trace with links to its requests. Only 0 (none) today."""

    capture_content: Annotated[bool, _not_built("texts on spans are")] = False
    """Put prompt and completion text on spans. Only false today."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_an_address(cls, endpoint: str) -> str:
        if endpoint and (fault := fault_of(endpoint.removeprefix("http://").removeprefix("https://"))):
            raise PydanticCustomError("address", "{fault}", {"fault": fault})
        return endpoint


class LoggingSection(Section):
    """Structured logs on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged."""

    format: Literal["auto", "json", "console"] = "auto"
    """`auto`: console on a terminal, JSON elsewhere."""

    capture_content: bool = False
    """Let prompt and completion text into log lines. Off unless you mean it."""


class AdmissionSection(Section):
    """Who enters, and when."""

    max_requests: int = Field(default=256, ge=1)
    """Requests admitted and unfinished over all transports; more are refused with `overloaded` (Kafka waits instead)."""

    max_tokens: int = Field(default=262_144, ge=1)
    """Their prompt + max_tokens summed; bounds the wait as much as the memory."""

    max_prompt_bytes: int = Field(default=1_000_000, ge=1)
    """Longest prompt text taken for tokenisation."""


class Settings(BaseSettings):
    """The whole configuration. Build it with `load`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    kafka: KafkaSection = KafkaSection()
    grpc: GrpcSection = GrpcSection()
    http: HttpSection = HttpSection()
    admin: AdminSection = AdminSection()
    tracing: TracingSection = TracingSection()
    logging: LoggingSection = LoggingSection()
    admission: AdmissionSection = AdmissionSection()

    def engine_config(self, model_dir: str) -> EngineConfig:
        """The engine's own settings; `model_dir` as it was resolved. Raises `engine.EngineError` that names the field."""
        engine = self.engine.model_dump(exclude={"start_timeout_s", "hang_timeout_s", "max_restarts", "restart_window_s"})
        return EngineConfig(model_dir=model_dir, dtype=self.model.dtype, load_format=self.model.load_format, **engine)


def load(file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Reads `file`, then the environment, then `overrides` ({"section": {"field": value}}), each over the one before.

    Raises `SetupError` (exit code 2) that names every key at fault, where it came from and the nearest known key.
    """
    if file is not None:
        _check_file(file)
    _check_environment()

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            toml = (TomlConfigSettingsSource(settings_cls, toml_file=file),) if file is not None else ()
            return (init_settings, env_settings, *toml)

    try:
        return Loaded(**(overrides or {}))
    except ValidationError as error:
        lines = [_explain(item["loc"], item["type"], item["msg"]) for item in error.errors()]
        raise SetupError("the configuration is not valid:\n" + "\n".join(f"  {line}" for line in lines)) from error


def _check_file(file: Path) -> None:
    try:
        tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"cannot read {file}: {error.strerror}; name a file with --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{file} is not valid TOML: {error}") from error


def _check_environment() -> None:
    # pydantic-settings reads the variables that it knows and passes over the rest: a misspelt one would be lost in silence.
    for name, value in os.environ.items():
        if not name.upper().startswith(ENV_PREFIX):
            continue
        section, nested, field_name = name[len(ENV_PREFIX) :].lower().partition("__")
        if nested:
            fault = _field_fault(section, field_name, value)
        elif section in Settings.model_fields:
            fault = "" if _is_json(value) else 'a whole section is written as JSON, as {"field": 1}'
        else:
            fault = "" if _OF_KUBERNETES.fullmatch(f"{name.upper()}={value}") else _underscore_fault(section)
        if fault:
            raise SetupError(f"environment variable {name}: {fault}")


def _field_fault(section: str, field_name: str, value: str) -> str:
    if section not in Settings.model_fields or field_name not in _section_type(section).model_fields:
        return _explain((section, field_name), "extra_forbidden", "")
    is_list = get_origin(_section_type(section).model_fields[field_name].annotation) is tuple
    return 'a list is written as JSON, as ["one", "two"]' if is_list and not _is_json(value) else ""


def _underscore_fault(name: str) -> str:
    # SLUICE_CACHE and others that begin with no section are not of the configuration.
    section, _, field_name = name.partition("_")
    if section not in Settings.model_fields:
        return ""
    near = difflib.get_close_matches(field_name, _section_type(section).model_fields, n=1) or ["<field>"]
    return f"two underscores follow the section; did you mean {ENV_PREFIX}{section.upper()}__{near[0].upper()}?"


def _is_json(value: str) -> bool:
    try:
        json.loads(value)
    except ValueError:
        return False
    return True


def _section_type(section: str) -> type[Section]:
    annotation = Settings.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    path = ".".join(str(part) for part in location)
    if kind != "extra_forbidden":
        return f"{path}: {message[:1].lower()}{message[1:]}"
    known = [
        section if len(location) == 1 else f"{section}.{name}"
        for section in Settings.model_fields
        for name in _section_type(section).model_fields
    ]
    near = difflib.get_close_matches(path, known, n=1)
    return f"{path}: unknown key" + (f"; did you mean {near[0]}?" if near else "; `sluice config show` lists every key")
