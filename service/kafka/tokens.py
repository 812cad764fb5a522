"""OAuth tokens for OAUTHBEARER: from a file, read each time, or from a command, asked again once its answer is old.

Guarantees: a token is one word of printable ASCII, so that it can add nothing to the handshake that it travels in; neither it nor
what a failing command printed enters a message or a log. Connections made at the same time share one call of the command.
"""

import asyncio
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaError

COMMAND_TIMEOUT_S = 10.0
MAX_TOKEN_BYTES = 65_536


class TokenUnavailableError(KafkaError):
    """There is no token now. A `KafkaError`, so that clients try the connection again as they would after any other failure."""

    retriable = True


class TokenSource(AbstractTokenProvider):
    """Gives the present token to either client library. `clock` counts seconds."""

    def __init__(
        self,
        *,
        file: str = "",
        command: Sequence[str] = (),
        refresh_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`file`, or else `command` and its arguments; `refresh_s`: how long a token of the command is used."""
        self._file, self._command, self._refresh_s = file, tuple(command), refresh_s
        self._clock, self._wall = clock, wall
        self._lock = threading.Lock()
        self._kept: tuple[float, str] | None = None

    async def token(self) -> str:
        """For aiokafka. Raises `TokenUnavailableError`."""
        return await asyncio.to_thread(self.read)

    def librdkafka(self, config: str) -> tuple[str, float]:
        """The `oauth_cb` of confluent-kafka: the token and until when (seconds since the epoch) it is taken as good."""
        return self.read(), self._wall() + self._refresh_s

    def read(self) -> str:
        """The token. Blocks. Raises `TokenUnavailableError`."""
        if self._file:
            try:
                return _checked(Path(self._file).read_bytes(), f"kafka.sasl_oauth_token_file {self._file}")
            except OSError as error:
                raise TokenUnavailableError(
                    f"cannot read kafka.sasl_oauth_token_file {self._file}: {error.strerror}"
                ) from error
        with self._lock:
            now = self._clock()
            if self._kept is None or now - self._kept[0] >= self._refresh_s:
                self._kept = (now, self._ask())
            return self._kept[1]

    def _ask(self) -> str:
        name = f"kafka.sasl_oauth_token_command {self._command[0]}"
        try:
            done = subprocess.run(
                self._command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False
            )
        except OSError as error:
            raise TokenUnavailableError(f"{name} cannot be started: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise TokenUnavailableError(f"{name} printed no token within {COMMAND_TIMEOUT_S:g} s") from None
        if done.returncode != 0:
            raise TokenUnavailableError(f"{name} ended with exit status {done.returncode}")
        return _checked(done.stdout, name)


def _checked(raw: bytes, name: str) -> str:
    token = raw.strip()
    if not token or len(token) > MAX_TOKEN_BYTES or not all(0x21 <= byte <= 0x7E for byte in token):
        raise TokenUnavailableError(f"{name} gives no token: one word of printable ASCII is wanted")
    return token.decode("ascii")
