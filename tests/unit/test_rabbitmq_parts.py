"""The parts of the RabbitMQ broker that need no server: URLs, messages as they travel, frames, the ladder."""

from __future__ import annotations

import asyncio
import datetime
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import BasicProperties, exceptions, frame, spec
from services.base import free_port

from postroom.broker.amqp import AMQPBroker, ladder, ordered, topology, wire
from postroom.broker.amqp.address import parse
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.frames import Connection, Properties, _Taker
from postroom.broker.amqp.ladder import LEVELS, LONGEST, UNIT, way
from postroom.broker.amqp.link import translated
from postroom.broker.amqp.ordered import Note
from postroom.errors import BrokerUnavailable, ConfigurationError, EncodeError, MessageTooLarge
from postroom.message import Failure, Message


class TestAddress:
    def test_everything(self) -> None:
        address = parse("amqps://ann:p%40ss@one:1,two/shop?namespace=s&heartbeat=5")
        assert address.hosts == (("one", 1), ("two", 5671))
        assert (address.user, address.password, address.vhost, address.tls) == ("ann", "p@ss", "shop", True)
        assert (address.queue("mail"), address.dead("mail"), address.heartbeat) == ("s.mail", "s.mail:dead", 5)
        assert "p@ss" not in repr(address)

    def test_little(self) -> None:
        address = parse("amqp://")
        assert (address.hosts, address.vhost, address.user) == ((("localhost", 5672),), "/", "guest")
        assert parse("amqp://[::1]:7").hosts == (("::1", 7),)
        assert parse("amqp://h/%2F").vhost == "/"

    @pytest.mark.parametrize(
        ("url", "told"),
        [
            ("amqp://u:secret@h?heartbeet=1", "did you mean 'heartbeat'"),
            ("amqp://u:secret@h?heartbeat=0", "1 to 60"),
            ("amqp://u:secret@h?heartbeat=x", "1 to 60"),
            ("amqp://u:secret@h?namespace=a:b", "letters"),
            ("amqp://u:secret@h?cafile=x", "amqps"),
            ("amqps://u:secret@h?keyfile=x", "certfile"),
            (f"amqp://u:secret@h?namespace={'n' * 37}", "1 to 36 letters"),
            ("amqp://u:secret@h:99999", "no host"),
            ("amqp://[::1", "cannot be taken apart"),
            ("amqp://u:sec/secret@h", "%2F"),
            ("amqp://u:secret?x@h", "%3F"),
            ("amqp://u:secret@h#x", "amqp://user:password@host"),
            ("http://u:secret@h", "amqp://user:password@host"),
        ],
    )
    def test_what_is_wrong_is_named(self, url: str, told: str) -> None:
        with pytest.raises(ConfigurationError, match=told) as refusal:
            parse(url)
        assert "secret" not in str(refusal.value)

    def test_the_longest_names_are_names(self) -> None:
        """AMQP has room for 255 bytes."""
        address = parse(f"amqp://h?namespace={'n' * 36}")
        name = "s" * topology._LONGEST_NAME
        for made in (address.shelf(name, "c" * 12), address.filter(name, {"a": "b"}), address.history(name)):
            assert len(made) <= 255
        assert len(way(address, 1.0, ladder.to_queue(name))[1]) <= 255

    def test_a_file_that_is_no_certificate(self) -> None:
        with pytest.raises(ConfigurationError, match="cannot load"):
            parse(f"amqps://h?cafile={__file__}").tls_context()
        assert parse("amqp://h").tls_context() is None


def there_and_back(copy: Copy) -> Copy:
    """Through pika's bytes and our reading of them."""
    data = b"".join(wire.properties_of(copy).encode())
    read = wire.read(Properties(data), copy.message.body, lambda: "elsewhere")
    by_pika = BasicProperties()
    by_pika.decode(data)
    assert wire.read(by_pika, copy.message.body, lambda: "elsewhere") == read
    return read


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
messages = st.builds(
    Message,
    id=texts.filter(bool),
    topic=texts,
    name=texts,
    body=st.binary(max_size=50),
    headers=st.dictionaries(
        texts | st.sampled_from(["x-death", "postroom", "cloudEvents_id", "region"]), texts, max_size=5
    ),
    key=st.none() | texts,
    created_at=st.floats(0, 1e10),
    not_before=st.none() | st.floats(0, 1e10),
    expires_at=st.none() | st.floats(0, 1e10),
    idempotency_key=st.none() | texts,
    dedup_window=st.floats(0, 1e9),
    result_ttl=st.floats(0, 1e9),
)
failures = st.builds(
    Failure, attempt=st.integers(1, 9), reason=st.sampled_from(["error", "timeout"]), message=texts, traceback=texts
)


