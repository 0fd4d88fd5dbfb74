"""What surrounds handlers in a worker process: resources, lifespan hooks and middleware."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, get_args, get_origin, get_type_hints

from postroom.context import Context
from postroom.errors import ConfigurationError

Middleware = Callable[[Context, Callable[[], Awaitable[Any]]], Awaitable[Any]]


class Lifecycle:
    """Registered on the app; opened once per worker process, in order, and closed in reverse."""

    def __init__(self) -> None:
        self.resources: dict[Any, Callable[..., Any]] = {}
        """By the type that handlers annotate."""
        self.hooks: list[Callable[..., Any]] = []
        self.middleware: list[Middleware] = []

    def add_resource(self, factory: Callable[..., Any]) -> None:
        """Raises ``ConfigurationError`` unless it is a generator function that says what it yields."""
        kind = self._yielded(factory)
        if not isinstance(kind, type):
            raise ConfigurationError(
                f"resource {factory.__qualname__}: annotate what it yields with a class, as -> Iterator[Pool]"
            )
        if kind in self.resources:
            raise ConfigurationError(
                f"resource {factory.__qualname__}: there is one of type {kind.__qualname__} already"
            )
        self.resources[kind] = factory

    def add_hook(self, hook: Callable[..., Any]) -> None:
        """Raises ``ConfigurationError`` unless it is a generator function."""
        self._yielded(hook)
        self.hooks.append(hook)

    async def open(self, stack: AsyncExitStack) -> dict[Any, Any]:
        """Enter all hooks and resources into ``stack``. Returns the resources by type."""
        for hook in self.hooks:
            await _enter(stack, hook)
        return {kind: await _enter(stack, factory) for kind, factory in self.resources.items()}

    @staticmethod
    def _yielded(factory: Callable[..., Any]) -> Any:
        if not (inspect.isgeneratorfunction(factory) or inspect.isasyncgenfunction(factory)):
            raise ConfigurationError(
                f"{getattr(factory, '__qualname__', factory)}: write a generator function (def or async def) that "
                "yields once: what stands before the yield opens, what stands after it closes"
            )
        if inspect.signature(factory).parameters:
            raise ConfigurationError(f"{factory.__qualname__}: it is called without arguments, so it must take none")
        try:
            returns = get_type_hints(factory).get("return")
        except NameError as error:
            raise ConfigurationError(
                f"{factory.__qualname__}: its annotations name {error.name!r}, unknown at the module's top level"
            ) from error
        return get_args(returns)[0] if get_origin(returns) is not None and get_args(returns) else None


async def _enter(stack: AsyncExitStack, factory: Callable[..., Any]) -> Any:
    if inspect.isasyncgenfunction(factory):
        return await stack.enter_async_context(asynccontextmanager(factory)())
    return stack.enter_context(contextmanager(factory)())
