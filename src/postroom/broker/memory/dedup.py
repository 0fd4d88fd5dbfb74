"""Idempotency keys within their windows."""

from __future__ import annotations

import heapq
from hashlib import sha256
from math import inf
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

    def holder(self, message: Message) -> str | None:
        """The id of the first message with the key of this one, if there is one."""
        first = self._firsts.get((message.topic, message.idempotency_key or ""))
        return None if first is None else first.id

    def find(self, message: Message) -> str | IdempotencyConflict | None:
        """The same; an error if the two differ."""
        first = self._firsts.get((message.topic, message.idempotency_key or ""))
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
        key = (message.topic, message.idempotency_key)
        until = inf if message.unique is not None else now + message.dedup_window
        self._firsts[key] = _First(message.id, _fingerprint(message), until)
        if message.unique is None:
            heapq.heappush(self._ends, (until, key))

    def release(self, message: Message) -> None:
        """Nothing is left of a message: the key that only it held is free."""
        if message.unique is not None and self.holder(message) == message.id:
            del self._firsts[(message.topic, message.idempotency_key or "")]

    def forget(self, now: float) -> None:
        """Drop the keys whose window is over."""
        while self._ends and self._ends[0][0] <= now:
            until, key = heapq.heappop(self._ends)
            if key in self._firsts and self._firsts[key].until == until:
                del self._firsts[key]


def _fingerprint(message: Message) -> tuple[str, bytes]:
    return message.name, sha256(message.body).digest()