class TestWire:
    @given(messages, st.lists(failures, max_size=3), st.booleans())
    def test_a_copy_comes_back(self, message: Message, told: list[Failure], suspect: bool) -> None:
        copy = Copy(message=message)
        for failure in told:
            copy = copy.failed(failure, suspect=suspect)
        back = there_and_back(copy)
        assert (back.message, back.failures(), back.attempt) == (message, tuple(told), 1 + len(told))
        assert back.is_suspect == (suspect and bool(told))

    def test_a_death_is_a_failure(self) -> None:
        copy = Copy(message=MESSAGE, counted=1, packed="", deaths=2)
        assert (copy.attempt, copy.is_suspect) == (4, True)
        assert [(failure.attempt, failure.reason) for failure in copy.failures()] == [
            (2, "worker_lost"),
            (3, "worker_lost"),
        ]
        released = copy.released()
        assert (released.attempt, released.is_suspect, released.deaths) == (4, True, 0)
        assert released.failures() == copy.failures()

    @pytest.mark.parametrize(
        ("headers", "deaths"),
        [
            ({"x-delivery-count": 3}, 3),
            ({"x-delivery-count": 1, "x-acquired-count": 4}, 4),
            ({}, 0),
            ({"x-death": [{"queue": "postroom.q:held:1"}], "x-delivery-count": 1}, 2),
            ({"x-death": [{"queue": "postroom.q:held:1"}], "x-delivery-count": 1, "x-acquired-count": 1}, 1),
            ({"x-death": [{"queue": "postroom:delay:1"}], "x-delivery-count": 1}, 1),
        ],
    )
    def test_what_the_server_counts(self, headers: dict[str, Any], deaths: int) -> None:
        properties = wire.properties_of(Copy(message=MESSAGE))
        properties.headers |= headers
        assert wire.read(properties, b"", lambda: "q", is_again=True).deaths == deaths
        if "x-death" not in headers:
            assert wire.read(properties, b"", lambda: "q").deaths == 0, "of another queue, from who has passed it on"

    def test_of_too_long_a_history_the_oldest_tracebacks_go_first(self) -> None:
        import random

        noise = random.Random(7)
        told = tuple(
            Failure(attempt=n, reason="error", message=f"m{n}", traceback=noise.randbytes(8000).hex())
            for n in range(1, 9)
        )
        copy = Copy(message=MESSAGE)
        for failure in told:
            copy = copy.failed(failure, suspect=False)
        kept = there_and_back(copy).failures()
        assert [failure.message for failure in kept] == [failure.message for failure in told]
        assert kept[-1] == told[-1]
        assert kept[0].traceback == ""
        assert len(b"".join(wire.properties_of(copy).encode())) < 131_072 - 8

    def test_headers_that_do_not_fit(self) -> None:
        message = msgspec.structs.replace(MESSAGE, headers={"a": "ä" * 60_000})
        with pytest.raises(MessageTooLarge, match="headers"):
            wire.check_size(message, wire.properties_of(Copy(message=message)))

    def test_what_grows_on_its_way_is_measured_as_it_travels(self) -> None:
        """A header that we keep in JSON takes six bytes for each control character: the server would hang up."""
        message = msgspec.structs.replace(MESSAGE, headers={"x-blob": "\x01" * 20_000})
        with pytest.raises(MessageTooLarge, match="120,"):
            wire.check_size(message, wire.properties_of(Copy(message=message)))
        foreign = BasicProperties(message_id="1", headers={"cloudEvents:partitionkey": "\x01" * 20_000})
        assert wire.read(foreign, b"{}", lambda: "q").oversized
        passed_on = wire.properties_of(Copy(message=MESSAGE))
        assert not wire.read(passed_on, b"{}", lambda: "q").oversized
        passed_on.headers["trace"] = "x" * 100_000
        assert wire.read(passed_on, b"{}", lambda: "q").oversized

    def test_a_name_is_no_mark(self) -> None:
        message = msgspec.structs.replace(MESSAGE, name=wire.mark("7").type, body=b"")
        assert not wire.is_mark(wire.properties_of(Copy(message=message)), b"")
        assert not wire.is_mark(BasicProperties(type=message.name), b"1")
        assert wire.is_mark(wire.mark("7"), b"")

    @pytest.mark.parametrize("field", ["id", "name", "key"])
    def test_half_a_surrogate_pair(self, field: str) -> None:
        with pytest.raises(EncodeError, match="surrogate"):
            wire.properties_of(Copy(message=msgspec.structs.replace(MESSAGE, **{field: "\ud800"})))
        with pytest.raises(EncodeError, match="surrogate"):
            wire.properties_of(Copy(message=msgspec.structs.replace(MESSAGE, headers={"a": "\ud800"})))

    def test_another_client(self) -> None:
        properties = BasicProperties(
            headers={
                "cloudEvents:type": "paid",
                "cloudEvents_time": "2026-01-01T00:00:00Z",
                "n": 7,
                "list": [1, b"\xff"],
                "at": datetime.datetime(2026, 1, 1),
                "postroom": "nonsense",
            },
        )
        copy = wire.read(properties, b"{}", lambda: "orders")
        assert copy.nameless
        message = copy.message
        assert (message.topic, message.name, message.created_at) == ("orders", "paid", 1767225600.0)
        assert message.headers["n"] == "7"
        assert message.headers["list"] == '[1,"/w=="]'
        assert wire.read(BasicProperties(message_id="7"), b"", lambda: "q").message.id == "7"

    @pytest.mark.parametrize("field", ['"created_at": 1e300', '"priority": 300', '"priority": -5'])
    def test_ours_with_what_cannot_be_sent_again(self, field: str) -> None:
        """Another client has written it: whatever becomes of the message, it can be stored."""
        properties = BasicProperties(message_id="1", headers={"postroom": f'{{"topic": "t", {field}}}'})
        copy = wire.read(properties, b"1", lambda: "q")
        assert (copy.message.id, copy.message.topic) == ("1", "q")
        assert b"".join(wire.properties_of(copy.released()).encode())

    def test_a_damaged_history(self) -> None:
        properties = wire.properties_of(Copy(message=MESSAGE))
        for damaged in (b"\x00", 7):
            properties.headers["postroom-failures"] = damaged
            assert wire.read(properties, b"", lambda: "q").failures() == ()


