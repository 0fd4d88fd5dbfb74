"""What a handler can know and say about the message it is running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from postroom import codec
from postroom.message import Message, Progress, new_id

INJECTED: Any = type("Injected", (), {"__repr__": lambda self: "INJECTED"})()
"""Default of a parameter that the worker fills in (``ctx: Context = INJECTED``), so that type checkers
do not ask for it in ``enqueue``. At run time the annotation alone decides."""


class Context:
    """One attempt at one message. A parameter annotated ``Context`` receives it."""

    __slots__ = ("_report", "attempt", "cancelled", "max_attempts", "message", "subscription")

    def __init__(
        self,
        message: Message,
        subscription: str,
        attempt: int,
        max_attempts: int,
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        self.message = message
        self.subscription = subscription
        """The subscription, or for a job its queue."""
        self.attempt = attempt
        """This attempt's number, from 1; failures and process deaths count, releases and snoozes do not."""
        self.max_attempts = max_attempts
        self.cancelled = False
        """Whether the job was cancelled or the lease lost while the handler runs. A handler in a thread can
        look here between two steps and return; asyncio handlers are cancelled anyway."""
        self._report = report

    @classmethod
    def local(cls, name: str) -> Context:
        """The context of a plain call, outside any worker: one attempt, nobody listens to progress."""
        return cls(Message(id=new_id(), topic="", name=name, body=b""), subscription="", attempt=1, max_attempts=1)

    @property
    def job_id(self) -> str:
        """The message's id: stable through retries, dead-lettering and redrive."""
        return self.message.id

    @property
    def idempotency_key(self) -> str:
        """A text that is the same in every attempt at this message by this subscription, and in no other:
        hand it to services that take an idempotency key."""
        return f"{self.subscription}:{self.message.id}"

    def progress(self, fraction: float, text: str = "") -> None:
        """Tell how far the job is: ``fraction`` from 0.0 to 1.0 and a few words.

        Never waits: reports are sent a few times a second, the latest wins. Raises ``ValueError``.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"progress({fraction!r}): a fraction from 0.0 to 1.0")
        if self._report is not None:
            self._report(Progress(float(fraction), str(text)))

    def once(self, connection: Any) -> None:
        """Mark this message as processed inside the open transaction of ``connection``.

        The mark commits together with the effect, so the effect happens exactly once however often the
        message is delivered. Call it before the effect, in the same transaction; a second delivery at the same
        time waits there until the first has committed or rolled back. ``connection``: of ``sqlite3``, apsw,
        psycopg, SQLAlchemy (a session, too) or Django, whose database has the table made by
        :func:`postroom.create_inbox`.

        Raises ``AlreadyProcessed`` (let it pass: it counts as success) if an earlier delivery committed, with the
        result kept by :meth:`keep_result`, and
        ``ConfigurationError`` if the table is missing or no transaction could be joined.
        """
        from postroom.store.inbox import mark

        mark(connection, self.subscription, self.message.id)

    async def aonce(self, connection: Any) -> None:
        """:meth:`once` for asyncpg, and the asynchronous connections and sessions of psycopg and SQLAlchemy."""
        from postroom.store.inbox import amark

        await amark(connection, self.subscription, self.message.id)

    def keep_result(self, connection: Any, result: Any) -> None:
        """Keep ``result`` with the mark of :meth:`once`, in the same transaction: duplicates have it as theirs.

        Call it after ``once``; a task with ``transaction=`` does so by itself with what it returns.
        Raises ``EncodeError`` for what JSON cannot carry.
        """
        from postroom.store.inbox import keep

        keep(connection, self.subscription, self.message.id, self._encoded(result))

    async def akeep_result(self, connection: Any, result: Any) -> None:
        """:meth:`keep_result` for the connections of :meth:`aonce`."""
        from postroom.store.inbox import akeep

        await akeep(connection, self.subscription, self.message.id, self._encoded(result))

    def _encoded(self, result: Any) -> bytes:
        return codec.encode_field(result, f"{self.message.name}: result")
