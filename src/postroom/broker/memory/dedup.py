"""Idempotency keys within their windows."""

from __future__ import annotations

import heapq
from hashlib import sha256
from typing import NamedTuple

from postroom.errors import IdempotencyConflict
from postroom.message import Message


class _First(NamedTuple):
    id: str
    fingerprint: tuple[str, bytes]
    until: float


class Dedup:
    """The first message of each (topic, idempotency key), remembered until its window is over."""

    def __init__(self) -> None:
        self._firsts: dict[tuple[str, str], _First] = {}
        self._ends: list[tuple[float, tuple[str, str]]] = []

    def find(self, message: Message) -> str | IdempotencyConflict | None:
        """The id of the first message with the key of this one; an error if the two differ; ``None`` if it is first."""
        if message.idempotency_key is None:
            return None
        first = self._firsts.get((message.topic, message.idempotency_key))
        if first is None:
            return None
        if first.fingerprint != _fingerprint(message):
            return IdempotencyConflict(
                f"idempotency key {message.idempotency_key!r} was used in {message.topic!r} for another call "
                f"(message {first.id}); use a new key, or the same name and arguments"
            )
        return first.id

    def remember(self, message: Message, now: float) -> None:
        if message.idempotency_key is None:
            return
        key, until = (message.topic, message.idempotency_key), now + message.dedup_window
        self._firsts[key] = _First(message.id, _fingerprint(message), until)
        heapq.heappush(self._ends, (until, key))

    def forget(self, now: float) -> None:
        """Drop the keys whose window is over."""
        while self._ends and self._ends[0][0] <= now:
            until, key = heapq.heappop(self._ends)
            if key in self._firsts and self._firsts[key].until == until:
                del self._firsts[key]


def _fingerprint(message: Message) -> tuple[str, bytes]:
    return message.name, sha256(message.body).digest()
