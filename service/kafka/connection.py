"""How every Kafka client of Sluice reaches the cluster: the one place that turns the security settings into client arguments.

Guarantees: settings that cannot work (a file that is missing or is no PEM) are found when a `Connection` is made, by name; secrets
go to the clients alone. Files are read anew for each client, so that passwords and certificates may be rotated under a running
service: one that has become unreadable is reported, and what was read last goes on being used.
"""

import asyncio
import os
import ssl
from pathlib import Path
from typing import Any

import structlog
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError, KafkaError, SaslAuthenticationFailed
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.metadata import MetadataRequest

from service.config import KafkaSection
from service.errors import SetupError
from service.kafka.tokens import TokenSource, TokenUnavailableError

_log = structlog.get_logger(__name__)

_EXPLAIN_TIMEOUT_MS = 5_000
_CLOSE_TIMEOUT_S = 1.0


class Connection:
    """The arguments of every client, for both client libraries."""

    def __init__(self, section: KafkaSection, bootstrap: str = "") -> None:
        """`bootstrap`: instead of the section's. Raises `SetupError` that names the setting."""
        self.bootstrap = bootstrap or section.bootstrap_servers
        self._section = section
        self._sasl = section.security_protocol.startswith("SASL")
        self._tls = section.security_protocol.endswith("SSL")
        self._tokens = TokenSource(
            file=section.sasl_oauth_token_file,
            command=section.sasl_oauth_token_command,
            refresh_s=section.sasl_oauth_refresh_s,
        )
        self._read = self._arguments()

    def aiokafka(self) -> dict[str, Any]:
        """For AIOKafkaConsumer, AIOKafkaProducer and AIOKafkaAdminClient, `bootstrap_servers` among them."""
        try:
            self._read = self._arguments()
        except SetupError as error:
            _log.warning("a Kafka client goes on with the credentials that were read last", reason=str(error))
        return dict(self._read)

    def librdkafka(self) -> dict[str, Any]:
        """For confluent-kafka's clients, `bootstrap.servers` among them. Its own log lines are off: errors come as exceptions."""
        section, arguments = self._section, self.aiokafka()
        found: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap,
            "security.protocol": section.security_protocol,
            "log_level": 0,
        }
        if self._tls:
            found |= {
                "ssl.ca.location": section.ssl_ca or None,
                "ssl.certificate.location": section.ssl_certificate or None,
                "ssl.key.location": section.ssl_key or None,
                "ssl.key.password": section.ssl_key_password.get_secret_value() or None,
            }
        if self._sasl:
            found["sasl.mechanism"] = section.sasl_mechanism
            if section.sasl_mechanism == "OAUTHBEARER":
                found["oauth_cb"] = self._tokens.librdkafka
            else:
                found |= {
                    "sasl.username": section.sasl_username,
                    "sasl.password": arguments["sasl_plain_password"],
                }
        return {name: value for name, value in found.items() if value is not None}

    async def explain(self) -> str:
        """Why no broker lets this client in, in words that say what to set; "" when one does. Takes a few seconds at most a broker."""
        reasons = []
        for address in self.bootstrap.split(","):
            host, _, port = address.strip().rpartition(":")
            if not (host and port.isdigit()):
                return f"kafka.bootstrap_servers {address.strip()}: write it as host:port"
            arguments = self.aiokafka()
            del arguments["bootstrap_servers"]
            connection = AIOKafkaConnection(
                host.strip("[]"), int(port), request_timeout_ms=_EXPLAIN_TIMEOUT_MS, max_idle_ms=None, **arguments
            )
            try:
                await connection.connect()
                # A listener that wants credentials, or a token that it refused, shows at the first request that needs them.
                if not (await connection.send(MetadataRequest([]))).brokers:
                    raise SaslAuthenticationFailed("an answer for strangers")
            except (KafkaError, OSError, ValueError) as error:
                reasons.append(f"{address.strip()} {self._reason(error)}")
            else:
                return ""
            finally:
                if (closed := connection.close()) is not None:
                    await asyncio.wait({closed}, timeout=_CLOSE_TIMEOUT_S)
        return "; ".join(reasons)

    def _reason(self, error: Exception) -> str:
        section = self._section
        if isinstance(error, TokenUnavailableError):
            return str(error)
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"shows a certificate that kafka.ssl_ca does not vouch for ({error.verify_message})"
        if isinstance(error, ssl.SSLError):
            return f"does not agree on TLS ({error.reason or error}): is its listener a TLS one? see kafka.security_protocol"
        if isinstance(error, KafkaConnectionError | ConnectionError) and not isinstance(error, ConnectionRefusedError):
            or_certificate = " or a client certificate (kafka.ssl_certificate)" if self._tls else ""
            protocol = section.security_protocol
            return f"closed the connection: it may want another kafka.security_protocol than {protocol}{or_certificate}"
        if isinstance(error, SaslAuthenticationFailed):
            by_token = section.sasl_mechanism == "OAUTHBEARER"
            return "refused the token" if by_token else f"refused kafka.sasl_username {section.sasl_username} or its password"
        if isinstance(error, KafkaError):
            return f"does not take kafka.sasl_mechanism {section.sasl_mechanism} ({type(error).__name__})"
        if isinstance(error, TimeoutError):
            return "does not answer in time"
        number = getattr(error, "errno", None) or 0
        return f"cannot be reached ({os.strerror(number) if number > 0 else error})"

    def _arguments(self) -> dict[str, Any]:
        section = self._section
        found: dict[str, Any] = {"bootstrap_servers": self.bootstrap, "security_protocol": section.security_protocol}
        if self._tls:
            found["ssl_context"] = self._ssl_context()
        if not self._sasl:
            return found
        found["sasl_mechanism"] = section.sasl_mechanism
        if section.sasl_mechanism == "OAUTHBEARER":
            return found | {"sasl_oauth_token_provider": self._tokens}
        return found | {"sasl_plain_username": section.sasl_username, "sasl_plain_password": self._password()}

    def _password(self) -> str:
        section = self._section
        if not section.sasl_password_file:
            return section.sasl_password.get_secret_value()
        try:
            password = Path(section.sasl_password_file).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8"
            raise SetupError(f"kafka.sasl_password_file {section.sasl_password_file} cannot be read: {reason}") from None
        if not password:
            raise SetupError(f"kafka.sasl_password_file {section.sasl_password_file} is empty")
        return password

    def _ssl_context(self) -> ssl.SSLContext:
        section = self._section
        for name in ("ssl_ca", "ssl_certificate", "ssl_key"):
            file = getattr(section, name)
            try:
                if file:
                    Path(file).read_bytes()
            except OSError as error:
                raise SetupError(f"kafka.{name} {file} cannot be read: {error.strerror}") from None
        try:
            context = create_ssl_context(cafile=section.ssl_ca or None)
        except ssl.SSLError as error:
            raise SetupError(f"kafka.ssl_ca {section.ssl_ca} holds no PEM certificates ({error.reason})") from None
        if section.ssl_certificate:
            try:
                # With a password given, "" included, OpenSSL never asks at the terminal.
                context.load_cert_chain(
                    section.ssl_certificate, section.ssl_key, password=section.ssl_key_password.get_secret_value
                )
            except (ssl.SSLError, ValueError) as error:
                why = getattr(error, "reason", None) or "is the key encrypted? set kafka.ssl_key_password"
                raise SetupError(f"kafka.ssl_certificate and kafka.ssl_key do not load together ({why})") from None
        return context
