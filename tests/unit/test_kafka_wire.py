"""Messages as records and back, URLs as settings: without a server."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postroom.broker.kafka import wire
from postroom.broker.kafka.options import parse
from postroom.broker.kafka.wire import Envelope
from postroom.errors import ConfigurationError, MessageTooLarge, ValidationError
from postroom.message import Failure, Message


class Received:
    """As the client gives a record."""

    def __init__(self, record: wire.Record, offset: int = 7, timestamp: int = 1_750_000_000_123) -> None:
        self._record, self._offset, self._timestamp = record, offset, timestamp

    def headers(self) -> Any:
        return self._record.headers

    def key(self) -> bytes | None:
        return self._record.key

    def value(self) -> bytes | None:
        return self._record.value

    def topic(self) -> str:
        return self._record.topic

    def partition(self) -> int:
        return 3

    def offset(self) -> int:
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        return 1, self._timestamp


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
times = st.floats(0, 4e9, allow_nan=False)


@given(
    st.builds(
        Message,
        id=texts.filter(bool),
        topic=st.just("orders"),
        name=texts,
        body=st.binary(max_size=50),
        headers=st.dictionaries(texts | st.sampled_from(["ce_id", "postroom-to", "content-type"]), texts, max_size=4),
        key=st.none() | texts,
        priority=st.integers(0, 9),
        created_at=times,
        not_before=st.none() | times,
        expires_at=st.none() | times,
        idempotency_key=st.none() | texts,
        result_ttl=st.just(86_400.0) | times,
    )
)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    told = wire.read(Received(wire.message_record(message, "postroom.orders")), "orders").message
    assert math.isclose(told.created_at, message.created_at, abs_tol=1e-7)
    assert wire.changed(Envelope(message=told), {}).message == _at(message, told.created_at)


def _at(message: Message, created_at: float) -> Message:
    return Message(**{name: getattr(message, name) for name in message.__struct_fields__} | {"created_at": created_at})


@given(st.floats(1.5e9, 2.1e9))
def test_times_of_our_days_come_back_exactly(created_at: float) -> None:
    message = Message(id="1", topic="orders", name="n", body=b"", created_at=created_at)
    assert wire.read(Received(wire.message_record(message, "t")), "orders").message.created_at == created_at


def test_what_has_happened_comes_back() -> None:
    message = Message(id="1", topic="orders", name="n", body=b"{}", key="k")
    failures = [Failure(attempt=1, reason="error", error="E", message="Grüße", traceback="…")]
    sent = Envelope(
        message=message, attempt=2, due=5.5, history=wire.history(failures), suspect=True, replayed=True, redriven=3,
        to="mine",
    )  # fmt: skip
    told = wire.read(Received(wire.envelope_record(sent, "postroom-later.mine")), "")
    assert told == wire.changed(sent, {"message": told.message})
    assert told.message.topic == "orders"
    assert told.failures() == failures


def test_a_foreign_record_has_a_lasting_identity() -> None:
    foreign = Received(wire.Record("postroom.orders", None, b'{"a": 1}', [("region", b"eu"), ("odd", None)]))
    told = wire.read(foreign, "orders")
    assert (told.message.id, told.message.name) == ("postroom.orders/3/7", "orders")
    assert dict(told.message.headers) == {"region": "eu", "odd": ""}
    assert told.message.created_at == 1_750_000_000.123
    assert wire.read(foreign, "orders") == told


@pytest.mark.parametrize(
    "value",
    [
        b"0001-01-01T00:00:00+05:00",
        b"9999-12-31T23:59:59-05:00",
        b"0001-01-01T00:00:00",
        b"9999-12-31T23:59:59.9999999Z",
    ],
)
def test_a_time_at_the_end_of_the_calendar_can_be_written_again(value: bytes) -> None:
    """Else a retry or a dead letter of it could never be made."""
    told = wire.read(Received(wire.Record("t", None, b"", [("ce_time", value)])), "orders")
    assert wire.message_record(told.message, "t").headers


def test_where_a_foreign_record_lies_says_what_its_topic_is() -> None:
    """Its headers may be copied from anywhere; a subscription would not know it for its own, and drop it."""
    copied: Any = [("postroom-topic", b"elsewhere"), ("postroom-attempt", b"-7")]
    told = wire.read(Received(wire.Record("postroom.orders", None, b"", copied)), "orders")
    assert (told.message.topic, told.attempt) == ("orders", 1)


def test_what_is_no_text_is_refused() -> None:
    """The client library crashes at such a name, and the process with it."""
    for fields in ({"headers": {"\ud800": "1"}}, {"headers": {"a": "\ud800"}}, {"key": "\ud800"}):
        message = Message(**({"id": "1", "topic": "orders", "name": "n", "body": b""} | fields))
        with pytest.raises(ValidationError, match="surrogate"):
            wire.message_record(message, "postroom.orders")


@pytest.mark.parametrize(
    "name", ["postroom-attempt", "postroom-due", "postroom-expires", "postroom-priority", "ce_time"]
)
@pytest.mark.parametrize("value", [b"\xff!", b"", b"nan", b"inf", None])
def test_nonsense_in_a_foreign_header_is_no_header(name: str, value: bytes | None) -> None:
    told = wire.read(Received(wire.Record("t", b"\xff", b"\xff", [(name, value)])), "orders")
    assert (told.attempt, told.due, told.message.expires_at, told.message.priority) == (1, None, None, 0)


def test_nonsense_in_place_of_json_is_no_json() -> None:
    for damaged in (b"{", b"[" * 100_000, b'[{"attempt":' + b"[" * 100_000):
        headers: Any = [("postroom-failures", damaged)]
        assert wire.read(Received(wire.Record("t", None, b"", headers)), "orders").failures() == []
    headers = [("postroom-headers", b"[1]")]
    told = wire.read(Received(wire.Record("t", None, b"", headers)), "orders")
    assert dict(told.message.headers) == {"postroom-headers": "[1]"}


def test_a_long_history_loses_its_oldest_tracebacks_first() -> None:
    failures = [Failure(attempt=n, reason="error", error="E", traceback="x" * 100_000) for n in range(1, 9)]
    kept = Envelope(message=Message(id="1", topic="t", name="n", body=b""), history=wire.history(failures)).failures()
    assert len(wire.history(failures)) <= wire.MAX_HISTORY
    assert [failure.attempt for failure in kept] == list(range(1, 9))
    assert [bool(failure.traceback) for failure in kept] == [False] * 3 + [True] * 5


def test_too_large_is_told_before_it_is_sent() -> None:
    message = Message(id="1", topic="orders", name="n", body=b"x" * (wire.MAX_BODY + 1))
    with pytest.raises(MessageTooLarge, match="1,048,577"):
        wire.message_record(message, "postroom.orders")


def test_a_url_says_where_and_how() -> None:
    options = parse("kafka+ssl://ann:s%40cret@one,two:9093/?namespace=shop&partitions=12&replication=3&ca=/ca.pem")
    assert options.client == {
        "bootstrap.servers": "one:9092,two:9093",
        "security.protocol": "sasl_ssl",
        "ssl.ca.location": "/ca.pem",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "ann",
        "sasl.password": "s@cret",
    }
    assert (options.names.namespace, options.partitions, options.replication) == ("shop", 12, 3)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("kafka://h?partition=3", "did you mean partitions"),
        ("kafka://h?partitions=none", "partitions='none'"),
        ("kafka://h?session=0.1", "session"),
        ("kafka://h?namespace=a-b", "namespace"),
        ("kafka://h?security=tls", "security='tls'"),
        ("kafka://h?share=1", "share groups"),
        ("kafka://h?security=sasl_ssl", "user:password"),
        ("kafka://ann:secret@h?security=ssl", "sasl_ssl"),
        ("kafka://h/path", "no path"),
        ("kafka://h?partitions=2.5", "whole number"),
        ("kafka://h?partitions=1&partitions=2", "partitions= is there twice"),
        ("kafka://h:port", "'h:port' is no host"),
        ("kafka://one,,two", "'' is no host"),
        ("kafka://h:70000", "'h:70000' is no host"),
        ("kafka://h?ca=/ca.pem", "ca= needs TLS"),
        ("kafka://h?mechanism=PLAIN", "user:password"),
        ("kafka://ann:secret@h?mechanism=GUESS", "mechanism='GUESS'"),
        ("kafka://", "kafka://host"),
    ],
)
def test_a_wrong_url_names_the_option(url: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as refusal:
        parse(url)
    assert "secret" not in str(refusal.value)


def test_names_cannot_be_taken_for_others() -> None:
    names = parse("kafka://h").names
    kafka = [names.topic("a.later"), names.later("a"), names.dead("a"), names.topic("later.a"), names.topology]
    assert len(set(kafka)) == len(kafka)
    assert names.topic_of(names.topic("order.paid")) == "order.paid"
    assert [names.topic_of(name) for name in kafka] == ["a.later", "", "", "later.a", ""]
