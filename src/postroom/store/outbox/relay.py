"""The relay: sends what lies in an outbox to the broker, in order, and removes it once that is confirmed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from uuid import uuid4

from postroom.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    PostroomError,
    PublishFailed,
    QueueFull,
)
from postroom.message import Message
from postroom.store.database import NOW, make_engine, sa
from postroom.store.outbox import LEADER, TABLE, decode
from postroom.store.outbox.bell import Bell

logger = logging.getLogger("postroom.outbox")

BATCH = 2000
"""Messages sent and removed together, at most: the more, the fewer waits for a confirmation."""
_FIRST_BATCH = 100
_MEMORY = 16 * 1024 * 1024
"""Characters of messages that are read at a time, as far as earlier ones tell."""
LEASE = 10.0
"""Seconds after which another relay takes over from one that has died or froze."""

_RENEW = LEASE / 3
_FIRST_PAUSE = 0.2
_LAST_PAUSE = 5.0
_STANDBY = 1.0
"""Seconds between looks of a relay that stands by."""
_TRANSIENT = (BrokerUnavailable, BrokerClosed, QueueFull, PublishFailed)

Publish = Callable[[Sequence[Message]], list[str | PostroomError]]


class OutboxStats(NamedTuple):
    """An outbox in numbers."""

    waiting: int
    set_aside: int
    oldest: float | None
    """Unix time at which the oldest waiting message was made."""


class Relay:
    """Any number of relays may run on one outbox: one is active, the others stand by.

    It dies between sending and removing: what was sent is sent again under the same ids, which brokers and stores
    that know ids tell for what it is (``Capabilities.known_ids``).
    """

    def __init__(self, url: str, publish: Publish) -> None:
        """``url``: the user's database, as ``postgresql://…``, ``mysql://…``, ``sqlite:///…`` or any of SQLAlchemy's.

        ``publish``: sends and waits for the confirmation. Raises ``ConfigurationError``.
        """
        self._engine = make_engine(url)
        self._bell = Bell(self._engine)
        self._publish = publish
        self._name = uuid4().hex
        self._leads_until = 0.0
        """Monotonic seconds; renewed before."""
        self._limit = _FIRST_BATCH

    def run(self, stop: threading.Event, *, drain: bool = False) -> None:
        """Send what comes until ``stop`` is set, or with ``drain`` until nothing waits.

        While broker or database are away it tries again, at most 5 s later. Raises ``ConfigurationError``.
        """
        pause = _FIRST_PAUSE
        while not stop.is_set():
            try:
                self._turn(stop, drain=drain)
            except BrokerUnavailable as error:
                logger.warning("cannot send, trying again in %.1f s: %s", pause, error)
                stop.wait(pause)
                pause = min(2 * pause, _LAST_PAUSE)
            else:
                pause = _FIRST_PAUSE

    def _turn(self, stop: threading.Event, *, drain: bool) -> None:
        self._bell.listen()
        sent = self.run_once()
        if sent:
            logger.info("sent %d messages", sent)
        elif sent is None:
            stop.wait(_STANDBY)
        elif drain:
            stop.set()
        else:
            self._bell.wait(stop)

    def run_once(self) -> int | None:
        """Send what waits, at most one batch. Returns how many were sent; ``None`` while another relay is active.

        Raises ``BrokerUnavailable`` if neither sent nor removed: nothing is lost, try again.
        """
        try:
            if not self._lead():
                return None
            rows = self._waiting(self._limit)
            if not rows:
                return 0
            size = sum(len(text) for _, text in rows) // len(rows)
            self._limit = max(1, min(BATCH, _MEMORY // size))
            return self._send(rows)
        except sa.exc.DBAPIError as error:
            raise BrokerUnavailable(f"the outbox's database: {error.orig}") from error

    def stats(self) -> OutboxStats:
        with self._engine.connect() as connection:
            counts = sa.text(f"SELECT count(*) - count(error), count(error) FROM {TABLE}")
            waiting, aside = connection.execute(counts).one()
            first = self._waiting(limit=1)
        oldest = decode(first[0][1]).created_at if first else None
        return OutboxStats(waiting=int(waiting), set_aside=int(aside), oldest=oldest)

    def set_aside(self) -> list[tuple[Message, str]]:
        """What no relay could send, with the reason."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                sa.text(f"SELECT message, error FROM {TABLE} WHERE error IS NOT NULL ORDER BY seq")
            ).fetchall()
        return [(decode(text), str(error)) for text, error in rows]

    def retry(self) -> int:
        """Send what was set aside once more. Returns how many."""
        with self._engine.begin() as connection:
            return connection.execute(sa.text(f"UPDATE {TABLE} SET error = NULL WHERE error IS NOT NULL")).rowcount

    def close(self) -> None:
        """Let another relay take over at once."""
        self._bell.close()
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.text(f"DELETE FROM {LEADER} WHERE holder = :name"), {"name": self._name})
        except sa.exc.DBAPIError as error:
            logger.warning("another relay takes over only in %.0f s: %s", LEASE, error.orig)
        finally:
            self._engine.dispose()

    def _lead(self) -> bool:
        """Become, or stay, the active one. Raises ``ConfigurationError`` if there is no outbox."""
        began = time.monotonic()
        if began < self._leads_until - LEASE + _RENEW:
            return True
        if not self._take_lead():
            return False
        self._leads_until = began + LEASE
        return True

    def _take_lead(self) -> bool:
        now = NOW[self._engine.dialect.name]
        mine = {"name": self._name, "lease": LEASE}
        try:
            with self._engine.begin() as connection:
                taken = connection.execute(
                    sa.text(
                        f"UPDATE {LEADER} SET holder = :name, until = {now} + :lease "
                        f"WHERE one = 1 AND (holder = :name OR until < {now})"
                    ),
                    mine,
                )
                if taken.rowcount:
                    return True
                if connection.execute(sa.text(f"SELECT 1 FROM {LEADER}")).fetchone():
                    return False
                connection.execute(sa.text(f"INSERT INTO {LEADER} VALUES (1, :name, {now} + :lease)"), mine)
                return True
        except sa.exc.IntegrityError:
            return False  # Another was quicker.
        except (sa.exc.ProgrammingError, sa.exc.OperationalError) as error:
            if LEADER not in str(error.orig):
                raise
            raise ConfigurationError(
                f"the database has no table {LEADER}; call postroom.create_outbox(connection) where you create your own"
            ) from error

    def _waiting(self, limit: int) -> list[tuple[int, str]]:
        with self._engine.connect() as connection:
            rows = connection.execute(
                sa.text(f"SELECT seq, message FROM {TABLE} WHERE error IS NULL ORDER BY seq LIMIT :limit"),
                {"limit": limit},
            ).fetchall()
        return [(int(seq), str(text)) for seq, text in rows]

    def _send(self, rows: Sequence[tuple[int, str]]) -> int:
        todo = [(seq, decode(text)) for seq, text in rows]
        blocked: set[tuple[str, str]] = set()
        done: list[int] = []
        refused: list[tuple[int, str]] = []
        transient: PostroomError | None = None
        while todo:
            now, todo = _first_of_each_key(todo, blocked)
            if not now:
                break
            try:
                answers = self._publish([message for _, message in now])
            except _TRANSIENT as error:
                transient = error
                break
            for (seq, message), answer in zip(now, answers, strict=True):
                if isinstance(answer, str):
                    done.append(seq)
                elif isinstance(answer, _TRANSIENT):
                    transient = answer
                    # What follows it under its key must not overtake it.
                    blocked.add((message.topic, message.key or ""))
                else:
                    refused.append((seq, f"{type(answer).__name__}: {answer}"))
        self._settle(done, refused)
        if transient is not None and not done:
            raise BrokerUnavailable(str(transient)) from transient
        return len(done)

    def _settle(self, done: Sequence[int], refused: Sequence[tuple[int, str]]) -> None:
        with self._engine.begin() as connection:
            if done:
                gone = sa.text(f"DELETE FROM {TABLE} WHERE seq IN :seqs").bindparams(
                    sa.bindparam("seqs", expanding=True)
                )
                connection.execute(gone, {"seqs": list(done)})
            for seq, why in refused:
                logger.error("outbox: message %d is set aside: %s", seq, why)
                connection.execute(
                    sa.text(f"UPDATE {TABLE} SET error = :why WHERE seq = :seq"), {"why": why[:4000], "seq": seq}
                )


def _first_of_each_key(
    todo: Sequence[tuple[int, Message]], blocked: set[tuple[str, str]]
) -> tuple[list[tuple[int, Message]], list[tuple[int, Message]]]:
    """What can be sent together without one overtaking another of its key, and the rest."""
    now: list[tuple[int, Message]] = []
    later: list[tuple[int, Message]] = []
    seen: set[tuple[str, str]] = set()
    for seq, message in todo:
        if message.key is None:
            now.append((seq, message))
            continue
        line = (message.topic, message.key)
        if line in blocked:
            continue
        (later if line in seen else now).append((seq, message))
        seen.add(line)
    return now, later
