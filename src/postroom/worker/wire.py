"""What a worker and its child processes say to each other: MessagePack, never pickle."""

from __future__ import annotations

from typing import Any

import msgspec

from postroom.broker.base import Ack, Cancel, Dead, Outcome, Release, Retry
from postroom.message import Message, Progress

READY = "Ready"
"""The child has imported the app; or, each time it is asked: it is there, its resources are open."""

_REPLIES: dict[str, Any] = {kind.__name__: kind for kind in (Ack, Cancel, Dead, Release, Retry, Progress)}


class Request(msgspec.Struct, frozen=True):
    """One attempt for the child to run."""

    message: Message
    subscription: str
    attempt: int


_request: msgspec.msgpack.Decoder[Request | None] = msgspec.msgpack.Decoder(Request | None)
_reply = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])


def encode_request(request: Request | None) -> bytes:
    """``None`` asks the child whether it is there. It comes first: then the child opens the app's resources."""
    # A message without headers has a read-only mapping of none, which MessagePack does not know.
    return msgspec.msgpack.encode(request, enc_hook=dict)


def decode_request(data: bytes) -> Request | None:
    return _request.decode(data)


def encode_reply(reply: Outcome | Progress | str) -> bytes:
    name = reply if isinstance(reply, str) else type(reply).__name__
    return msgspec.msgpack.encode((name, reply))


def decode_reply(data: bytes) -> Outcome | Progress | str:
    """An outcome, progress, or ``READY``."""
    name, body = _reply.decode(data)
    reply: Outcome | Progress | str = name if name == READY else msgspec.msgpack.decode(body, type=_REPLIES[name])
    return reply
