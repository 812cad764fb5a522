"""Every span, attribute, event, metric and log field name that Sluice gives out; other files spell none of them.

Pinned to OpenTelemetry semantic conventions 1.41 (`SCHEMA_URL`), the last release that holds `gen_ai.*`: the GenAI names have
moved to a repository of their own and are being renamed there, so a change of conventions is a change of this file.
RPC names are the release candidate's (`rpc.system.name`, a fully qualified `rpc.method`, `rpc.response.status_code`).
Knows no SDK. None of these may ever hold prompt or completion text.
"""

SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.0"
SCOPE = "sluice"

# Spans. A chat span is "chat <model>": `chat_span`. Kinds and parents: surfaces.md, "Traces".
SPAN_PROCESS = "process prompts"
SPAN_SEND_PROMPTS = "send prompts"
SPAN_SEND_RESULTS = "send results"
SPAN_COMMIT = "commit prompts"
SPAN_QUEUE = "queue"
SPAN_PREFILL = "prefill"
SPAN_DECODE = "decode"
RPC_SERVICE = "sluice.v1.Inference"

# Span events, on `decode` only.
EVENT_FIRST_TOKEN = "first_token"

# Attributes: general.
ERROR_TYPE = "error.type"
SERVICE_NAME = "service.name"
SERVICE_VERSION = "service.version"
SERVICE_INSTANCE_ID = "service.instance.id"

# Attributes: GenAI.
GEN_AI_OPERATION_NAME = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME = "gen_ai.provider.name"
GEN_AI_CONVERSATION_ID = "gen_ai.conversation.id"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE = "gen_ai.request.temperature"
GEN_AI_REQUEST_TOP_P = "gen_ai.request.top_p"
GEN_AI_REQUEST_TOP_K = "gen_ai.request.top_k"
GEN_AI_REQUEST_SEED = "gen_ai.request.seed"
GEN_AI_REQUEST_CHOICE_COUNT = "gen_ai.request.choice.count"
GEN_AI_RESPONSE_ID = "gen_ai.response.id"
GEN_AI_RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
GEN_AI_USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS = "gen_ai.usage.cache_read.input_tokens"
OPERATION_CHAT = "chat"
OPERATION_TEXT_COMPLETION = "text_completion"
PROVIDER = "sluice"

# Attributes: messaging.
MESSAGING_SYSTEM = "messaging.system"
MESSAGING_OPERATION_NAME = "messaging.operation.name"
MESSAGING_OPERATION_TYPE = "messaging.operation.type"
MESSAGING_DESTINATION_NAME = "messaging.destination.name"
MESSAGING_DESTINATION_PARTITION_ID = "messaging.destination.partition.id"
MESSAGING_CONSUMER_GROUP_NAME = "messaging.consumer.group.name"
MESSAGING_KAFKA_OFFSET = "messaging.kafka.offset"
MESSAGING_KAFKA_MESSAGE_TOMBSTONE = "messaging.kafka.message.tombstone"
MESSAGING_MESSAGE_CONVERSATION_ID = "messaging.message.conversation_id"
MESSAGING_MESSAGE_BODY_SIZE = "messaging.message.body.size"
MESSAGING_BATCH_MESSAGE_COUNT = "messaging.batch.message_count"
SYSTEM_KAFKA = "kafka"

# Attributes: RPC.
RPC_SYSTEM_NAME = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_RESPONSE_STATUS_CODE = "rpc.response.status_code"
SYSTEM_GRPC = "grpc"

# Attributes: of links (OpenTelemetry's OpenTracing compatibility).
OPENTRACING_REF_TYPE = "opentracing.ref_type"
REF_CHILD_OF = "child_of"

# Attributes: ours. Counts are whole numbers; times are in milliseconds where the name says so.
REQUEST_ID = "sluice.request.id"
LABEL = "sluice.label"
TRANSPORT = "sluice.transport"
TENANT = "sluice.tenant"  # a hash, never the name
EPOCH = "sluice.epoch"
ATTEMPT = "sluice.attempt"
QUEUE_DEPTH = "sluice.queue.depth"
RESUMED_TOKENS = "sluice.resumed_tokens"
PREFILL_TOKENS = "sluice.prefill.tokens"
PREFILL_CACHED_TOKENS = "sluice.prefill.cached_tokens"
PREFILL_CHUNKS = "sluice.prefill.chunks"
DECODE_STEPS = "sluice.decode.steps"
KV_BLOCKS = "sluice.kv.blocks"
PREEMPTIONS = "sluice.preemptions"
CHUNKS_WRITTEN = "sluice.chunks.written"
MESSAGES_SENT = "sluice.stream.messages"
HEARTBEATS_SENT = "sluice.stream.heartbeats"
DETACHED = "sluice.stream.detached"
TIMING_QUEUE_MS = "sluice.timing.queue_ms"
TIMING_TTFT_MS = "sluice.timing.ttft_ms"
TIMING_TPOT_MS = "sluice.timing.tpot_ms"
TIMING_TOTAL_MS = "sluice.timing.total_ms"

