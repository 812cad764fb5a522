"""The engine's public face: what a caller sends, what comes back, and `Engine` itself.

`Engine` is given lazily: a process that only talks to an engine child never imports torch.
"""

from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import CheckpointError, EngineError, InvalidFieldError
from engine.output import (
    EngineFacts,
    EngineFailure,
    EngineProgress,
    FinishReason,
    PlainTokens,
    SequenceFacts,
    StepOutput,
    StepStats,
    TokenLogprobs,
    TokenOutput,
)
from engine.request import Request, SamplingParams

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.loading.gguf import import_gguf

__all__ = [
    "CheckpointError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineFacts",
    "EngineFailure",
    "EngineProgress",
    "FinishReason",
    "InvalidFieldError",
    "PlainTokens",
    "Request",
    "SamplingParams",
    "SequenceFacts",
    "StepOutput",
    "StepStats",
    "TokenLogprobs",
    "TokenOutput",
    "import_gguf",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from engine.engine import Engine

        return Engine
    if name == "import_gguf":
        from engine.loading.gguf import import_gguf

        return import_gguf
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
