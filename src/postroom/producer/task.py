"""Tasks: functions whose calls can be enqueued."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from postroom.config import Seconds, Uniqueness
from postroom.context import Context
from postroom.errors import ConfigurationError, PostroomError, PublishFailed
from postroom.handler import TaskHandler
from postroom.message import Message, new_id
from postroom.producer import unique as uniqueness
from postroom.producer.job import Job
from postroom.producer.options import NO_OPTIONS, PublishOptions
from postroom.producer.publisher import Answers

if TYPE_CHECKING:
    from postroom.producer.outlet import Outlet

P = ParamSpec("P")
T = TypeVar("T")

BATCH = 500
"""Calls of ``enqueue_many`` that are confirmed together."""


class Call(Generic[T]):
    """A call that has not been enqueued: checked arguments, encoded. Made by ``task.call(…)``."""

    __slots__ = ("message",)

    def __init__(self, message: Message) -> None:
        self.message = message


class Producing(Generic[P, T]):
    """The ways to enqueue a task's call under given options."""

    def __init__(self, handler: TaskHandler, outlet: Outlet, options: PublishOptions) -> None:
        self._handler = handler
        self._outlet = outlet
        self._options = options

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[T]:
        """Check and encode a call, for :meth:`enqueue_many`. Raises ``ValidationError`` or ``EncodeError``."""
        return Call(self._message(args, kwargs))

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job[T]:
        """Enqueue a call; stored when this returns.

        Raises ``ValidationError`` or ``EncodeError`` (parameter named), ``QueueFull``, ``MessageTooLarge``,
        ``IdempotencyConflict``, ``BrokerUnavailable`` (not known to be stored).
        Works in a running event loop too, but blocks it meanwhile; it warns there. Use :meth:`aenqueue`.
        """
        message = self._message(args, kwargs)
        if self._options.transaction is None:
            warn_if_blocking("enqueue")
        return self._job(self._outlet.send([message], self._options.transaction)[0], message)

    async def aenqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job[T]:
        """See :meth:`enqueue`. Concurrent calls share one commit."""
        message = self._message(args, kwargs)
        return self._job((await self._outlet.asend([message], self._options.transaction))[0], message)

    def enqueue_many(self, calls: Iterable[Call[T]]) -> list[Job[T]]:
        """Enqueue many calls, one confirmed batch after the other; the next is prepared meanwhile.

        Raises ``PublishFailed`` (``unconfirmed``: ids not known to be stored; the rest is), or the error of
        making a call, after the calls before it were stored.
        """
        warn_if_blocking("enqueue_many")
        jobs: list[Job[T]] = []
        before: tuple[list[Message], Future[Answers]] | None = None
        for batch in _batches(calls):
            pending = self._outlet.submit(batch, self._options.transaction)
            if before is not None:
                jobs += self._jobs(before[0], before[1].result())
            before = (batch, pending)
        return jobs + (self._jobs(before[0], before[1].result()) if before else [])

    async def aenqueue_many(self, calls: Iterable[Call[T]]) -> list[Job[T]]:
        """See :meth:`enqueue_many`."""
        jobs: list[Job[T]] = []
        for batch in _batches(calls):
            jobs += self._jobs(batch, await self._outlet.asend(batch, self._options.transaction))
        return jobs

    def _message(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Message:
        handler = self._handler
        message_id = new_id()
        body = handler.encode(args, kwargs)
        fields = self._outlet.fields(self._options, handler.options)
        wanted = self._unique
        if wanted is not None:
            if handler.uploads:
                raise ConfigurationError(
                    f"{handler.label}: unique: two copies of one file are not known to be the same"
                )
            fields |= uniqueness.fields(
                wanted, self._options.replace, self._options.idempotency_key, handler.name, body
            )
        if handler.uploads:
            body = self._outlet.keep_uploads(handler, message_id, body)
        return Message(
            id=message_id,
            topic=handler.subscription,
            name=handler.name,
            body=body,
            **fields,
        )

    @property
    def _unique(self) -> Uniqueness | None:
        return self._handler.options.unique if self._options.unique is None else self._options.unique

    def _job(self, answer: str | PostroomError, message: Message) -> Job[T]:
        if isinstance(answer, PostroomError):
            self._outlet.drop_uploads([message])
            raise answer
        if answer != message.id:
            # The idempotency key was used before: this message does not exist, its files are nobody's.
            self._outlet.drop_uploads([message])
        return Job(answer, self._outlet.thread)

    def _jobs(self, messages: Sequence[Message], answers: Answers) -> list[Job[T]]:
        failed = [item.id for item, answer in zip(messages, answers, strict=True) if isinstance(answer, PostroomError)]
        if failed:
            first = next(answer for answer in answers if isinstance(answer, PostroomError))
            raise PublishFailed(f"{len(failed)} of {len(messages)} messages were refused: {first}", failed) from first
        return [Job(str(answer), self._outlet.thread) for answer in answers]


class Task(Producing[P, T]):
    """A function bound to a queue. Calling it runs it here and now; :meth:`enqueue` hands it to a worker."""

    def __init__(self, handler: TaskHandler, outlet: Outlet) -> None:
        super().__init__(handler, outlet, NO_OPTIONS)
        functools.update_wrapper(self, handler.function)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return self._handler.name

    @property
    def queue(self) -> str:
        return self._handler.subscription

    @property
    def handler(self) -> TaskHandler:
        """What the worker runs and the gateway describes."""
        return self._handler

    def __repr__(self) -> str:
        return f"<Task {self.name} in queue {self.queue}>"

    def using(
        self,
        *,
        delay: Seconds | None = None,
        at: datetime | None = None,
        priority: int | None = None,
        key: str | None = None,
        idempotency_key: str | None = None,
        headers: dict[str, str] | None = None,
        expires_in: Seconds | None = None,
        unique: Uniqueness | None = None,
        replace: bool = False,
        transaction: Any = None,
    ) -> Producing[P, T]:
        """The same task under these options; see :class:`postroom.producer.options.PublishOptions`.

        Raises ``ConfigurationError`` or ``ValidationError`` naming the option.
        """
        options = PublishOptions(
            delay=delay,
            at=at,
            priority=priority,
            key=key,
            idempotency_key=idempotency_key,
            headers=headers,
            expires_in=expires_in,
            unique=unique,
            replace=replace,
            transaction=transaction,
        )
        uniqueness.check(self._handler.options.unique if unique is None else unique, replace)
        return Producing(self._handler, self._outlet, options)

    def _local_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments for a plain call: the context is made up, resources the caller passes."""
        self._handler.compile()
        contexts = [name for name, kind in self._handler.injected.items() if kind is Context]
        return {**{name: Context.local(self.name) for name in contexts if name not in kwargs}, **kwargs}


class SyncTask(Task[P, T]):
    """A task whose function is a plain one; workers run it in a thread, or a process."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._handler.function(*args, **self._local_arguments(args, kwargs))  # type: ignore[no-any-return]


class AsyncTask(Task[P, T]):
    """A task whose function is a coroutine function; workers run it on their event loop."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        return self._handler.function(*args, **self._local_arguments(args, kwargs))  # type: ignore[no-any-return]


class TaskDecorator:
    """Only a type: what ``app.task(queue=…)`` is to type checkers."""

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, T]], /
    ) -> AsyncTask[P, T]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> SyncTask[P, T]: ...
    def __call__(self, function: Any, /) -> Any: ...


def warn_if_blocking(method: str) -> None:
    """Warn where a synchronous call would hold up a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    warnings.warn(
        f"{method} blocks the running event loop until the broker has confirmed; use `await a{method}(…)` here",
        RuntimeWarning,
        stacklevel=3,
    )


def _batches(calls: Iterable[Call[T]]) -> Iterator[list[Message]]:
    messages = (call.message for call in calls)
    while batch := list(islice(messages, BATCH)):
        yield batch
