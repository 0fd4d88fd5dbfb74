"""The consumer of an ordered subscription.

The server hands all of it to one consumer only, in publish order (single active consumer), and that one sees to the
order of each key. So nothing is stored again, which would put it behind: what failed waits here, in its place. What
must outlive this process stands in the subscription's state, a message of its own: the failures of what waits, and
what was handed out. Who comes next reads it, and knows of each message whether it had been tried when its holder died.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from postroom.broker.amqp import outcomes, wire
from postroom.broker.amqp.consumer import AMQPConsumer
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.held import Held, ack
from postroom.broker.amqp.office import Office
from postroom.broker.amqp.subscriber import Subscriber
from postroom.broker.base import Dead, Delivery, Release, Retry
from postroom.errors import BrokerUnavailable, SettlementError
from postroom.message import Failure

logger = logging.getLogger("postroom.broker.amqp")

WINDOW = 1000
"""Messages looked at in advance: keys that wait hold up the others once they fill it."""

_LINGER = 0.1
"""Seconds without a ``receive`` after which another consumer has its turn."""
_RENEWAL = 600.0
"""Seconds after which what only waits here is taken anew: the server allows half an hour (``consumer_timeout``)."""
_LARGEST_STATE = 8 * 1024 * 1024
"""Bytes; half of what a server takes unless told otherwise."""
_INHERITED = 60.0
"""Seconds in which everything a predecessor held has surely come."""


class Note(msgspec.Struct, omit_defaults=True):
    """What has become of one message, beyond what it carries itself."""

    counted: int = 0
    suspect: bool = False
    due: float | None = None
    packed: Any = ""
    """Text or bytes, as in :class:`Copy`."""
    handed: bool = False
    """It was handed out: if its holder is no more, it was tried."""


_decode = msgspec.msgpack.Decoder(dict[str, Note]).decode


class OrderedConsumer(AMQPConsumer):
    """See :class:`postroom.broker.base.Consumer`. While it holds nothing and nobody receives, another has its turn."""

    def __init__(self, office: Office, name: str, lease: float, closed: Callable[[AMQPConsumer], None]) -> None:
        super().__init__(office, name, lease, closed)
        self._turns = 0
        self._window: dict[int, Held] = {}
        """By delivery tag, and so in publish order."""
        self._early: list[Held] = []
        """Came before the state was read."""
        self._inherited: dict[str, Note] = {}
        self._loading: asyncio.Task[None] | None = None
        self._is_loaded = False
        self._loaded_at = 0.0
        self._version = 0
        self._next_save: asyncio.Task[None] | None = None
        self._saving = asyncio.Lock()

    @property
    def waiting(self) -> int:
        return sum(1 for _ in self._ready())

    @property
    def delayed(self) -> int:
        return len(self._window) - len(self._leased) - self.waiting

    def purge(self) -> int:
        purged = [held for held in self._window.values() if held not in self._leased]
        for held in purged:
            del self._window[held.tag]
        ack(purged)
        return len(purged)

    # Receiving

    def _demand(self, max_messages: int) -> int:
        return WINDOW

    async def _subscribe(self) -> Subscriber:
        # What still comes of a channel whose turn has been passed on must not be taken for the next one's.
        self._turns += 1
        turn = self._turns

        def arrived(*delivery: Any) -> None:
            if turn == self._turns:
                self._arrived(*delivery)

        def lost() -> None:
            if turn == self._turns:
                self._lost()

        return await self._office.subscribe(self._name, arrived, lost)

    def _forget(self) -> None:
        super()._forget()
        self._window.clear()
        self._early.clear()
        self._inherited = {}
        self._is_loaded = False
        if self._loading is not None:
            self._loading.cancel()
            self._loading = None

    def _arrived(
        self, _: str, tag: int, is_again: bool, exchange: str, routing_key: str, properties: Any, body: bytes
    ) -> None:
        assert self._source is not None
        copy = wire.read(properties, body, lambda: self._office.topic_of(exchange, routing_key))
        # How often the server has handed it over tells nothing here: all of the window goes from holder to holder.
        held = Held(msgspec.structs.replace(copy, deaths=0), self._source, tag, self._loop.time())
        if self._sets_aside(held):
            return
        if self._is_loaded:
            self._admit(held)
        else:
            self._early.append(held)
            if self._loading is None:
                # Whoever gets a message is the active one: nobody else writes the state any more.
                self._loading = self._start(self._load())

    async def _load(self) -> None:
        source = self._source
        try:
            self._version, state = await self._office.recall(self._name)
        except BrokerUnavailable:
            if source is not None:
                await source.close()
            raise
        self._inherited = _notes(state, self._name)
        self._is_loaded, self._loaded_at = True, self._loop.time()
        for held in self._early:
            self._admit(held)
        self._early.clear()

    def _admit(self, held: Held) -> None:
        note = self._inherited.pop(held.copy.message.id, None)
        if note is not None:
            copy = held.copy
            copy.counted, copy.suspect, copy.due, copy.packed = note.counted, note.suspect, note.due, note.packed
            copy.deaths = int(note.handed)
            held.copy = copy.released(note.due)
        self._window[held.tag] = held
        self._wake.set()

    def _ready(self) -> Iterator[Held]:
        """Those whose turn it is: of each key the first, if its time has come and it is not running."""
        now = self._office.clock.now()
        busy: set[str] = set()
        for held in list(self._window.values()):
            message = held.copy.message
            if message.key is not None and message.key in busy:
                continue
            if held not in self._leased and message.expires_at is not None and message.expires_at <= now:
                del self._window[held.tag]
                ack([held])
                continue
            if message.key is not None:
                busy.add(message.key)
            if held not in self._leased and (held.copy.due is None or held.copy.due <= now):
                yield held

    def _take(self, count: int) -> list[Delivery]:
        suspects = 0 if any(held.copy.is_suspect for held in self._leased) else 1
        until = self._loop.time() + self._lease
        taken: list[Held] = []
        for held in self._ready():
            if held.copy.is_suspect:
                if not suspects:
                    continue
                suspects -= 1
            held.until = until
            taken.append(held)
            if len(taken) == count:
                break
        self._leased.update(taken)
        return [self._delivery(held) for held in taken]

    async def _hand_out(self, deliveries: Sequence[Delivery]) -> None:
        try:
            await self._save()
        except BaseException:
            for delivery in deliveries:
                self._leased.discard(delivery.receipt)
            raise

    # Settling

    async def _perform(self, chosen: outcomes.Chosen) -> dict[int, SettlementError]:
        """The dead are stored before they go; what comes back is noted before anybody is told so."""
        now = self._office.clock.now()
        dead = {
            i: held.copy.buried(outcome.failure, now)
            for i, (held, outcome) in chosen.items()
            if isinstance(outcome, Dead)
        }
        answers = zip(dead, await self._office.bury(self._name, list(dead.values())), strict=True)
        errors = outcomes.refused(chosen, dict(answers))
        # Meanwhile the turn may have been lost and come again: the same tags then stand for other messages.
        errors |= {index: outcomes.lost(held) for index, (held, _) in chosen.items() if not held.is_ours}
        gone: list[Held] = []
        kept: dict[Held, Copy] = {}
        for index, (held, outcome) in chosen.items():
            if index in errors:
                continue
            if isinstance(outcome, Retry):
                kept[held] = held.copy.failed(outcome.failure, suspect=outcome.suspect, due=_due(now, outcome.delay))
            elif isinstance(outcome, Release):
                kept[held] = held.copy.released(_due(now, outcome.delay))
            else:
                gone.append(held)
        self._drop(gone)
        for held, copy in kept.items():
            self._keep(held, copy)
        if kept:
            await self._save()
        if gone:
            await gone[0].source.barrier()
        for held in (*gone, *kept):
            held.is_settled = True
        self._wake.set()
        return errors

    def _drop(self, gone: Sequence[Held]) -> None:
        for held in gone:
            self._window.pop(held.tag, None)
        self._leased.difference_update(gone)
        ack(gone)

    def _keep(self, held: Held, copy: Copy) -> None:
        """It stays in its place, to be handed out anew."""
        self._leased.discard(held)
        self._window[held.tag] = Held(copy, held.source, held.tag, held.until)

    # The state

    async def _save(self) -> None:
        """Write the state as it is then; many share one writing. Raises ``BrokerUnavailable``."""
        if self._next_save is None:
            self._next_save = self._loop.create_task(self._write())
        await asyncio.shield(self._next_save)

    async def _write(self) -> None:
        async with self._saving:
            self._next_save = None
            if not self._is_loaded:
                # The state is the next one's by now, and an empty window would wipe out what it must know.
                raise BrokerUnavailable(f"{self._name}: the connection was lost before the state was written")
            self._version += 1
            await self._office.remember(self._name, self._version, _packed(self._state()))

    def _state(self) -> dict[str, Note]:
        if self._loop.time() - self._loaded_at > _INHERITED:
            self._inherited = {}
        state = dict(self._inherited)
        for held in self._window.values():
            copy, is_leased = held.copy, held in self._leased
            if is_leased or copy.counted or copy.suspect or copy.due is not None:
                state[copy.message.id] = Note(copy.counted, copy.suspect, copy.due, copy.packed, is_leased)
        return state

    # Looking after

    def _look_after(self, source: Subscriber, now: float) -> None:
        if self._leased or self._tasks or self._next_save is not None or self._saving.locked():
            # Whoever comes next reads the state once: it must be written by then.
            return
        oldest = next(iter(self._window.values()), None)
        is_idle = not self._receiving and now - self._idle_since > _LINGER
        if is_idle or (oldest is not None and now - oldest.until > _RENEWAL):
            self._pass_on(source)

    def _pass_on(self, source: Subscriber) -> None:
        """All that is here goes back in its order, and the next consumer has its turn."""
        self._turns += 1
        self._source = None
        self._forget()
        self._wake.set()
        self._start(source.close())

    def _end_leases(self, now: float) -> None:
        over = [held for held in self._leased if held.until <= now and not held.is_settling]
        for held in over:
            self._keep(held, _given_up(held))
        if over:
            self._start(self._save())
        if over or any(held.copy.due is not None for held in self._window.values()):
            self._wake.set()

    async def _release_all(self) -> None:
        for held in [held for held in self._leased if not held.is_settling]:
            self._keep(held, held.copy.released())
        if self._is_loaded:
            await self._save()


def _notes(state: bytes, name: str) -> dict[str, Note]:
    try:
        return _decode(state) if state else {}
    except msgspec.DecodeError as error:
        # Without it some attempts are counted anew; if nobody went on for it, nothing would run any more.
        logger.error("%s: what was remembered of its failures cannot be read and is left out: %s", name, error)
        return {}


def _packed(state: dict[str, Note]) -> bytes:
    body = msgspec.msgpack.encode(state)
    if len(body) <= _LARGEST_STATE:
        return body
    # A thousand long tracebacks: the server would refuse them, and with them whatever is to be handed out.
    return msgspec.msgpack.encode({name: msgspec.structs.replace(note, packed="") for name, note in state.items()})


def _given_up(held: Held) -> Copy:
    if not held.started:
        return held.copy.released()
    failure = Failure(attempt=held.copy.attempt, reason="worker_lost", message="its lease was not renewed")
    return held.copy.failed(failure, suspect=True)


def _due(now: float, delay: float) -> float | None:
    return now + delay if delay > 0 else None
