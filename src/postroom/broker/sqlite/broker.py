"""The broker on one SQLite file, shared by all processes of one machine."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from postroom.broker.base import PRIORITIES, Broker, Capabilities, Consumer, Subscription, SubscriptionStats, Topic
from postroom.broker.sqlite import doctor, holders, janitor, letters, schema
from postroom.broker.sqlite.bell import Bell
from postroom.broker.sqlite.consumer import SQLiteConsumer
from postroom.broker.sqlite.engine import Engine
from postroom.broker.sqlite.filetime import FileClock
from postroom.broker.sqlite.jobs import SQLiteJobStore
from postroom.broker.sqlite.joining import joins, publish_in
from postroom.broker.sqlite.members import DEATH_CHECK, Holders
from postroom.broker.sqlite.publish import Publication
from postroom.broker.sqlite.routing import Routes
from postroom.broker.sqlite.topology import Declaration
from postroom.broker.sqlite.watch import Watch
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import BrokerClosed, BrokerUnavailable, ConfigurationError, PostroomError, SubscriptionNotFound
from postroom.message import DeadLetter, Message

logger = logging.getLogger("postroom.broker")

_OLDEST_SQLITE = (3, 35, 0)


class SQLiteBroker(Broker):
    """``sqlite:///relative.db`` or ``sqlite:////absolute.db``."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        durability="fsync",
        shared=True,
        death_notice=1.0 if holders.SUPPORTED else 30.0,
        jobs=True,
        transactional_publish=True,
        delay=None,
        priorities=PRIORITIES,
        fifo=True,
        ordering=True,
        patterns=True,
        filters=True,
        deduplication=True,
        unique=True,
        known_ids=True,
        start_notes=True,
        expiry=True,
        limits=True,
        exact_stats=True,
        retention=True,
    )

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        """``clock`` replaces the machine's clock, for tests. Raises ``ConfigurationError`` for a malformed URL."""
        self.path = _path(url)
        self.clock: Clock = clock or SystemClock()
        self.engine = Engine(self.path)
        self.holders = Holders(self.path)
        self._file_clock = FileClock(self.clock, injected=clock is not None)
        self._routes = Routes()
        self._consumers: dict[SQLiteConsumer, None] = {}
        self._bell: Bell | None = None
        self._watch: Watch | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._jobs = SQLiteJobStore(self)
        self._joining = asyncio.Lock()
        self._closed = False

    def now(self) -> float:
        """Seconds on the clock of the file."""
        return self._file_clock.now()

    async def connect(self) -> None:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
            raise ConfigurationError(
                f"Python's SQLite is {sqlite3.sqlite_version}; Postroom needs 3.35 or newer: use a newer Python"
            )
        self.engine.open(partial(schema.check, path=str(self.path)), self._prepare)
        try:
            self._bell = Bell(self.path)
        except OSError as error:
            await self.engine.close()
            raise BrokerUnavailable(f"cannot write beside {self.path}: {error.strerror}") from error

    async def close(self) -> None:
        self._closed = True
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
            self._upkeep = None
        released = False
        try:
            for consumer in list(self._consumers):
                await consumer.close()
            if self.holders.registered:
                await self.engine.write(self.holders.unregister)
            released = True
        finally:
            if self._watch is not None:
                self._watch.close()
                self._watch = None
            await self.engine.close()
            # What could not be released, others find in the notes, as after the death of this process.
            self.holders.close(keep_notes=not released)
            for consumer in list(self._consumers):
                consumer.drop()
            self._consumers.clear()
            if self._bell is not None:
                self._bell.close()
                self._bell = None

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        declaration = Declaration(topics, subscriptions, self._file_clock)
        with self.engine.translated():
            changes = declaration.changes(self.engine.connection)
        if changes:
            await self.engine.write(declaration.store, undo=self._routes.forget, done=lambda _: self.announce())

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await self.engine.write(
            lambda connection: Publication(connection, self._routes, self._file_clock).store(messages),
            undo=self._routes.forget,
            done=lambda _: self.announce(),
        )

    async def consume(self, subscription: str, *, lease: float = 30.0) -> Consumer:
        sub, _ = self._subscription(subscription)
        async with self._joining:
            if not self.holders.registered:
                await self._become_holder()
        consumer = SQLiteConsumer(self, subscription, sub, lease)
        self._consumers[consumer] = None
        return consumer

    async def stats(self) -> list[SubscriptionStats]:
        with self.engine.translated():
            return letters.stats(self.engine.connection, self.now())

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        sub, _ = self._subscription(subscription)
        with self.engine.translated():
            return letters.page(self.engine.connection, sub, subscription, ids, after, limit)

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        sub, ordered = self._subscription(subscription)
        return await self.engine.write(
            lambda connection: letters.redrive(connection, self._file_clock, sub, ordered, ids),
            done=lambda _: self.announce(),
        )

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        sub, _ = self._subscription(subscription)
        return await self.engine.write(lambda connection: letters.discard(connection, sub, ids))

    async def purge(self, subscription: str) -> int:
        sub, _ = self._subscription(subscription)
        with self.engine.translated():
            up_to = letters.newest(self.engine.connection)
        count = 0
        # In steps, for a long queue would hold up everybody else's transactions.
        while ended := await self.engine.write(
            lambda connection: letters.purge(connection, sub, self.now(), up_to), done=lambda _: self._changed()
        ):
            count += ended
        return count

    async def unsubscribe(self, subscription: str) -> None:
        sub, _ = self._subscription(subscription)
        await self.engine.write(
            lambda connection: letters.unsubscribe(connection, sub, subscription), undo=self._routes.forget
        )

    async def replay(self, subscription: str, since: float | None = None) -> int:
        sub, _ = self._subscription(subscription)
        return await self.engine.write(
            lambda connection: letters.replay(connection, self._file_clock, sub, since), done=lambda _: self.announce()
        )

    def joins(self, connection: Any) -> bool:
        return joins(connection, self.path)

    def publish_in(self, connection: Any, messages: Sequence[Message]) -> list[str | PostroomError]:
        try:
            return publish_in(connection, self.path, self._file_clock, messages)
        except sqlite3.Error as error:
            with self.engine.translated():
                raise error

    async def examine(self) -> list[Finding]:
        return await doctor.examine(self.engine, version=len(schema.MIGRATIONS))

    @property
    def jobs(self) -> SQLiteJobStore:
        return self._jobs

    def announce(self) -> None:
        """Something may have become ready: tell consumers here, and those of other processes."""
        for consumer in self._consumers:
            consumer.wake()
        if self._bell is not None:
            self._bell.ring()

    def forget(self, consumer: SQLiteConsumer) -> None:
        """The consumer is closed."""
        self._consumers.pop(consumer, None)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        schema.prepare(connection, str(self.path))
        if not self._file_clock.agree(connection):
            connection.execute("BEGIN IMMEDIATE")
            self._file_clock.anchor(connection)
            connection.execute("COMMIT")

    async def _become_holder(self) -> None:
        try:
            await self.engine.write(self.holders.register, done=self.holders.join)
        except OSError as error:
            raise BrokerUnavailable(f"cannot write beside {self.path}: {error.strerror}") from error
        if self._watch is None and self._bell is not None:
            log = Path(f"{self.path}-wal")
            self._watch = Watch(self._bell.path, log, self._changed, self._is_anyone_waiting, self._version)
            self._upkeep = asyncio.get_running_loop().create_task(self._keep_up())

    def _changed(self) -> None:
        for consumer in self._consumers:
            consumer.wake()

    def _is_anyone_waiting(self) -> bool:
        return any(consumer.waiting for consumer in self._consumers)

    def _version(self) -> int:
        with self.engine.translated():
            return int(self.engine.connection.execute("PRAGMA data_version").fetchone()[0])

    async def _keep_up(self) -> None:
        """Look after the dead, and after what is done."""
        while True:
            await asyncio.sleep(DEATH_CHECK)
            try:
                await self._recover_dead()
                await self._clean()
            except BrokerClosed:
                return
            except (PostroomError, OSError) as error:
                # Without this task no death is noticed: it goes on trying, whatever goes wrong.
                logger.warning("cannot look after %s, trying again: %s", self.path, error)

    async def _recover_dead(self) -> None:
        with self.engine.translated():
            dead = self.holders.dead(self.engine.connection)
        for number in dead:
            await self.engine.write(
                lambda connection, number=number: self.holders.recover(connection, number, self.now()),  # type: ignore[misc]
                done=lambda _: self.announce(),
            )
            self.holders.remove_file(number)

    async def _clean(self) -> None:
        connection = self.engine.connection
        with self.engine.translated():
            while janitor.is_due(connection, self.now()):
                await self.engine.write(
                    lambda connection: janitor.step(connection, self.now()), done=lambda _: self._changed()
                )
                # In small steps: the settles and claims of others come in between.
                await asyncio.sleep(0.005)
            try:
                janitor.give_back_space(connection)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise

    def _subscription(self, name: str) -> tuple[int, bool]:
        """The id of a subscription, and whether it is ordered. Raises ``SubscriptionNotFound``."""
        with self.engine.translated():
            row = self.engine.connection.execute(
                "SELECT id, ordered FROM subscription WHERE name = ?", (name,)
            ).fetchone()
        if row is None:
            raise SubscriptionNotFound(f"no queue or subscription {name!r}; declare it, or start a worker that does")
        return row[0], bool(row[1])


def _path(url: str) -> Path:
    scheme, _, rest = url.partition("://")
    path, _, query = rest.partition("?")
    if query:
        raise ConfigurationError(f"{url}: a sqlite URL takes no options, but this one has {query!r}")
    if scheme != "sqlite" or not path.startswith("/") or len(path) < 2:
        raise ConfigurationError(
            f"{url}: write sqlite:///file.db (relative) or sqlite:////path/file.db; memory:// needs no file at all"
        )
    # Absolute and free of links: all processes must look for each other beside the same file, wherever they are.
    return Path(os.path.realpath(path[1:]))
