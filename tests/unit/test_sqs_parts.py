"""The parts of the SQS broker that need no service: URLs, names, messages on the wire, batches, errors."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)
from botocore.session import Session
from hypothesis import given
from hypothesis import strategies as st

from postroom.broker.base import Subscription, Topic
from postroom.broker.sqs.address import parse
from postroom.broker.sqs.consumer import SQSConsumer
from postroom.broker.sqs.held import Memory
from postroom.broker.sqs.kept import check, kept_from, tags_of
from postroom.broker.sqs.service import Answers, Batcher, Missing, Service, translated
from postroom.broker.sqs.wire import (
    HISTORY_ROOM,
    MOST_BYTES,
    UNFILTERED,
    attributes_of,
    entry,
    filter_policy,
    pack,
    read,
    size_of,
    unpack,
)
from postroom.clock import SystemClock
from postroom.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    EncodeError,
    LeaseLost,
    MessageTooLarge,
    PostroomError,
)
from postroom.message import Failure, Message

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MESSAGES = st.builds(
    Message,
    id=TEXT,
    topic=TEXT,
    name=TEXT,
    body=st.binary(max_size=50),
    headers=st.dictionaries(TEXT, TEXT, max_size=6),
    key=st.none() | TEXT,
    created_at=st.floats(0, 4e9),
    expires_at=st.none() | st.floats(0, 4e9),
)
ADDRESS = parse("sqs://eu-west-1")


def message(**fields: Any) -> Message:
    return Message(**({"id": "i", "topic": "t", "name": "n", "body": b"{}"} | fields))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqs://key:secret@eu-west-1", "keys do not belong into the URL"),
        ("sqs://eu-west-1/queue", "write sqs://region"),
        ("sqs://Ireland", "a region is written as eu-west-1"),
        ("sqs://eu-west-1?endpoint=http://x", "did you mean 'endpoint_url'"),
        ("sqs://eu-west-1?endpoint_url=http://me:secret@x", "cannot be taken apart"),
        ("sqs://eu-west-1?namespace=a-b", "1 to 24 letters and digits"),
        ("sqs://eu-west-1?wait=21", "whole seconds, 1 to 20"),
        ("sqs://eu-west-1?wait=0.5", "whole seconds, 1 to 20"),
    ],
)
def test_a_wrong_url_is_told(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as told:
        parse(url)
    assert "secret" not in str(told.value)


def test_a_url() -> None:
    session = Session()
    found = parse("sqs://us-gov-west-1?namespace=shop&wait=20&endpoint_url=http://127.0.0.1:4588")
    assert (found.region, found.namespace, found.wait) == ("us-gov-west-1", "shop", 20)
    assert parse("sqs://").region is None
    for partition in session.get_available_partitions():
        for region in session.get_available_regions("sqs", partition):
            assert parse(f"sqs://{region}").region == region


@given(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}", fullmatch=True), unique=True))
def test_names_are_taken_and_differ(names: list[str]) -> None:
    """Whatever the names, no two places are the same, be they of queues or of dead letters."""
    places = [ADDRESS.place(name, ordered=o, dead=d) for name in names for o in (False, True) for d in (False, True)]
    assert len(set(places)) == len(places)
    for place in places:
        assert len(place) <= 80
        assert set(place.removesuffix(".fifo")) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
        )
    for name in names:
        assert ADDRESS.name_at(ADDRESS.place(name)) in (name, None)


def test_a_usual_name_can_be_read() -> None:
    assert ADDRESS.place("order.paid-eu", dead=True) == "postroom-order_paid-eu--dead"
    assert ADDRESS.place("order_paid").startswith("postroom-order_paid--")


@given(MESSAGES)
def test_a_message_comes_back_as_it_was(sent: Message) -> None:
    copy = pack(sent)
    made = entry(copy, fifo=False)
    assert len(made["MessageAttributes"]) <= 10
    assert made["MessageBody"]
    came = read(made["MessageBody"], made["MessageAttributes"], "other", "other", None)
    assert unpack(came.text, came.envelope) == sent


def test_what_the_store_beside_has_heeded_is_not_sent() -> None:
    sent = message(idempotency_key="k", unique="until_started", replace=True)
    copy = pack(sent)
    came = unpack(copy.text, copy.envelope)
    assert (came.id, came.body, came.unique, came.replace) == (sent.id, sent.body, None, False)


def test_a_json_body_stays_what_it_is() -> None:
    made = entry(pack(message(body='{"name": "Grüße"}'.encode())), fifo=False)
    assert made["MessageBody"] == '{"name": "Grüße"}'


def test_others_read_what_is_in_it() -> None:
    told = attributes_of(pack(message(headers={"region": "eu"}, created_at=1.5)).envelope)
    values = {name: value["StringValue"] for name, value in told.items() if name != "postroom"}
    assert values == {
        "ce-id": "i",
        "ce-source": "t",
        "ce-type": "n",
        "ce-specversion": "1.0",
        "ce-time": "1970-01-01T00:00:01.500000Z",
        "region": "eu",
    }


@pytest.mark.parametrize(
    "headers",
    [{str(n): "x" for n in range(5)}, {"a b": "x"}, {"ce-id": "x"}, {"postroom": "x"}, {"AWS.x": "x"}, {"a": ""}],
)
def test_headers_that_cannot_all_be_shown_are_left_to_the_consumer(headers: dict[str, str]) -> None:
    told = attributes_of(pack(message(headers=headers)).envelope)
    assert told[UNFILTERED]["StringValue"] == "1"
    assert len(told) <= 10


def test_filter_policies() -> None:
    assert filter_policy({}) is None
    assert filter_policy({"region": "eu"}) == {"$or": [{"region": ["eu"]}, {UNFILTERED: ["1"]}]}
    assert filter_policy({"a b": "x"}) == {UNFILTERED: ["1"]}


def test_the_size_counts_everything() -> None:
    """Exactly what fits is taken, one byte more is not; a message for SNS has the limit of its topic."""
    room = MOST_BYTES - HISTORY_ROOM
    headers = {"x": "y" * 500_000}
    rest = pack(message(body=b"{", headers=headers)).size - 1
    assert pack(message(body=b"x" * (room - rest), headers=headers)).size == room
    for body, limit in ((b"x" * (room - rest + 1), MOST_BYTES), (b"x" * 70_000, 524_288)):
        with pytest.raises(MessageTooLarge):
            pack(message(body=body, headers=headers), limit)


def test_half_a_surrogate_is_told() -> None:
    with pytest.raises(EncodeError):
        pack(message(headers={"x": "\ud800"}))


def test_of_too_long_a_history_the_oldest_tracebacks_go() -> None:
    failures = tuple(Failure(attempt=n, reason="error", message="kept", traceback="\0" * 40_000) for n in range(1, 11))
    copy = pack(message()).changed(failures=failures)
    assert copy.size <= MOST_BYTES
    kept = [bool(failure.traceback) for failure in copy.envelope.failures]
    assert kept == sorted(kept)
    assert 0 < sum(kept) < 10
    assert all(failure.message == "kept" for failure in copy.envelope.failures)


def test_of_a_history_that_is_too_long_all_the_same_the_oldest_failures_go() -> None:
    """It must always fit, or the message could neither come again nor become a dead letter."""
    failure = Failure(attempt=1, reason="error", error="x" * 500, message="m", traceback="t", worker="host:1")
    copy = pack(message(body=b"x" * 500_000, headers={"h": "y" * 520_000}))
    failures = [msgspec.structs.replace(failure, attempt=number) for number in range(1, 101)]
    changed = copy.changed(failures=tuple(failures), counted=100)
    assert changed.size <= MOST_BYTES
    kept = [one.attempt for one in changed.envelope.failures]
    assert kept == list(range(101 - len(kept), 101))
    assert 10 < len(kept) < 100


@pytest.mark.parametrize("seconds", [1e17, -1e17, 1e300, float("inf")])
def test_a_time_beyond_all_calendars_is_only_not_shown(seconds: float) -> None:
    assert "ce-time" not in attributes_of(pack(message(created_at=seconds)).envelope)


@pytest.mark.parametrize("theirs", ["0001-01-01T00:00:00", "9999-12-31T23:59:59-23:59", "yesterday", "0"])
def test_somebody_elses_time_costs_no_message(theirs: str) -> None:
    came = read("{}", {"ce-time": {"StringValue": theirs}}, "identity", "mail", None)
    assert came.envelope.id == "identity"


def test_a_delay_is_whole_seconds_and_never_early() -> None:
    copy = pack(message())
    assert "DelaySeconds" not in entry(copy, fifo=False, delay=-1.0)
    assert entry(copy, fifo=False, delay=0.01)["DelaySeconds"] == 1
    assert entry(copy, fifo=False, delay=2.0)["DelaySeconds"] == 2
    assert entry(copy, fifo=False, delay=100_000.0)["DelaySeconds"] == 900
    assert "DelaySeconds" not in entry(copy, fifo=True, delay=5.0)


def test_groups_of_an_ordered_queue() -> None:
    """A key, also an empty or an odd one, is a group; without a key each message is its own."""
    keys = ["", "k", "Grüße", "x" * 500, "a b", None]
    groups = [entry(pack(message(key=key)), fifo=True)["MessageGroupId"] for key in keys]
    assert len(set(groups)) == len(keys)
    assert all(0 < len(group) <= 128 and group.isascii() and " " not in group for group in groups)
    assert entry(pack(message(id="other")), fifo=True)["MessageGroupId"] != groups[-1]


@pytest.mark.parametrize("group", ["key:user-7", "user-7"])
def test_the_group_of_another_client_is_the_key(group: str) -> None:
    """With ``key:`` before it it is the group of ours, and one that is redriven comes back into it."""
    came = read("{}", {}, "identity", "mail", group)
    assert came.envelope.key == "user-7"
    assert entry(came, fifo=True)["MessageGroupId"] == "key:user-7"


def test_tags_tell_what_was_declared() -> None:
    declared = Subscription(name="audit", pattern="order.*.#", where={"region": "e=u ü"})
    tags = tags_of(declared, False)
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _.:/=+-@")
    assert all(set(value) <= allowed for value in tags.values())
    kept = kept_from("http://x/1/postroom-audit", tags)
    assert kept is not None
    assert (kept.declared, kept.queue, kept.dead_url) == (declared, False, "http://x/1/postroom-audit--dead")
    with pytest.raises(ConfigurationError, match="where needs"):
        tags_of(Subscription(name="audit", pattern="x", where={"region": "x" * 300}), False)


def test_a_queue_cannot_become_ordered() -> None:
    kept = kept_from("http://x/1/postroom-q", tags_of(Subscription(name="q", pattern="q"), True))
    assert kept is not None
    with pytest.raises(ConfigurationError, match="FIFO queue is another kind"):
        check({"q": kept}, [Topic(name="q", queue=True)], [Subscription(name="q", pattern="q", ordered=True)])


def batches(entries: list[dict[str, Any]], *, lanes: int = 8, room: int = 1000, fail: int = -1) -> tuple[Any, Answers]:
    sent: list[list[dict[str, Any]]] = []

    async def call(batch: list[dict[str, Any]]) -> Answers:
        number = len(sent)
        sent.append(batch)
        await asyncio.sleep(0)
        if number == fail:
            raise BrokerUnavailable("gone")
        return [None] * len(batch)

    async def run() -> Answers:
        return await Batcher(call, lanes, room).all(entries)

    return sent, asyncio.run(run())


def test_batches_are_full_and_no_larger_than_they_may_be() -> None:
    entries: list[dict[str, Any]] = [{"ReceiptHandle": str(n)} for n in range(25)]
    sent, answers = batches(entries)
    assert [len(batch) for batch in sent] == [10, 10, 5]
    assert answers == [None] * 25
    large = [entry(pack(message(body=b"x" * 300)), fifo=False) for _ in range(3)]
    sent, _ = batches(large, room=2 * size_of(large[0]))
    assert [len(batch) for batch in sent] == [2, 1]


def test_what_must_keep_its_order_does_not_overtake_what_failed() -> None:
    entries: list[dict[str, Any]] = [{"ReceiptHandle": str(n)} for n in range(25)]
    sent, answers = batches(entries, lanes=1, fail=1)
    assert [len(batch) for batch in sent] == [10, 10]
    assert [answer is None for answer in answers] == [True] * 10 + [False] * 15
    sent, answers = batches(entries, fail=1)
    assert [answer is None for answer in answers] == [True] * 10 + [False] * 10 + [True] * 5


def _client_error(code: str, status: int = 400, message: str = "") -> ClientError:
    response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "x")


@pytest.mark.parametrize(
    ("error", "what", "kind"),
    [
        (_client_error("AWS.SimpleQueueService.NonExistentQueue"), "sqs:x", Missing),
        (_client_error("RequestThrottled"), "sqs:x", BrokerUnavailable),
        (_client_error("ThrottlingException"), "sqs:x", BrokerUnavailable),
        (_client_error("ExpiredToken", 403), "sqs:x", BrokerUnavailable),
        (_client_error("OverLimit", 403), "sqs:receive_message", BrokerUnavailable),
        (_client_error("KMS.ThrottlingException"), "sqs:x", BrokerUnavailable),
        (_client_error("KMSThrottling"), "sns:x", BrokerUnavailable),
        (
            _client_error("SignatureDoesNotMatch", 403, "Signature expired: 2 is now earlier"),
            "sqs:x",
            BrokerUnavailable,
        ),
        (_client_error("RequestTimeTooSkewed", 403), "sqs:x", BrokerUnavailable),
        (_client_error("Unknown", 503), "sqs:x", BrokerUnavailable),
        (_client_error("KMS.DisabledException"), "sqs:x", ConfigurationError),
        (_client_error("KMS.NotFoundException"), "sqs:x", ConfigurationError),
        (_client_error("KMSAccessDenied"), "sns:x", ConfigurationError),
        (_client_error("SignatureDoesNotMatch", 403), "sqs:x", ConfigurationError),
        (_client_error("AccessDenied", 403), "sqs:x", ConfigurationError),
        (_client_error("InvalidClientTokenId", 403), "sqs:x", ConfigurationError),
        (_client_error("InvalidParameter", 400, "Invalid parameter: Message too long"), "sns:x", MessageTooLarge),
        (
            _client_error("InvalidParameterValue", 400, "Reason: Message must be shorter than 262144 bytes."),
            "send_message_batch",
            MessageTooLarge,
        ),
        (_client_error("ReceiptHandleIsInvalid"), "delete_message_batch", LeaseLost),
        (EndpointConnectionError(endpoint_url="http://x"), "sqs:x", BrokerUnavailable),
        (ReadTimeoutError(endpoint_url="http://x"), "sqs:x", BrokerUnavailable),
        (NoCredentialsError(), "sqs:x", ConfigurationError),
        (ProfileNotFound(profile="x"), "sqs:x", ConfigurationError),
        (CredentialRetrievalError(provider="x", error_msg="x"), "sqs:x", BrokerUnavailable),
        (ConnectionResetError(), "sqs:x", BrokerUnavailable),
    ],
)
def test_errors_in_our_words(error: Exception, what: str, kind: type[PostroomError]) -> None:
    assert type(translated(error, what)) is kind


@pytest.mark.parametrize(
    ("service", "status", "page"),
    [
        ("sns", b"403 Forbidden", b"<html>Please log in<br></html>"),
        ("sqs", b"403 Forbidden", "<html>Zugriff für Gäste</html>".encode("latin-1")),
        ("sqs", b"200 OK", b"[]"),
    ],
)
def test_what_is_no_answer_of_the_service_is_told(
    monkeypatch: pytest.MonkeyPatch, service: str, status: bytes, page: bytes
) -> None:
    """As the page of a proxy, which the client's library cannot read: whoever publishes must not wait for ever."""
    answer = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(page), page)

    async def publish(asked: Service) -> Answers:
        made = entry(pack(message()), fifo=False)
        if service == "sqs":
            return await asked.send("http://queue", [made])
        made["Message"] = made.pop("MessageBody")
        return await asked.publish("arn:aws:sns:eu-west-1:000000000000:t", [made], MOST_BYTES)

    (error,) = answered(monkeypatch, answer, publish)
    assert isinstance(error, BrokerUnavailable)
    assert "proxy" in str(error)


