"""The relay: sends what lies in an outbox to the broker, in order, and removes it once that is confirmed."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
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
from postroom.store.outbox import LEADER, TABLE, OutboxStats, decode, outbox_stats
from postroom.store.outbox.bell import Bell

logger = logging.getLogger("postroom.outbox")

BATCH = 2000
"""Messages sent and removed together, at most: the more, the fewer waits for a confirmation."""
_AHEAD = 4 * BATCH
"""Messages read at once, at most. Those of one key go in batches after each other, which others then fill."""
_FIRST = 100
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
        self._now = NOW[self._engine.dialect.name]
        self._bell = Bell(self._engine)
        self._publish = publish
        self._name = uuid4().hex
        self._leads_until = 0.0
        """Monotonic seconds; renewed before."""
        self._limit = _FIRST

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
        sent = self.run_once(stop)
        if sent:
            logger.info("sent %d messages", sent)
        elif sent is None:
            stop.wait(_STANDBY)
        elif drain:
            stop.set()
        else:
            self._bell.wait(stop)

    def run_once(self, stop: threading.Event | None = None) -> int | None:
        """Send what waits, a few batches at most. Returns how many were sent; ``None`` while another relay is active.

        ``stop``: when set, no further batch is begun. Raises ``BrokerUnavailable`` if neither sent nor removed:
        nothing is lost, try again.
        """
        try:
            if not self._lead():
                return None
            rows = self._waiting(self._limit)
            if not rows:
                return 0
            size = sum(len(text) for _, text in rows) // len(rows)
            self._limit = max(1, min(_AHEAD, _MEMORY // size))
            return self._send(rows, stop or threading.Event())
        except sa.exc.DBAPIError as error:
            raise BrokerUnavailable(f"the outbox's database: {error.orig}") from error

    def stats(self) -> OutboxStats:
        """Raises ``ConfigurationError`` if there is no outbox."""
        with self._engine.connect() as connection:
            return outbox_stats(connection)

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
            if self._leads_until:
                with self._engine.begin() as connection:
                    connection.execute(sa.text(f"DELETE FROM {LEADER} WHERE holder = :name"), {"name": self._name})
        except sa.exc.DBAPIError as error:
            logger.warning("another relay takes over only in %.0f s: %s", LEASE, error.orig)
        finally:
            self._engine.dispose()

    def _lead(self) -> bool:
        """Become, or stay, the active one. Raises ``ConfigurationError`` if there is no outbox."""
        if self._keeps_lead():
            return True
        began = time.monotonic()
        if not self._take_lead():
            return False
        self._leads_until = began + LEASE
        return True

    def _keeps_lead(self) -> bool:
        """Whether no other relay has led since this one began to."""
        began = time.monotonic()
        if began < self._leads_until - LEASE + _RENEW:
            return True
        if not self._leads_until:
            return False
        with self._engine.begin() as connection:
            renewed = connection.execute(
                sa.text(f"UPDATE {LEADER} SET until = {self._now} + :lease WHERE one = 1 AND holder = :name"),
                {"name": self._name, "lease": LEASE},
            )
        self._leads_until = began + LEASE if renewed.rowcount else 0.0
        return bool(self._leads_until)

    def _take_lead(self) -> bool:
        mine = {"name": self._name, "lease": LEASE}
        try:
            with self._engine.begin() as connection:
                taken = connection.execute(
                    sa.text(
                        f"UPDATE {LEADER} SET holder = :name, until = {self._now} + :lease "
                        # Later than any taken by this clock: it was set back, and would hold all up for as long.
                        f"WHERE one = 1 AND (until < {self._now} OR until > {self._now} + 2 * :lease)"
                    ),
                    mine,
                )
                if taken.rowcount:
                    return True
                if connection.execute(sa.text(f"SELECT 1 FROM {LEADER}")).fetchone():
                    return False
                connection.execute(sa.text(f"INSERT INTO {LEADER} VALUES (1, :name, {self._now} + :lease)"), mine)
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

    def _send(self, rows: Sequence[tuple[int, str]], stop: threading.Event) -> int:
        lines = _Lines(rows)
        sent = 0
        transient: PostroomError | None = None
        # Asked before each batch: one that was frozen has a successor, which has sent what it would send now.
        while lines and not stop.is_set() and self._keeps_lead():
            batch = lines.next_batch()
            try:
                answers = self._publish([message for _, message in batch])
            except _TRANSIENT as error:
                transient = error
                break
            done: list[int] = []
            refused: list[tuple[int, str]] = []
            for (seq, message), answer in zip(batch, answers, strict=True):
                if isinstance(answer, str):
                    done.append(seq)
                elif isinstance(answer, _TRANSIENT):
                    transient = answer
                    lines.hold(message)
                else:
                    refused.append((seq, f"{type(answer).__name__}: {answer}"))
            self._settle(done, refused)
            sent += len(done)
        if transient is not None and not sent:
            raise BrokerUnavailable(str(transient)) from transient
        return sent

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


class _Lines:
    """Messages that wait: those of one key of a topic in one line, each without a key in a line of its own."""

    def __init__(self, rows: Sequence[tuple[int, str]]) -> None:
        self._lines: dict[tuple[str, str] | int, deque[tuple[int, Message]]] = {}
        for seq, text in rows:
            message = decode(text)
            line = seq if message.key is None else (message.topic, message.key)
            self._lines.setdefault(line, deque()).append((seq, message))

    def __len__(self) -> int:
        return len(self._lines)

    def next_batch(self) -> list[tuple[int, Message]]:
        """Takes the first of each line. Only once they are confirmed can none of them be overtaken by the next.

        A broker may refuse one (``QueueFull``) and take a later one of the same batch.
        """
        chosen = list(islice(self._lines, BATCH))
        batch = [self._lines[line].popleft() for line in chosen]
        for line in chosen:
            rest = self._lines.pop(line)
            if rest:
                self._lines[line] = rest
        return batch

    def hold(self, message: Message) -> None:
        """Leave what follows it under its key for another time."""
        if message.key is not None:
            self._lines.pop((message.topic, message.key), None)
