"""Values to JSON and back, with their declared types checked on both ways.

JSON only: nothing here can run code. Dataclasses, ``msgspec.Struct``, ``TypedDict``, pydantic models and
the standard types that `msgspec <https://jcristharif.com/msgspec/supported-types.html>`_ knows are carried.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, get_args, get_origin

import msgspec
from msgspec import inspect as msgspec_inspect

from postroom.errors import ConfigurationError, DecodeError, EncodeError, ValidationError

_LOOSE = (Any, object, dict, list, tuple, Mapping)


def _is_pydantic(value_type: Any) -> bool:
    return hasattr(value_type, "model_validate") and hasattr(value_type, "model_dump")


def _encode_other(value: Any) -> Any:
    if _is_pydantic(type(value)):
        return value.model_dump(mode="json")
    if isinstance(value, PurePath):
        return os.fspath(value)
    raise NotImplementedError(f"JSON cannot carry a {type(value).__qualname__}")


def _decode_other(value_type: type, value: Any) -> Any:
    if _is_pydantic(value_type):
        return value_type.model_validate(value)  # type: ignore[attr-defined]
    if issubclass(value_type, PurePath):
        if not isinstance(value, str):
            raise ValueError(f"Expected a path as `str`, got `{type(value).__name__}`")
        return value_type(value)
    raise NotImplementedError(f"JSON cannot carry a {value_type.__qualname__}")


encode = msgspec.json.Encoder(enc_hook=_encode_other).encode
"""Any supported value as JSON bytes; raises what msgspec raises (see :func:`encode_field`)."""


def decoder(value_type: Any) -> msgspec.json.Decoder[Any]:
    """A typed decoder. It raises ``msgspec.DecodeError``, and its subclass ``msgspec.ValidationError``."""
    return msgspec.json.Decoder(value_type, dec_hook=_decode_other)


def encode_field(value: Any, field: str) -> bytes:
    """``value`` as JSON. Raises ``EncodeError`` that names ``field``."""
    try:
        return encode(value)
    except (TypeError, ValueError, NotImplementedError, OverflowError, RecursionError) as error:
        raise EncodeError(f"{field}: {error}; pass plain data (an id, a path, a dataclass) instead") from error


def decode_body(body: bytes, body_decoder: msgspec.json.Decoder[Any], what: str) -> Any:
    """A typed value from ``body``.

    Raises ``ValidationError`` for JSON of the wrong shape (``field`` named) and ``DecodeError`` for what is no JSON.
    """
    try:
        return body_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise ValidationError(f"{what}: {error}", field=field_of(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"{what}: the body is not JSON: {error}") from error


def field_of(error: msgspec.ValidationError) -> str:
    """The JSON path msgspec names, without its root: ``$.user.age`` becomes ``user.age``."""
    text = str(error)
    path = text.rpartition("at `")[2].rstrip("`") if "at `" in text else ""
    if not path and "field `" in text:
        return text.rpartition("field `")[2].rstrip("`")
    return path.removeprefix("$").lstrip(".")


def check_type(value_type: Any, what: str) -> None:
    """Raise ``ConfigurationError`` if values of this type cannot travel as JSON."""
    try:
        unsupported = [
            node.cls
            for node in _walk(msgspec_inspect.type_info(value_type))
            if isinstance(node, msgspec_inspect.CustomType)
            and not (_is_pydantic(node.cls) or issubclass(node.cls, PurePath))
        ]
    except TypeError as error:
        raise ConfigurationError(f"{what}: JSON cannot carry its type: {error}") from error
    if unsupported:
        raise ConfigurationError(
            f"{what}: JSON cannot carry {unsupported[0].__qualname__}; use a dataclass, a msgspec.Struct, a TypedDict, "
            "a pydantic model or a standard type, or register a resource if it is to be injected"
        )


def _walk(node: Any, seen: set[int] | None = None) -> Iterable[Any]:
    """A type-info tree, each node once (types may refer to themselves)."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    yield node
    for name in getattr(node, "__struct_fields__", ()):
        children = getattr(node, name)
        for child in children if isinstance(children, tuple) else (children,):
            if isinstance(child, msgspec_inspect.Type | msgspec_inspect.Field):
                yield from _walk(child, seen)


def is_loose(value_type: Any) -> bool:
    """Whether the type says nothing of what is inside, so that decoding cannot restore what JSON changes."""
    if value_type in _LOOSE:
        return True
    return get_origin(value_type) is not None and any(is_loose(part) for part in get_args(value_type))


def refuse_lossy(value: Any, field: str) -> None:
    """Raise ``EncodeError`` if JSON would silently turn ``value`` into something else.

    For arguments without a telling type: a ``datetime`` in an unannotated argument would arrive as text.
    """
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise EncodeError(f"{field}: JSON cannot carry {value}")
        return
    if isinstance(value, list | tuple):
        for position, item in enumerate(value):
            refuse_lossy(item, f"{field}[{position}]")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise EncodeError(f"{field}: the key {key!r} is no text, and JSON has only text keys")
            refuse_lossy(item, f"{field}[{key!r}]")
        return
    raise EncodeError(
        f"{field}: a {type(value).__qualname__} would not arrive as one, because the parameter's type does not say so; "
        "annotate the parameter with it"
    )