def test_what_the_service_repeats_of_a_request_is_told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers a wrong signature with the request as it saw it, and in that stands the token of a session."""
    page = json.dumps(
        {
            "__type": "com.amazon.coral.service#SignatureDoesNotMatch",
            "message": "The request signature we calculated does not match the signature you provided.\n\n"
            "The Canonical String for this request should have been\n'POST\n/\n\nx-amz-security-token:secret\n'",
        }
    ).encode()
    answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page)

    async def ask(asked: Service) -> None:
        with pytest.raises(ConfigurationError, match="does not match the signature") as told:
            await asked.call("sqs", "list_queues")
        assert "secret" not in str(told.value)

    answered(monkeypatch, answer, ask)


def test_after_the_end_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was still counting queues when the broker was closed would open a connection that nobody closes."""

    async def ask(asked: Service) -> None:
        await asked.close()
        with pytest.raises(BrokerClosed):
            await asked.call("sns", "list_topics")
        assert not asked._clients

    answered(monkeypatch, b"", ask)


def test_a_throttled_queue_slows_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of the others are renewed all the same, through the same client of the library."""
    done = json.dumps({"Successful": [{"Id": "0"}]})
    refused = json.dumps({"__type": "com.amazonaws.sqs#RequestThrottled", "message": "slow down"})

    async def ask(asked: Service) -> float:
        for _ in range(5):
            (error,) = await asked.send("http://busy", [entry(pack(message()), fifo=False)])
            assert isinstance(error, BrokerUnavailable)
        begin = time.monotonic()
        for _ in range(5):
            assert await asked.hide("http://idle", [("receipt", 30)]) == [None]
        return time.monotonic() - begin

    def answer(request: bytes) -> bytes:
        page, status = (refused, "400 Bad Request") if b"http://busy" in request else (done, "200 OK")
        return f"HTTP/1.1 {status}\r\nContent-Length: {len(page)}\r\n\r\n{page}".encode()

    assert answered(monkeypatch, answer, ask) < 2.0


def test_a_poll_that_is_answered_too_soon_is_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the page of a proxy that says OK to all."""
    requests = 0

    def answer(request: bytes) -> bytes:
        nonlocal requests
        requests += 1
        return b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def ask(asked: Service) -> None:
        kept = kept_from("http://x/1/postroom-q", tags_of(Subscription(name="q", pattern="q"), True))
        assert kept is not None
        consumer = SQSConsumer(asked, kept, 30.0, clock=SystemClock(), memory=Memory(), closed=lambda closed: None)
        assert await consumer.receive(10, 2.0) == []
        await consumer.close()

    answered(monkeypatch, answer, ask)
    assert requests <= 3


