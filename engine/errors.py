"""Every error that the engine raises on purpose: a code from the product's one list, whether a retry can help, and what to do.

Knows nothing of gRPC, HTTP or Kafka; `service/errors.py` maps the codes to each surface.
"""

from typing import ClassVar


class EngineError(Exception):
    """What a caller, a checkpoint or the device caused. `str(error)` is safe to show: it holds no prompt text."""

    code: ClassVar[str] = "engine_failed"
    retriable: ClassVar[bool] = True

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidFieldError(EngineError, ValueError):
    """A field holds what can never be served; `field` is its path in the request."""

    code = "invalid_field"
    retriable = False

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message, field=field)

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class PromptTooLongError(EngineError):
    """The prompt alone leaves no room for a token in the model's context."""

    code = "prompt_too_long"
    retriable = False


class TooManyTokensError(EngineError):
    """prompt + max_tokens can never fit in the block pool, however empty it is (invariant I7)."""

    code = "too_many_tokens"
    retriable = False


class EngineFullError(EngineError):
    """The engine's own bounded queue is full: the service's admission let too much in."""

    code = "overloaded"


class OutOfMemoryError(EngineError):
    """The device had no memory for a step, also after the caches were dropped and the step shrunk."""

    code = "out_of_memory"


class ConfigError(EngineError):
    """The engine cannot run with this configuration; `field` names the setting."""

    code = "invalid_field"
    retriable = False


class CheckpointError(EngineError):
    """A model directory cannot be loaded: names the file, the tensor where there is one, and the reason."""

    retriable = False

    def __init__(self, file: str, reason: str, *, tensor: str = "") -> None:
        where = f"{file}: tensor {tensor}" if tensor else file
        super().__init__(f"{where}: {reason}")
        self.file = file
        self.tensor = tensor
        self.reason = reason


class FrameError(EngineError):
    """Bytes on the engine's socket that are no valid frame: the stream cannot be trusted after it."""

    retriable = False
