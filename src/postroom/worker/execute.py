"""One attempt: decode, inject, call, and say what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from postroom.broker.base import Ack, Outcome
from postroom.context import Context
from postroom.errors import DecodeError, ValidationError
from postroom.handler import TaskHandler
from postroom.lifecycle import Middleware
from postroom.store.blobs import BlobStore
from postroom.worker import decide, transaction
from postroom.worker.threads import Interrupted
from postroom.worker.work import Work


class Executor:
    """Runs handlers with what surrounds them in this process."""

    def __init__(
        self, resources: Mapping[Any, Any], middleware: Sequence[Middleware], blobs: BlobStore, max_size: int
    ) -> None:
        self._resources = resources
        self._middleware = list(reversed(middleware))
        self._blobs = blobs
        self._max_size = max_size

    @property
    def has_middleware(self) -> bool:
        return bool(self._middleware)

    def call(self, work: Work, interrupt: Callable[[Work], None] | None) -> Outcome:
        """Run a sync handler in the current thread. Never raises."""
        try:
            work.start(interrupt)
            value = self._run(work)
        except BaseException as error:
            return self._failed(work, error)
        return decide.succeeded(value, work.delivery, self._max_size)

    async def acall(self, work: Work, interrupt: Callable[[Work], None] | None) -> Outcome:
        """Await an async handler, within the middleware. Never raises."""
        try:
            work.start(interrupt)
            if self._middleware:
                value = await self._surrounded(work, lambda: self._arun(work))
            else:
                value = await self._arun(work)
        except BaseException as error:
            return self._failed(work, error)
        return decide.succeeded(value, work.delivery, self._max_size)

    async def acall_in(
        self, work: Work, interrupt: Callable[[Work], None], run: Callable[[Callable[[], Any]], Awaitable[Any]]
    ) -> Outcome:
        """Run a sync handler by ``run`` (in a thread), within the middleware. Never raises."""
        try:
            work.start(interrupt)
            value = await self._surrounded(work, lambda: run(lambda: self._run(work)))
        except BaseException as error:
            return self._failed(work, error)
        return decide.succeeded(value, work.delivery, self._max_size)

    async def around(self, work: Work, run: Callable[[], Awaitable[Outcome]]) -> Outcome:
        """Put the middleware around an attempt that happens elsewhere, and gives an outcome. Never raises."""
        try:
            value = await self._surrounded(work, lambda: _value_of(run()))
        except BaseException as error:
            return self._failed(work, error)
        return decide.succeeded(value, work.delivery, self._max_size)

    def _run(self, work: Work) -> Any:
        arguments, source = self._arguments(work), work.handler.options.transaction
        if source is None:
            return work.handler.function(**arguments)
        return transaction.call(work, arguments, self._transaction(source), self._max_size)

    def _arun(self, work: Work) -> Awaitable[Any]:
        arguments, source = self._arguments(work), work.handler.options.transaction
        if source is None:
            value: Awaitable[Any] = work.handler.function(**arguments)
            return value
        return transaction.acall(work, arguments, self._transaction(source), self._max_size)

    def _transaction(self, source: Any) -> Any:
        return self._resources[source] if isinstance(source, type) else source

    async def _surrounded(self, work: Work, innermost: Callable[[], Awaitable[Any]]) -> Any:
        call_next = innermost
        for middleware in self._middleware:
            call_next = _bound(middleware, work.context, call_next)
        return await call_next()

    def _arguments(self, work: Work) -> dict[str, Any]:
        handler = work.handler
        message = work.delivery.message
        try:
            arguments = handler.decode(message.body)
            if isinstance(handler, TaskHandler) and handler.uploads:
                self._resolve_uploads(handler, message.id, arguments)
        except (DecodeError, ValidationError) as error:
            raise _Unreadable(error) from error
        for name, kind in handler.injected.items():
            arguments[name] = work.context if kind is Context else self._resources[kind]
        return arguments

    def _resolve_uploads(self, handler: TaskHandler, message_id: str, arguments: dict[str, Any]) -> None:
        for name in handler.uploads & arguments.keys():
            if arguments[name] is not None:
                arguments[name] = self._blobs.resolve(message_id, str(arguments[name]))

    def _failed(self, work: Work, error: BaseException) -> Outcome:
        # SystemExit and the like from a handler fail its attempt; they must not end the worker.
        if isinstance(error, _Decided):
            return error.outcome
        if isinstance(error, _Unreadable):
            return decide.unreadable(error.error, work.delivery)
        if work.why is not None and isinstance(error, asyncio.CancelledError | Interrupted):
            return work.interrupted()
        return decide.failed(error, work.delivery, work.handler.options.retry, work.started_at, self._max_size)


class _Unreadable(Exception):
    """Sets an undecodable message apart from the same errors raised by a handler."""

    def __init__(self, error: DecodeError | ValidationError) -> None:
        super().__init__(str(error))
        self.error = error


class _Decided(Exception):
    """Carries an outcome that is no success up through the middleware."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(type(outcome).__name__)
        self.outcome = outcome


async def _value_of(outcome: Awaitable[Outcome]) -> Any:
    decided = await outcome
    if not isinstance(decided, Ack):
        raise _Decided(decided)
    return None if decided.result is None else msgspec.json.decode(decided.result)


def _bound(
    middleware: Middleware, context: Context, call_next: Callable[[], Awaitable[Any]]
) -> Callable[[], Awaitable[Any]]:
    return lambda: middleware(context, call_next)