# Metrics, as Prometheus shows them (it adds _total to counters). GenAI durations are in seconds.
METRIC_REQUEST_DURATION = "gen_ai_server_request_duration"
METRIC_TIME_TO_FIRST_TOKEN = "gen_ai_server_time_to_first_token"
METRIC_TIME_PER_OUTPUT_TOKEN = "gen_ai_server_time_per_output_token"
METRIC_REQUESTS = "sluice_requests"
METRIC_REFUSALS = "sluice_refusals"
METRIC_QUEUE_DEPTH = "sluice_queue_depth"
METRIC_ADMITTED_REQUESTS = "sluice_admitted_requests"
METRIC_ADMITTED_TOKENS = "sluice_admitted_tokens"
METRIC_DEADLINE_MISSES = "sluice_deadline_misses"
METRIC_PROMPT_TOKENS = "sluice_prompt_tokens"
METRIC_CACHED_PROMPT_TOKENS = "sluice_cached_prompt_tokens"
METRIC_COMPLETION_TOKENS = "sluice_completion_tokens"
METRIC_RUNNING_SEQUENCES = "sluice_running_sequences"
METRIC_WAITING_SEQUENCES = "sluice_waiting_sequences"
METRIC_KV_BLOCKS = "sluice_kv_blocks"
METRIC_KV_WASTED_SLOTS = "sluice_kv_wasted_slots"
METRIC_PREFIX_QUERY_TOKENS = "sluice_prefix_query_tokens"
METRIC_PREFIX_HIT_TOKENS = "sluice_prefix_hit_tokens"
METRIC_PREEMPTIONS = "sluice_preemptions"
METRIC_STEP_DURATION = "sluice_step_duration_seconds"
METRIC_STEP_TOKENS = "sluice_step_tokens"
METRIC_ENGINE_DEATHS = "sluice_engine_deaths"
METRIC_ENGINE_RESTARTS = "sluice_engine_restarts"
METRIC_KAFKA_LAG = "sluice_kafka_lag"
METRIC_KAFKA_BACKLOG_S = "sluice_backlog_seconds"
METRIC_KAFKA_WINDOW = "sluice_kafka_window_used"
METRIC_KAFKA_INTAKE_TOKENS = "sluice_kafka_intake_tokens"
METRIC_KAFKA_PAUSED = "sluice_kafka_paused_partitions"
METRIC_KAFKA_RECORDS = "sluice_kafka_records"
METRIC_KAFKA_COMMITS = "sluice_kafka_commits"
METRIC_KAFKA_DEAD_LETTERS = "sluice_kafka_dead_letters"
METRIC_KAFKA_REDELIVERIES = "sluice_kafka_redeliveries"
METRIC_KAFKA_REBALANCES = "sluice_kafka_rebalances"
METRIC_KAFKA_FENCED = "sluice_kafka_fenced_transactions"
METRIC_KAFKA_DUPLICATES = "sluice_kafka_duplicate_prompts"
METRIC_KAFKA_HANDOVERS = "sluice_kafka_handovers"
METRIC_KAFKA_RETIRED = "sluice_kafka_retired_partitions"
METRIC_KAFKA_CONNECTED = "sluice_kafka_connected"
METRIC_STREAMS = "sluice_streams"
METRIC_STREAM_MESSAGES = "sluice_stream_messages"
METRIC_STREAM_MERGES = "sluice_stream_merged_deltas"
METRIC_SLOW_READERS = "sluice_slow_readers_ended"
METRIC_LOOP_LAG = "sluice_event_loop_lag_seconds"
METRIC_READY = "sluice_ready"

# Log fields. Those of `TEXT_LOG_FIELDS` are redacted unless logging.capture_content is on; `SECRET_LOG_WORDS` always are.
LOG_REQUEST_ID = "request_id"
LOG_LABEL = "label"
LOG_TENANT = "tenant"
LOG_TRANSPORT = "transport"
LOG_MODEL = "model"
LOG_CODE = "code"
LOG_TRACE_ID = "trace_id"
LOG_SPAN_ID = "span_id"
LOG_QUEUE_MS = "queue_ms"
LOG_TTFT_MS = "ttft_ms"
LOG_TPOT_MS = "tpot_ms"
LOG_TOTAL_MS = "total_ms"
LOG_PROMPT_TOKENS = "prompt_tokens"
LOG_CACHED_PROMPT_TOKENS = "cached_prompt_tokens"
LOG_COMPLETION_TOKENS = "completion_tokens"
LOG_FINISH_REASONS = "finish_reasons"
TEXT_LOG_FIELDS = frozenset(
    {"prompt", "text", "messages", "content", "completion", "choices", "stop", "token", "tokens", "token_ids", "value", "body"}
)
SECRET_LOG_WORDS = ("password", "secret", "authorization", "api_key", "apikey", "credential", "private_key", "cookie", "sasl")


def chat_span(model: str) -> str:
    """The name of the span around one generation, as the GenAI conventions form it."""
    return f"{OPERATION_CHAT} {model}"


def rpc_span(method: str) -> str:
    """The name of a SERVER span and its `rpc.method`: fully qualified, without a leading slash."""
    return f"{RPC_SERVICE}/{method}"
