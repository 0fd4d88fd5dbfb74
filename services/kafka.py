"""A private Apache Kafka: one KRaft node from its Maven artifacts, on Java 17 or newer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from services.base import Server, ServiceMissing, free_port, is_alive, wait_until
from services.certificates import Certificate
from services.java import fetched, java

VERSION = os.environ.get("POSTROOM_KAFKA_VERSION", "4.3.1")

_ARTIFACTS = (
    f"org.apache.kafka:kafka_2.13:{VERSION}",
    f"org.apache.kafka:kafka-tools:{VERSION}",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4",
)

_PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}{more}
advertised.listeners=PLAINTEXT://127.0.0.1:{advertised}{more}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL
log.dirs={folder}/data
num.partitions=1
auto.create.topics.enable=false
offsets.topic.num.partitions=2
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=1000
broker.heartbeat.interval.ms=200
group.min.session.timeout.ms=1000
log.index.size.max.bytes=65536
log.cleaner.dedupe.buffer.size=4194304
log.segment.delete.delay.ms=1000
num.network.threads=2
num.io.threads=2
background.threads=2
"""

USER, PASSWORD = "shop", "top/secret@1"
"""Who is let in at ``secure_url``."""

_SECURITY = """
ssl.keystore.type=PEM
ssl.keystore.location={folder}/keystore.pem
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512
listener.name.sasl_ssl.plain.sasl.jaas.config={plain} required user_{user}="{password}";
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config={scram} required;
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
allow.everyone.if.no.acl.found=true
"""
_PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule"
_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"


class KafkaServer(Server):
    """Listens on ``port``; tells its clients to come to ``advertised``, where a proxy may stand."""

    name = "kafka"

    def __init__(self, folder: Path, *, advertised: int | None = None, certificate: Certificate | None = None) -> None:
        """With a ``certificate`` it also listens at ``secure_port``, by SASL over TLS."""
        super().__init__(folder)
        self._certificate = certificate
        self.secure_port = free_port()
        self._advertised = advertised or self.port
        self._controller = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self._advertised}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "kafka was not started"
        return self._process.pid

    def start(self) -> None:
        libraries = _libraries()
        configuration = self.folder / "server.properties"
        if not configuration.exists():
            self._format(configuration, libraries)
        log = self.folder / "server.log"
        before = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [*_java(libraries, self.folder), "kafka.Kafka", str(configuration)],
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        wait_until(lambda: self._is_up(log, before), 110.0, f"kafka to start; see {log}")

    def _is_up(self, log: Path, offset: int) -> bool:
        assert self._process is not None
        written = log.read_bytes()[offset:].decode(errors="replace")
        if self._process.poll() is not None:
            raise ServiceMissing(f"kafka did not start: {written[-2000:]}")
        return bool(re.search(r"Kafka Server started", written))

    def _format(self, configuration: Path, libraries: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log4j2.properties").write_text(_LOGGING)
        properties = _PROPERTIES.format(
            port=self.port,
            advertised=self._advertised,
            controller=self._controller,
            folder=self.folder,
            more=f",SASL_SSL://127.0.0.1:{self.secure_port}" if self._certificate else "",
        )
        command = [*_java(libraries, self.folder), "kafka.tools.StorageTool", "format"]
        command += ["-t", "cG9zdHJvb20tdGVzdHMtMQ", "-c", str(configuration)]
        if self._certificate is not None:
            properties += _SECURITY.format(folder=self.folder, plain=_PLAIN, scram=_SCRAM, user=USER, password=PASSWORD)
            both = self._certificate.key.read_text() + self._certificate.certificate.read_text()
            (self.folder / "keystore.pem").write_text(both)
            command += ["--add-scram", f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"]
        configuration.write_text(properties)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServiceMissing(f"kafka cannot format its storage: {(done.stdout + done.stderr)[-2000:]}")

    def tool(self, program: str, *options: str, typed: str = "") -> str:
        """What one of Kafka's own programs prints, as ``ConsoleProducer``; it is told the server itself."""
        command = [*_java(_libraries(), self.folder), f"org.apache.kafka.tools.{program}"]
        done = subprocess.run(
            [*command, "--bootstrap-server", f"127.0.0.1:{self.port}", *options],
            input=typed, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stdout}{done.stderr}")
        return done.stdout

    def kill(self) -> None:
        super().kill()
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            if is_alive(self._process.pid):
                self.resume()
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_LOGGING = """
rootLogger.level=warn
rootLogger.appenderRef.stdout.ref=stdout
appender.stdout.type=Console
appender.stdout.name=stdout
appender.stdout.layout.type=PatternLayout
appender.stdout.layout.pattern=%d %p %m (%c)%n
logger.server.name=kafka.server.KafkaRaftServer
logger.server.level=info
"""


def _java(libraries: Path, folder: Path) -> list[str]:
    return java(libraries, f"-Dlog4j2.configurationFile={folder}/log4j2.properties", memory=512)


def _libraries() -> Path:
    return fetched(f"kafka-{VERSION}-with-tools", _ARTIFACTS)


if __name__ == "__main__":
    server = KafkaServer(Path(tempfile.mkdtemp(prefix="postroom-kafka-")))
    server.start()
    print(server.url, flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        server.stop()