MESSAGE = Message(id="1", topic="q", name="n", body=b"{}")


class TestFrames:
    @given(st.data())
    def test_split_anywhere(self, data: st.DataObject) -> None:
        """Whatever pieces the network makes of the frames, what comes out is what went in."""
        sent = data.draw(
            st.lists(st.tuples(texts.filter(lambda text: len(text.encode()) < 200), st.binary(max_size=30)), max_size=4)
        )
        stream = b"".join(_delivered(tag, key, body) for tag, (key, body) in enumerate(sent, 1))
        got: list[tuple[int, bool, str, bytes, str]] = []
        connection = _unconnected(
            lambda _, tag, again, __, key, properties, body: got.append((tag, again, key, body, properties.type))
        )
        at = 0
        while at < len(stream):
            size = data.draw(st.integers(1, 40))
            connection._on_data_available(stream[at : at + size])
            at += size
        assert got == [(tag, tag % 2 == 0, key, body, "n") for tag, (key, body) in enumerate(sent, 1)]
        assert connection.bytes_received == len(stream)
        assert connection.handled == []

    def test_others_go_pikas_way(self) -> None:
        connection = _unconnected(lambda *_: None)
        heartbeat = frame.Heartbeat().marshal()
        connection._on_data_available(heartbeat + frame.Method(1, spec.Channel.FlowOk(True)).marshal())
        assert [type(found).__name__ for found in connection.handled] == ["Heartbeat", "Method"]

    @pytest.mark.parametrize(
        "options",
        [
            {"headers": {"when": datetime.datetime(2026, 1, 1), "a": "b"}},
            {"reply_to": "x", "type": "t"},
            {},
            {"priority": 3},
        ],
    )
    def test_what_is_left_to_pika(self, options: dict[str, Any]) -> None:
        wanted = BasicProperties(**options)
        data = b"".join(wanted.encode())
        found = Properties(data)
        assert (found.message_id, found.type) == (wanted.message_id, wanted.type)
        assert (found.headers or {}).keys() == (wanted.headers or {}).keys()


