"""Where the server is, and what our queues and exchanges are called there."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from difflib import get_close_matches
from hashlib import sha256
from urllib.parse import parse_qsl, unquote

import msgspec

from postroom.broker.address import split
from postroom.errors import ConfigurationError

SHELF = ":held:"

_OPTIONS = ("cafile", "certfile", "heartbeat", "keyfile", "namespace")
_PORTS = {"amqp": 5672, "amqps": 5671}


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """An ``amqp://`` or ``amqps://`` URL, taken apart."""

    hosts: tuple[tuple[str, int], ...]
    """The nodes of a cluster, tried in turn."""
    tls: bool
    user: str = "guest"
    password: str = "guest"
    vhost: str = "/"
    namespace: str = "postroom"
    """How every queue and exchange begins."""
    heartbeat: int = 10
    """Seconds. The server takes a connection for dead after two to three of silence, and gives its messages back."""
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None

    def __repr__(self) -> str:
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"amqp{'s' if self.tls else ''}://{self.user}:***@{hosts}/{self.vhost.removeprefix('/')}"

    def tls_context(self) -> ssl.SSLContext | None:
        """Certificates are always checked. Raises ``ConfigurationError`` for a file that is no certificate."""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.cafile)
            if self.certfile is not None:
                context.load_cert_chain(self.certfile, self.keyfile)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(file for file in (self.cafile, self.certfile, self.keyfile) if file)
            raise ConfigurationError(f"broker URL {self!r}: cannot load {files}: {error}") from error
        return context

    # A colon is in no name of a topic or subscription, so that what follows it is never mistaken for one.

    def queue(self, subscription: str) -> str:
        return f"{self.namespace}.{subscription}"

    def dead(self, subscription: str) -> str:
        """Its dead letters."""
        return f"{self.namespace}.{subscription}:dead"

    def state(self, subscription: str) -> str:
        """What is remembered of the messages of an ordered subscription."""
        return f"{self.namespace}.{subscription}:state"

    def shelf(self, subscription: str, consumer: str) -> str:
        """What one consumer has held for long."""
        return f"{self.queue(subscription)}{SHELF}{consumer}"

    def history(self, topic: str) -> str:
        """The stream of a topic that retains its messages."""
        return f"{self.namespace}.{topic}:history"

    def filter(self, subscription: str, where: Mapping[str, str]) -> str:
        """The headers exchange of a subscription with ``where``; another for another ``where``."""
        digest = sha256(msgspec.json.encode(sorted(where.items()))).hexdigest()[:8]
        return f"{self.namespace}.{subscription}:where:{digest}"

    def internal(self, what: str) -> str:
        """What belongs to no topic or subscription."""
        return f"{self.namespace}:{what}"

    @property
    def permit(self) -> str:
        """The command that gives our user what it needs."""
        names = rf"'^{re.escape(self.namespace)}[.:].*|amq\.default'"
        return f"rabbitmqctl set_permissions -p {self.vhost} {self.user} {names} {names} {names}"

    @property
    def events(self) -> str:
        """The exchange for events; the routing key is the topic."""
        return self.internal("events")

    def subscription_of(self, queue: str) -> str:
        return queue.removeprefix(f"{self.namespace}.")


def parse(url: str) -> Address:
    """Raises ``ConfigurationError`` that names the part which is wrong, and never repeats the password."""
    parts = split(url)
    if parts.scheme not in _PORTS or parts.fragment:
        raise ConfigurationError(f"broker URL {parts.scheme}://…: write amqp://user:password@host:5672/vhost")
    fields: dict[str, object] = {"tls": parts.scheme == "amqps"}
    credentials, separator, hosts = parts.netloc.rpartition("@")
    if separator:
        user, _, password = credentials.partition(":")
        fields |= {"user": unquote(user), "password": unquote(password)}
    fields["hosts"] = tuple(_host(text, _PORTS[parts.scheme]) for text in (hosts or "localhost").split(","))
    if len(parts.path) > 1:
        fields["vhost"] = unquote(parts.path[1:])
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for option in options:
        if option not in _OPTIONS:
            near = get_close_matches(option, _OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(_OPTIONS)}"
            raise ConfigurationError(f"broker URL {parts.scheme}://…: no option {option!r}; {hint}")
    return Address(**fields, **_checked(options, tls=parts.scheme == "amqps"))  # type: ignore[arg-type]


def _host(text: str, port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/?#\s]+)(?::([0-9]{1,5}))?", text)
    if found is None or (found[2] and not 0 < int(found[2]) < 65536):
        raise ConfigurationError(f"broker URL amqp://…: {text!r} is no host; write host:port, several with commas")
    return found[1].strip("[]"), int(found[2] or port)


def _checked(options: dict[str, str], *, tls: bool) -> dict[str, object]:
    checked: dict[str, object] = dict(options)
    heartbeat = options.get("heartbeat")
    if heartbeat is not None:
        if not heartbeat.isascii() or not heartbeat.isdigit() or not 1 <= int(heartbeat) <= 60:
            raise ConfigurationError(f"broker URL amqp://…: heartbeat={heartbeat!r}: whole seconds, 1 to 60")
        checked["heartbeat"] = int(heartbeat)
    namespace = options.get("namespace")
    if namespace is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,36}", namespace):
        raise ConfigurationError(
            f"broker URL amqp://…: namespace={namespace!r}: 1 to 36 letters, digits, dots, dashes and underscores"
        )
    files = [name for name in ("cafile", "certfile", "keyfile") if name in options]
    if files and not tls:
        raise ConfigurationError(f"broker URL amqp://…: {files[0]} needs TLS; write amqps://")
    if "keyfile" in options and "certfile" not in options:
        raise ConfigurationError("broker URL amqps://…: keyfile needs certfile, the certificate of that key")
    return checked
