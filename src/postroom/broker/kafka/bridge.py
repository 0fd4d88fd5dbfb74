"""From the client's threads to the event loop, which may have ended without its broker being closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: Any) -> bool:
    """Have it called on the loop. ``False``: the loop is closed, and nobody is left to be told."""
    try:
        loop.call_soon_threadsafe(callback, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise
        return False
    return True


def ask(loop: asyncio.AbstractEventLoop, question: Coroutine[Any, Any, T]) -> Future[T] | None:
    """Have it answered on the loop. ``None``: the loop is closed, and nobody is left to be asked."""
    try:
        return asyncio.run_coroutine_threadsafe(question, loop)
    except RuntimeError:
        question.close()
        if not loop.is_closed():
            raise
        return None
