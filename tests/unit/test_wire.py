"""What a worker and its child processes say to each other arrives as it was said."""

from __future__ import annotations

import pytest

from postroom.broker.base import Ack, Cancel, Dead, Outcome, Release, Retry
from postroom.message import Failure, Message, Progress
from postroom.worker import wire

PLAIN = {"id": "1", "topic": "q", "name": "t", "body": b"\x00\xff", "created_at": 1.5}
FAILURE = Failure(attempt=2, reason="error", error="ValueError", message="no", traceback="…")


@pytest.mark.parametrize(
    "message",
    [Message(**PLAIN), Message(**PLAIN, headers={}), Message(**PLAIN, headers={"Region": "eü"}, key="k", priority=9)],
    ids=["no headers", "empty headers", "headers"],
)
def test_a_request_arrives_whole(message: Message) -> None:
    request = wire.Request(message, "q", 3)
    arrived = wire.decode_request(wire.encode_request(request))
    assert arrived == request
    assert dict(arrived.message.headers) == dict(message.headers)


@pytest.mark.parametrize(
    "reply",
    [
        Ack(b"[1]"),
        Ack(),
        Cancel(),
        Dead(FAILURE),
        Release(2.5),
        Retry(delay=1.0, failure=FAILURE, suspect=True),
        Progress(0.5, "half"),
        wire.READY,
    ],
    ids=repr,
)
def test_a_reply_arrives_whole(reply: Outcome | Progress | str) -> None:
    assert wire.decode_reply(wire.encode_reply(reply)) == reply
