"""Handlers that run in a transaction: mark, effect and result commit together, or not at all."""

from __future__ import annotations

from typing import Any

from postroom.errors import EncodeError
from postroom.signals import Reject
from postroom.store.inbox import akeep, keep
from postroom.store.inbox.transactions import aopened, opened
from postroom.worker import decide
from postroom.worker.work import Work


def call(work: Work, arguments: dict[str, Any], source: Any, max_size: int) -> Any:
    """Run a sync handler in a transaction of ``source``. Raises ``AlreadyProcessed`` for a duplicate."""
    context = work.context
    with opened(source) as connection:
        context.once(connection)
        value = work.handler.function(**arguments, **_injected(work, connection))
        result = _kept(value, work, max_size)
        if result is not None:
            keep(connection, context.subscription, context.message.id, result)
    return value


async def acall(work: Work, arguments: dict[str, Any], source: Any, max_size: int) -> Any:
    """:func:`call` for async handlers."""
    context = work.context
    async with aopened(source) as connection:
        await context.aonce(connection)
        value = await work.handler.function(**arguments, **_injected(work, connection))
        result = _kept(value, work, max_size)
        if result is not None:
            await akeep(connection, context.subscription, context.message.id, result)
    return value


def _injected(work: Work, connection: Any) -> dict[str, Any]:
    name = work.handler.connection
    return {} if name is None else {name: connection}


def _kept(value: Any, work: Work, max_size: int) -> bytes | None:
    try:
        return decide.encoded(value, work.delivery.message.name, max_size)
    except EncodeError as error:
        # Nothing is committed yet: better no effect than one whose result is lost. The next attempt would fail too.
        raise Reject(f"nothing was committed: {error}") from error
