"""A real Apache Kafka broker that lets nobody in without credentials, and nobody do what no ACL allows.

Listeners: `sasl_bootstrap` (SASL_SSL: SCRAM-SHA-256 and -512, PLAIN, OAUTHBEARER with unsigned tokens), `tls_bootstrap` (SSL that wants
a client certificate, whose common name is the user), and `bootstrap` (plain, for the suite's own administration: a super user).
Certificates are made by the openssl command, valid for a day.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.kafka import SHORT_LIVED, KafkaServer, ServerError, free_port, libraries, new_id, started
from tests.servers.tied import tied_directory

USER, PASSWORD = "sluice", "correct horse battery=staple"


class Certificates:
    """An authority with the broker's certificate and a client's; PEM files in `directory`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.ca, self._ca_key = directory / "ca.pem", directory / "ca.key"
        self._openssl(
            "req", "-x509", "-new", "-days", "1", "-subj", "/CN=test authority", *self._new_key(self._ca_key), self.ca
        )
        self.broker, self.broker_key = self.issue("127.0.0.1", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        self.client, self.client_key = self.issue(USER)
        # What Kafka reads: key and chain in one file.
        self.keystore = directory / "broker-keystore.pem"
        self.keystore.write_bytes(self.broker_key.read_bytes() + self.broker.read_bytes())

    def issue(self, name: str, extension: str = "extendedKeyUsage=clientAuth") -> tuple[Path, Path]:
        """A certificate of the authority for this common name, and its key."""
        certificate, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        self._openssl(
            "req", "-x509", "-new", "-days", "1", "-CA", self.ca, "-CAkey", self._ca_key, "-subj", f"/CN={name}",
            "-addext", "basicConstraints=critical,CA:FALSE", "-addext", extension, *self._new_key(key), certificate,
        )  # fmt: skip
        return certificate, key

    @staticmethod
    def _new_key(file: Path) -> tuple[str | Path, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", file, "-out")

    @staticmethod
    def _openssl(*arguments: str | Path) -> None:
        if shutil.which("openssl") is None:
            raise ServerError("the tests of TLS need `openssl` (Debian: apt-get install openssl)")
        subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=True)


class SecureKafka(KafkaServer):
    """One such broker."""

    # Started for a few tests beside everything else: the quick compiler and one collector thread are enough.
    jvm_flags = SHORT_LIVED

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.certificates = Certificates(directory / "certificates")
        self._sasl_port, self._tls_port = free_port(), free_port()
        self.sasl_bootstrap = f"127.0.0.1:{self._sasl_port}"
        self.tls_bootstrap = f"127.0.0.1:{self._tls_port}"

    def _format(self) -> None:
        modules = "org.apache.kafka.common.security"
        sasl = "listener.name.sasl_ssl"
        self._properties.write_text(
            "\n".join(
                [
                    "process.roles=broker,controller",
                    "node.id=1",
                    f"controller.quorum.voters=1@127.0.0.1:{self._controller_port}",
                    f"listeners=PLAINTEXT://127.0.0.1:{self.port},SASL_SSL://127.0.0.1:{self._sasl_port},"
                    f"SSL://127.0.0.1:{self._tls_port},CONTROLLER://127.0.0.1:{self._controller_port}",
                    f"advertised.listeners=PLAINTEXT://127.0.0.1:{self.port},SASL_SSL://{self.sasl_bootstrap},"
                    f"SSL://{self.tls_bootstrap}",
                    "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL,CONTROLLER:PLAINTEXT",
                    "inter.broker.listener.name=PLAINTEXT",
                    "controller.listener.names=CONTROLLER",
                    f"log.dirs={self._directory / 'data'}",
                    "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                    "super.users=User:ANONYMOUS",
                    "ssl.keystore.type=PEM",
                    f"ssl.keystore.location={self.certificates.keystore}",
                    "ssl.truststore.type=PEM",
                    f"ssl.truststore.location={self.certificates.ca}",
                    "listener.name.ssl.ssl.client.auth=required",
                    r"ssl.principal.mapping.rules=RULE:^CN=(.*?)$/$1/",
                    "sasl.enabled.mechanisms=SCRAM-SHA-256,SCRAM-SHA-512,PLAIN,OAUTHBEARER",
                    f"{sasl}.scram-sha-256.sasl.jaas.config={modules}.scram.ScramLoginModule required;",
                    f"{sasl}.scram-sha-512.sasl.jaas.config={modules}.scram.ScramLoginModule required;",
                    f'{sasl}.plain.sasl.jaas.config={modules}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";',
                    f"{sasl}.oauthbearer.sasl.jaas.config={modules}.oauthbearer.OAuthBearerLoginModule required "
                    'unsecuredLoginStringClaim_sub="broker";',
                    f"{sasl}.oauthbearer.sasl.server.callback.handler.class="
                    f"{modules}.oauthbearer.internals.unsecured.OAuthBearerUnsecuredValidatorCallbackHandler",
                    "offsets.topic.replication.factor=1",
                    "offsets.topic.num.partitions=2",
                    "transaction.state.log.replication.factor=1",
                    "transaction.state.log.min.isr=1",
                    "transaction.state.log.num.partitions=2",
                    "group.initial.rebalance.delay.ms=0",
                    "auto.create.topics.enable=false",
                    "",
                ]
            ),
            encoding="utf-8",
        )
        tool = ["java", *self.jvm_flags, "-cp", f"{libraries()}/*", "kafka.tools.StorageTool"]
        users = [
            argument
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            for argument in ("--add-scram", f'{mechanism}=[name="{USER}",password="{PASSWORD}"]')
        ]
        done = subprocess.run(
            [*tool, "format", "-t", new_id(), "-c", str(self._properties), *users], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ServerError(f"the broker's directory could not be formatted:\n{(done.stdout + done.stderr)[-500:]}")


@contextmanager
def running(name: str = "secure-kafka") -> Iterator[SecureKafka]:
    """A fresh broker, ended and removed at the end; the log of the last one stays as tests/.logs/<name>.log."""
    with tied_directory("sluice-secure-kafka-") as directory:
        server = SecureKafka(directory)
        with started(server, name):
            yield server
