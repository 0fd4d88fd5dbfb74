"""What has become of one copy of a message: how often it failed, how, and when it is due."""

from __future__ import annotations

import zlib

import msgspec

from postroom.message import DeadLetter, Failure, Message

MAX_HISTORY = 24 * 1024
"""Bytes of the history, packed. Above it the oldest tracebacks are cut first."""
_PLAIN_HISTORY = 4096


class Copy(msgspec.Struct, kw_only=True):
    """A message in one subscription, with its fate. ``deaths``: how often its holder died, as the server counts."""

    message: Message
    counted: int = 0
    suspect: bool = False
    due: float | None = None
    replayed: bool = False
    redriven: int = 0
    dead_at: float | None = None
    deaths: int = 0
    packed: str | bytes = ""
    """Its failures, unpacked only when they are needed."""
    nameless: bool = False
    """Another client's message without an id: it must be given one before it is handed out."""
    oversized: bool = False
    """Another client's message that cannot be stored again: with what we add its headers exceed a frame."""

    @property
    def attempt(self) -> int:
        return 1 + self.counted + self.deaths

    @property
    def is_suspect(self) -> bool:
        return self.suspect or self.deaths > 0

    def failures(self) -> tuple[Failure, ...]:
        """All there were, with one for every death that only the server has counted."""
        deaths = range(self.counted + 1, self.attempt)
        note = "its worker died or lost the connection"
        return _unpacked(self.packed) + tuple(
            Failure(attempt=attempt, reason="worker_lost", message=note) for attempt in deaths
        )

    def released(self, due: float | None = None) -> Copy:
        """To be delivered again, uncounted."""
        return self._next(counted=self.attempt - 1, failures=self.failures(), suspect=self.is_suspect, due=due)

    def failed(self, failure: Failure, *, suspect: bool, due: float | None = None) -> Copy:
        return self._next(counted=self.attempt, failures=(*self.failures(), failure), suspect=suspect, due=due)

    def buried(self, failure: Failure, now: float) -> Copy:
        copy = self._next(counted=self.attempt, failures=(*self.failures(), failure), suspect=False, due=None)
        return msgspec.structs.replace(copy, dead_at=now)

    def revived(self, now: float) -> Copy:
        """A dead letter to be handled once more; whoever redrives wants that, so it no longer expires."""
        expires_at = self.message.expires_at
        message = self.message
        if expires_at is not None and expires_at <= now:
            message = msgspec.structs.replace(message, expires_at=None)
        return Copy(message=message, redriven=self.redriven + 1, packed=_packed(self.failures()))

    def letter(self, subscription: str) -> DeadLetter:
        return DeadLetter(
            message=self.message,
            subscription=subscription,
            failures=self.failures(),
            dead_at=self.dead_at or 0.0,
            redriven=self.redriven,
        )

    def _next(self, *, counted: int, failures: tuple[Failure, ...], suspect: bool, due: float | None) -> Copy:
        return Copy(
            message=self.message,
            counted=counted,
            suspect=suspect,
            due=due,
            replayed=self.replayed,
            redriven=self.redriven,
            packed=_packed(failures),
            oversized=self.oversized,
        )


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(tuple[Failure, ...]).decode


def _packed(failures: tuple[Failure, ...]) -> str | bytes:
    plain = _encode(failures) if failures else b""
    if len(plain) <= _PLAIN_HISTORY:
        return plain.decode()
    packed = zlib.compress(plain, 1)
    for field in ("traceback", "message"):
        for number in range(len(failures)):
            if len(packed) <= MAX_HISTORY:
                return packed
            cut = msgspec.structs.replace(failures[number], **{field: ""})
            failures = (*failures[:number], cut, *failures[number + 1 :])
            packed = zlib.compress(_encode(failures), 1)
    return packed


def _unpacked(packed: str | bytes) -> tuple[Failure, ...]:
    if not packed:
        return ()
    try:
        return _decode(zlib.decompress(packed) if isinstance(packed, bytes) else packed)
    except (zlib.error, msgspec.DecodeError):
        # Another client has set or damaged the header: the message is worth more than its history.
        return ()
