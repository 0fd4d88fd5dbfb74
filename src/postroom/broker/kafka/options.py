"""From a URL to the settings of the client, and the names things have on the server."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any
from urllib.parse import parse_qsl, unquote

import msgspec

from postroom.broker.address import split
from postroom.errors import ConfigurationError

_SECURITY = ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_PATHS = {"ca": "ssl.ca.location", "certificate": "ssl.certificate.location", "key": "ssl.key.location"}


class Names(msgspec.Struct, frozen=True):
    """Names on the server. A namespace has no dash, so that none of them can be taken for another."""

    namespace: str = "postroom"

    @property
    def topology(self) -> str:
        return f"{self.namespace}-topology"

    def topic(self, name: str) -> str:
        return f"{self.namespace}.{name}"

    def topic_of(self, kafka_topic: str) -> str:
        """Empty for a topic of a subscription's own."""
        _, mark, topic = kafka_topic.partition(f"{self.namespace}.")
        return topic if mark and kafka_topic.startswith(mark) else ""

    def later(self, subscription: str) -> str:
        """The topic of what this subscription tries again, or later."""
        return f"{self.namespace}-later.{subscription}"

    def dead(self, subscription: str) -> str:
        return f"{self.namespace}-dead.{subscription}"

    def group(self, subscription: str) -> str:
        return f"{self.namespace}.{subscription}"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the URL says."""

    client: dict[str, Any]
    """Settings of the client library that say where and who."""
    names: Names = Names()
    partitions: int = 8
    """Partitions of a new topic: the most processes that can share a subscription."""
    replication: int = -1
    """Copies of each partition; -1: the default of the server."""
    min_isr: int | None = None
    """Copies that must have a message before it is confirmed; ``None``: the default of the server."""
    retention: float | None = None
    """Seconds after which Kafka itself may delete a record, settled or not; ``None``: never."""
    session: float = 6.0
    """Seconds after which a silent process loses its partitions."""
    handover: float = 3.0
    """Seconds for which a rebalance waits for what is in flight; what takes longer may be repeated elsewhere."""
    timeout: float = 10.0
    """Seconds for one request."""


def parse(url: str) -> Options:
    """Raises ``ConfigurationError`` that names the option."""
    parts = split(url)
    if parts.scheme not in ("kafka", "kafka+ssl") or not parts.netloc:
        raise ConfigurationError("a Kafka URL is kafka://host:9092, or kafka+ssl://user:password@host1,host2")
    if parts.path.strip("/") or parts.fragment:
        raise ConfigurationError("a Kafka URL has no path; say ?namespace= to share a server")
    who, _, where = parts.netloc.rpartition("@")
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = dict(pairs)
    if len(query) < len(pairs):
        twice = next(name for name in query if [each for each, _ in pairs].count(name) > 1)
        raise ConfigurationError(f"Kafka URL: {twice}= is there twice")
    servers = ",".join(map(_server, where.split(",")))
    client: dict[str, Any] = {"bootstrap.servers": servers}
    client.update(_security(query, who, "ssl" if parts.scheme == "kafka+ssl" else "plaintext"))
    options = Options(
        client=client,
        names=Names(_namespace(query.pop("namespace", "postroom"))),
        partitions=_whole(query, "partitions", 8),
        replication=_whole(query, "replication", -1),
        min_isr=_whole(query, "min_isr", 0) or None,
        retention=_number(query, "retention", 0, 1) or None,
        session=_number(query, "session", 6.0, 1),
        handover=_number(query, "handover", 3.0, 0),
        timeout=_number(query, "timeout", 10.0, 1),
    )
    if "share" in query:
        raise ConfigurationError(
            "Kafka URL: share=: share groups cannot keep a job that takes longer than their lock, nor work on beside a "
            "slow one (docs/brokers/kafka.md#share-groups); leave it out, and use ?partitions= for more processes"
        )
    for unknown in query:
        known = [*_PATHS, "mechanism", "security", *Options.__struct_fields__[1:], "namespace"]
        near = get_close_matches(unknown, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(set(known) - {'names'}))}"
        raise ConfigurationError(f"Kafka URL: no option is named {unknown!r}; {hint}")
    return options


def _security(query: dict[str, str], who: str, default: str) -> dict[str, Any]:
    if who and "sasl" not in default:
        default = f"sasl_{default}"
    protocol = query.pop("security", default)
    if protocol not in _SECURITY:
        raise ConfigurationError(f"Kafka URL: security={protocol!r}; one of {', '.join(_SECURITY)}")
    client: dict[str, Any] = {"security.protocol": protocol}
    for option, setting in _PATHS.items():
        if option in query:
            client[setting] = query.pop(option)
            if "ssl" not in protocol:
                raise ConfigurationError(f"Kafka URL: {option}= needs TLS, as kafka+ssl://; here it would do nothing")
    if "mechanism" in query and not who:
        raise ConfigurationError("Kafka URL: mechanism= needs user:password@ before the host")
    mechanism = query.pop("mechanism", "SCRAM-SHA-512")
    if mechanism not in _MECHANISMS:
        raise ConfigurationError(f"Kafka URL: mechanism={mechanism!r}; one of {', '.join(_MECHANISMS)}")
    if protocol.startswith("sasl"):
        user, _, password = who.partition(":")
        if not user:
            raise ConfigurationError(f"Kafka URL: security={protocol} needs user:password@ before the host")
        client |= {"sasl.mechanism": mechanism, "sasl.username": unquote(user), "sasl.password": unquote(password)}
    elif who:
        raise ConfigurationError(f"Kafka URL: security={protocol} takes no user and password; use sasl_{protocol}")
    return client


def _namespace(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", value):
        raise ConfigurationError(f"Kafka URL: namespace={value!r}; 1 to 40 letters, digits and underscores")
    return value


def _server(told: str) -> str:
    """With its port."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+)(?::(\d{1,5}))?", told)
    if found is None or not 0 < int(found[2] or 9092) < 65_536:
        raise ConfigurationError(f"Kafka URL: {told!r} is no host; say host or host:port, several with commas between")
    return f"{found[1]}:{found[2] or 9092}"


def _whole(query: dict[str, str], name: str, default: int) -> int:
    value = _number(query, name, default, 1)
    if value != int(value) or value > 100_000:
        raise ConfigurationError(f"Kafka URL: {name}={value:g}; a whole number up to 100,000")
    return int(value)


def _number(query: dict[str, str], name: str, default: float, least: float) -> float:
    text = query.pop(name, None)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = least - 1
    if not least <= value < 1e12:
        raise ConfigurationError(f"Kafka URL: {name}={text!r}; a number, at least {least:g}")
    return value