def answered(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | Callable[[bytes], bytes], use: Callable[[Service], Awaitable[Any]]
) -> Any:
    """What comes of ``use`` at a server that gives this answer to whatever it is asked."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.I)
        body = await reader.readexactly(int(length[1])) if length else b""
        writer.write(answer if isinstance(answer, bytes) else answer(body))
        await writer.drain()
        writer.close()

    async def run() -> Any:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            service = Service(parse(f"sqs://eu-west-1?endpoint_url=http://127.0.0.1:{port}"))
            try:
                async with asyncio.timeout(20):
                    return await use(service)
            finally:
                await service.close()

    return asyncio.run(run())


def test_somebody_elses_attribute_of_our_name() -> None:
    """It is no message of ours, but a message: nothing of it is lost."""
    deep = '{"id": "i", "topic": "t", "name": "n", "x": %s}' % ("[" * 10_000 + "]" * 10_000)
    for theirs in ("not JSON", "{}", json.dumps({"id": 1}), deep):
        attributes = {"postroom": {"StringValue": theirs}, "ce-type": {"StringValue": "work"}}
        came = read("{}", attributes, "identity", "mail", None)
        assert (came.envelope.id, came.envelope.name) == ("identity", "work")


@pytest.mark.parametrize("body", ["Grüße", "abc"])
def test_a_body_that_is_not_the_base64_it_claims_to_be(body: str) -> None:
    """C10: it is delivered as it is. Who takes it would otherwise end, and so would the next who takes it."""
    claim = {"id": "i", "topic": "mail", "name": "work", "base64": True}
    came = read(body, {"postroom": {"StringValue": json.dumps(claim)}}, "identity", "mail", None)
    assert unpack(came.text, came.envelope).body == body.encode()
