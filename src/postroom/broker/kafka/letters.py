"""Dead letters: a compacted topic a subscription, one record for each message that died.

It also keeps the history of what an ordered subscription tries again: such a message stays where it is, in front of
its key, and Kafka cannot change a record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

import msgspec

from postroom.broker.kafka import wire
from postroom.broker.kafka.options import Names
from postroom.broker.kafka.reader import Place, Reader
from postroom.broker.kafka.sender import Sender
from postroom.broker.kafka.wire import Envelope, Record
from postroom.message import DeadLetter, Message

_NEAR = 500
"""Records that are cheaper read than jumped over."""


def letter_record(names: Names, subscription: str, envelope: Envelope, now: float) -> Record:
    """What keeps a message that died. ``envelope``: with its last failure."""
    return envelope_record(names, subscription, envelope, [("postroom-dead-at", repr(now).encode())])


def trial_record(names: Names, subscription: str, envelope: Envelope, place: Place, offset: int) -> Record:
    """What keeps the history of a message that is tried again where it is."""
    state = f"{place[0]}/{place[1]}/{offset}".encode()
    return envelope_record(names, subscription, envelope, [("postroom-state", state)])


def envelope_record(names: Names, subscription: str, envelope: Envelope, more: wire.Headers) -> Record:
    record = wire.envelope_record(envelope, names.dead(subscription), more, 0)
    # Compaction goes by the id; the message's own key would make one letter of all with that key.
    key = envelope.message.key
    headers = record.headers if key is None else [*record.headers, ("postroom-key", key.encode())]
    return record._replace(key=_key(envelope.message), headers=headers)


def gone_record(names: Names, subscription: str, message: Message) -> Record:
    return Record(names.dead(subscription), _key(message), None, [], 0)


def _key(message: Message) -> bytes:
    """By what a letter is kept: clients other than ours may give one id to many messages, and each is its own."""
    return f"{message.id}\n{sha256(message.body).hexdigest()[:16]}".encode()


class Letters:
    """Of one subscription: an index of what is where, read on from where it was last read."""

    def __init__(self, names: Names, subscription: str, reader: Reader, sender: Sender) -> None:
        self._names = names
        self._subscription = subscription
        self._topic = names.dead(subscription)
        self._reader = reader
        self._sender = sender
        self.redriving = asyncio.Lock()
        """Whoever asks a second time meanwhile finds nothing left to move."""
        self._read_to = 0
        self._dead: dict[str, dict[bytes, int]] = {}
        """By id, in the order of death: where each letter is."""
        self._trials: dict[str, Envelope] = {}
        """By place."""
        self._trial_of: dict[bytes, str] = {}

    async def refresh(self) -> None:
        await self._reader.call(self._refresh)

    def trial(self, place: Place, offset: int) -> Envelope | None:
        """What has happened to the message there; known since the last ``refresh``."""
        return self._trials.get(f"{place[0]}/{place[1]}/{offset}")

    async def count(self) -> int:
        await self.refresh()
        return sum(map(len, self._dead.values()))

    async def page(self, ids: Sequence[str] | None, after: str | None, limit: int) -> list[DeadLetter]:
        """See ``Broker.dead_letters``."""

        def read(reader: Reader) -> list[DeadLetter]:
            self._refresh(reader)
            wanted = self._dead if ids is None else {each: self._dead[each] for each in self._dead if each in set(ids)}
            if after in self._dead:
                last = max(self._dead[after].values())
                wanted = {each: found for each, found in wanted.items() if max(found.values()) > last}
            offsets: list[int] = []
            for found in wanted.values():  # Those of one id stay together: the next page begins behind them.
                if len(offsets) >= limit:
                    break
                offsets += found.values()
            return [self._letter(record) for record in self._fetch(reader, sorted(offsets))]

        return await self._reader.call(read)

    async def envelopes(self, ids: Iterable[str]) -> list[Envelope]:
        """Those of the ids that are dead."""

        def read(reader: Reader) -> list[Envelope]:
            self._refresh(reader)
            offsets = [offset for each in set(ids) for offset in self._dead.get(each, {}).values()]
            return [self._envelope(record) for record in self._fetch(reader, sorted(offsets))]

        return await self._reader.call(read)

    async def bury_no_more(self, messages: Iterable[Message]) -> None:
        """Delete the letters of these."""
        await self._sender.deliver(
            "cannot delete dead letters", [gone_record(self._names, self._subscription, each) for each in messages]
        )

    def _refresh(self, reader: Reader) -> None:
        end = reader.bounds(self._topic)[1]
        for record in reader.records({(self._topic, 0): (self._read_to, end)}):
            key = record.key() or b""
            message_id = key.rpartition(b"\n")[0].decode(errors="replace")
            others = self._dead.pop(message_id, {})
            others.pop(key, None)
            self._trials.pop(self._trial_of.pop(key, ""), None)
            state = wire.header(record, "postroom-state")
            if state is not None:
                self._trial_of[key] = state.decode(errors="replace")
                self._trials[self._trial_of[key]] = self._envelope(record)
            elif record.value() is not None:
                others[key] = record.offset()
            if others:
                self._dead[message_id] = others
        self._read_to = max(end, self._read_to)

    def _fetch(self, reader: Reader, offsets: list[int]) -> list[Any]:
        found: list[Any] = []
        while offsets:
            stretch = [offsets[0]]
            while len(stretch) < len(offsets) and offsets[len(stretch)] - stretch[-1] < _NEAR:
                stretch.append(offsets[len(stretch)])
            wanted = set(stretch)
            span = (stretch[0], stretch[-1] + 1)
            found += [record for record in reader.records({(self._topic, 0): span}) if record.offset() in wanted]
            offsets = offsets[len(stretch) :]
        return found

    def _envelope(self, record: Any) -> Envelope:
        envelope = wire.read(record, "")
        key = wire.header(record, "postroom-key")
        message = msgspec.structs.replace(envelope.message, key=None if key is None else key.decode())
        return msgspec.structs.replace(envelope, message=message)

    def _letter(self, record: Any) -> DeadLetter:
        envelope = self._envelope(record)
        died = wire.header(record, "postroom-dead-at")
        return DeadLetter(
            message=envelope.message,
            subscription=self._subscription,
            failures=tuple(envelope.failures()),
            dead_at=float(died) if died else record.timestamp()[1] / 1000,
            redriven=envelope.redriven,
        )
