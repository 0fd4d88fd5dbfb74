"""A user's function seen from both ends: what it takes as arguments, and how it is called with them."""

from __future__ import annotations

import inspect
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec

from postroom import codec
from postroom.config import HandlerOptions
from postroom.context import INJECTED, Context
from postroom.errors import ConfigurationError, ValidationError
from postroom.store.inbox import transactions
from postroom.store.inbox.connections import kind_of_type

_UPLOAD = "postroom.upload"

Upload = Annotated[Path, _UPLOAD]
"""A file as an argument: kept beside the queue while the job lives (claim check), handed to the handler as a
``pathlib.Path``. Producers pass the path of a file of theirs; over HTTP it is a part of ``multipart/form-data``."""


class Handler(ABC):
    """A function with its options, bound to the subscription whose messages it handles.

    Its parameters are read at first use, when all resources are known.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        subscription: str,
        options: HandlerOptions,
        resources: Container[Any],
    ) -> None:
        self.function = function
        self.name = name
        self.subscription = subscription
        self.options = options
        self.is_async = inspect.iscoroutinefunction(function)
        self.injected: dict[str, Any] = {}
        """Parameter name → the type to inject."""
        self.connection: str | None = None
        """The parameter that gets the connection of ``options.transaction``."""
        self._resources = resources
        self._compiled = False
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise ConfigurationError(
                f"{self.label}: a generator cannot be a handler; write a function or an async function"
            )

    @property
    def label(self) -> str:
        return f"{self.name} ({self.function.__module__}.{self.function.__qualname__})"

    def compile(self) -> None:
        """Read the function's parameters. Raises ``ConfigurationError``."""
        if not self._compiled:
            self._check_transaction()
            self._accept(self._parameters())
            self._compiled = True

    @abstractmethod
    def decode(self, body: bytes) -> dict[str, Any]:
        """The keyword arguments for the function. Raises ``ValidationError`` or ``DecodeError``."""

    @abstractmethod
    def _accept(self, parameters: dict[str, inspect.Parameter]) -> None:
        """Read those that a message fills. Raises ``ConfigurationError``."""

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters a message fills, with resolved annotations; the others are noted as injected."""
        try:
            hints = get_type_hints(self.function, include_extras=True)
        except NameError as error:
            raise ConfigurationError(
                f"{self.label}: its annotations name {error.name!r}, which its module does not define at top level"
            ) from error
        self.returns = hints.get("return", Any)
        arguments: dict[str, inspect.Parameter] = {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ConfigurationError(
                    f"{self.label}: parameter {name!r}: *args, **kwargs and positional-only ones cannot travel by name"
                )
            hint = hints.get(name, Any)
            if self._is_connection(hint):
                self.connection = name
            elif hint is Context or (isinstance(hint, type) and hint in self._resources):
                self.injected[name] = hint
            elif parameter.default is INJECTED:
                raise ConfigurationError(
                    f"{self.label}: parameter {name!r} is to be injected, but there is no resource of type {hint}; "
                    "register one with @app.resource"
                )
            else:
                arguments[name] = parameter.replace(annotation=hint)
        return arguments

    def _is_connection(self, hint: Any) -> bool:
        own = get_origin(hint) or hint
        kind = kind_of_type(own) if self.options.transaction is not None and isinstance(own, type) else None
        if kind is not None and kind.awaited != self.is_async:
            raise ConfigurationError(
                f"{self.label}: transaction=: {own.__qualname__} is for {'async' if kind.awaited else 'sync'} handlers"
            )
        return kind is not None

    def _check_transaction(self) -> None:
        source = self.options.transaction
        if source is None:
            return
        transactions.check(source, self.label)
        if isinstance(source, type) and source not in self._resources:
            raise ConfigurationError(
                f"{self.label}: transaction={source.__qualname__}: there is no resource of this type; register one "
                "with @app.resource"
            )
        awaited = transactions.is_awaited(source)
        if awaited is not None and awaited != self.is_async:
            # A sync connection in a coroutine that waits for another's mark would stop the loop the other runs on.
            raise ConfigurationError(
                f"{self.label}: transaction={source!r} is for {'async' if awaited else 'sync'} handlers"
            )

    def _check_result_type(self) -> None:
        if self.returns not in (None, type(None), Any):
            codec.check_type(self.returns, f"{self.label}: return value")


class TaskHandler(Handler):
    """A task's function: the body is a JSON object with one member for each argument that was passed."""

    def _accept(self, parameters: dict[str, inspect.Parameter]) -> None:
        for name, parameter in parameters.items():
            codec.check_type(parameter.annotation, f"{self.label}: parameter {name!r}")
        self._check_result_type()
        self.parameters = parameters
        self.uploads = frozenset(name for name, item in parameters.items() if _is_upload(item.annotation))
        self._loose = tuple(name for name, item in parameters.items() if codec.is_loose(item.annotation))
        self._signature = inspect.Signature(list(parameters.values()))
        self.arguments = _struct(self.name, parameters)
        self._decoder = codec.decoder(self.arguments)
        self._optional = any(item.default is not item.empty for item in parameters.values())

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The body for a call with these arguments, checked against the declared types.

        Only what was passed travels: defaults are those of the worker's version of the function.
        Raises ``ValidationError`` and ``EncodeError``, naming the parameter.
        """
        self.compile()
        try:
            call = self.arguments(*args, **kwargs)
        except TypeError as error:
            raise ValidationError(f"{self.name}: {self._binding_error(args, kwargs)}") from error
        for name in self._loose:
            value = getattr(call, name)
            if value is not msgspec.UNSET:
                codec.refuse_lossy(value, f"{self.name}: parameter {name!r}")
        try:
            body = codec.encode(call)
        except (TypeError, ValueError, NotImplementedError, OverflowError, RecursionError):
            for name in self.arguments.__struct_fields__:
                codec.encode_field(getattr(call, name), f"{self.name}: parameter {name!r}")
            raise
        self.check(body)
        return body

    def check(self, body: bytes) -> None:
        """Raise ``ValidationError`` or ``DecodeError`` if the task cannot run with this body."""
        self.compile()
        codec.decode_body(body, self._decoder, self.name)

    def decode(self, body: bytes) -> dict[str, Any]:
        arguments = msgspec.structs.asdict(codec.decode_body(body, self._decoder, self.name))
        if self._optional:
            return {name: value for name, value in arguments.items() if value is not msgspec.UNSET}
        return arguments

    def _binding_error(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            return f"{error}; it takes {self._signature}"
        return f"the arguments do not fit {self._signature}"


class EventHandler(Handler):
    """A subscription's function: its first parameter is the event, decoded to that parameter's type."""

    def __init__(self, *args: Any, event_type: Any = Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._event_type = event_type

    def _accept(self, parameters: dict[str, inspect.Parameter]) -> None:
        required = [name for name, item in parameters.items() if item.default is item.empty]
        if len(required) != 1:
            raise ConfigurationError(
                f"{self.label}: a subscription's function takes the event as its one argument (and what is injected); "
                f"this one takes {required or 'none'}"
            )
        self._event = required[0]
        declared = parameters[self._event].annotation
        self._event_type = self._event_type if declared is Any else declared
        codec.check_type(self._event_type, f"{self.label}: parameter {self._event!r}")
        self._check_result_type()
        self._decoder = codec.decoder(self._event_type)

    def decode(self, body: bytes) -> dict[str, Any]:
        return {self._event: codec.decode_body(body, self._decoder, self.name)}


def _struct(name: str, parameters: Mapping[str, inspect.Parameter]) -> type[msgspec.Struct]:
    """A struct type with the function's parameters as fields: it binds, encodes and decodes in one."""
    positional: list[Any] = []
    keyword_only: list[Any] = []
    for item in parameters.values():
        field: Any = (item.name, item.annotation)
        if item.default is not item.empty:
            # UNSET members are left out of the JSON: the default stays the function's own affair.
            field = (*field, msgspec.UNSET)
        (keyword_only if item.kind is item.KEYWORD_ONLY else positional).append(field)
    try:
        base = msgspec.defstruct(f"{name}_keywords", keyword_only, kw_only=True, forbid_unknown_fields=True)
        return msgspec.defstruct(name, positional, bases=(base,), forbid_unknown_fields=True)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{name}: its parameters cannot be described: {error}") from error


def _is_upload(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _UPLOAD in annotation.__metadata__
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_is_upload(part) for part in get_args(annotation))
    return False


def module_of(value: object, module_name: str) -> str | None:
    """``"module:variable"`` under which a fresh process can import ``value``; ``None`` if it cannot.

    ``__main__`` stands for the script, which a spawned process imports too.
    """
    module = sys.modules.get(module_name)
    names = [name for name, item in vars(module).items() if item is value] if module else []
    return f"{module_name}:{names[0]}" if names else None