def _delivered(tag: int, key: str, body: bytes) -> bytes:
    method = spec.Basic.Deliver("ctag", tag, tag % 2 == 0, "events", key)
    properties = BasicProperties(type="n", headers={"a": "b", "n": 2**40, "small": 7})
    frames = [frame.Method(1, method), frame.Header(1, len(body), properties)]
    frames += [frame.Body(1, body[start : start + 10]) for start in range(0, len(body), 10)]
    return b"".join(each.marshal() for each in frames)


class _Offline(Connection):
    def __init__(self) -> None:
        self._transport = SimpleNamespace()
        self._frame_buffer = b""
        self.bytes_received = self.frames_received = 0
        self.handled: list[Any] = []

    def _process_frame(self, value: Any) -> None:
        self.handled.append(value)


def _unconnected(arrived: Any) -> _Offline:
    connection = _Offline()
    connection.take(1, arrived)
    return connection


class TestLadder:
    @given(st.floats(0.001, LONGEST))
    def test_the_steps_add_up_to_the_delay(self, delay: float) -> None:
        exchange, key = way(parse("amqp://"), delay, ladder.to_queue("a.b"))
        words = key.split(".")
        units = int("".join(words[:LEVELS]), 2)
        assert delay <= units * UNIT + 1e-6
        assert units * UNIT < delay + UNIT + 1e-6
        assert exchange == f"postroom:delay:{units.bit_length() - 1}"
        assert ".".join(words[LEVELS:]) == "q.a.b"
        assert ladder.topic_of(key) == "a.b"

    def test_no_longer_than_it_can(self) -> None:
        assert way(parse("amqp://"), 1e9, "q.a")[1].startswith("1." * LEVELS)


def test_notes_that_are_too_long_lose_what_is_long() -> None:
    state = {str(n): Note(counted=2, suspect=True, packed=b"x" * 24_000) for n in range(1000)}
    body = ordered._packed(state)
    assert len(body) < ordered._LARGEST_STATE
    assert ordered._notes(body, "q") == {name: Note(counted=2, suspect=True) for name in state}
    assert ordered._notes(ordered._packed({"1": state["1"]}), "q") == {"1": state["1"]}


def test_nobody_listens() -> None:
    with pytest.raises(BrokerUnavailable, match="refused"):
        asyncio.run(AMQPBroker(f"amqp://127.0.0.1:{free_port()}").connect())


def test_a_body_that_nobody_asked_for_is_left_alone() -> None:
    assert _Taker(lambda *_: None).takes(3, b"", 0, 0) is False


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (exceptions.ProbableAuthenticationError("(403) ACCESS_REFUSED - Login was refused"), ConfigurationError),
        (exceptions.ProbableAuthenticationError("Transport indicated EOF"), BrokerUnavailable),
        (exceptions.ProbableAccessDeniedError("(530) NOT_ALLOWED - vhost x not found"), ConfigurationError),
        (exceptions.ProbableAccessDeniedError("(530) NOT_ALLOWED - vhost x is down"), BrokerUnavailable),
        (exceptions.ProbableAccessDeniedError("(530) NOT_ALLOWED - … limit (1) is reached"), BrokerUnavailable),
        (exceptions.ProbableAccessDeniedError("Transport indicated EOF"), BrokerUnavailable),
    ],
)
def test_what_passes_by_itself_is_no_wrong_configuration(made: Exception, kind: type[Exception]) -> None:
    assert type(translated(made, parse("amqp://"))) is kind
