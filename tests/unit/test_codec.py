"""What JSON can carry, what it is refused, and how the culprit is named."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest

from postroom import INJECTED, App, ConfigurationError, Context, EncodeError, Upload, ValidationError
from postroom.handler import TaskHandler


@dataclasses.dataclass
class Address:
    street: str
    number: int


class Point(msgspec.Struct):
    x: float
    y: float


class Options(TypedDict, total=False):
    quality: int


class Order(pydantic.BaseModel):
    id: int
    placed: dt.date


class Unknown:
    pass


def handler_of(function: Any, **options: Any) -> TaskHandler:
    app = App("memory://")
    return app.task(**options)(function).handler


def round_trip(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    handler = handler_of(function)
    return handler.decode(handler.encode(args, kwargs))


def test_declared_types_arrive_as_they_were_sent() -> None:
    def task(
        address: Address, point: Point, options: Options, order: Order, when: dt.datetime, tags: set[str], file: Path
    ) -> None: ...

    sent = {
        "address": Address("Main", 5),
        "point": Point(1.0, 2.0),
        "options": {"quality": 3},
        "order": Order(id=1, placed=dt.date(2026, 1, 2)),
        "when": dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
        "tags": {"a", "b"},
        "file": Path("/tmp/x"),
    }
    assert round_trip(task, **sent) == sent


def test_only_what_was_passed_travels() -> None:
    def task(a: int, b: list[int] = [1], *, c: str = "x", ctx: Context = INJECTED) -> None: ...  # noqa: B006

    handler = handler_of(task)
    assert handler.encode((1,), {}) == b'{"a":1}'
    assert handler.decode(b'{"a":1}') == {"a": 1}
    assert handler.decode(handler.encode((1, [2]), {"c": "y"})) == {"a": 1, "b": [2], "c": "y"}
    assert handler.injected == {"ctx": Context}


@pytest.mark.parametrize(
    ("args", "kwargs", "field"),
    [
        (("1",), {}, "a"),
        ((1,), {"b": [1, "x"]}, "b[1]"),
        ((1,), {"c": None}, "c"),
    ],
)
def test_wrong_types_are_refused_with_the_field_named(args: Any, kwargs: Any, field: str) -> None:
    def task(a: int, b: list[int] = [], *, c: str = "x") -> None: ...  # noqa: B006

    with pytest.raises(ValidationError) as caught:
        handler_of(task).encode(args, kwargs)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "missing a required argument: 'a'"),
        ((1, 2), {}, "too many positional arguments"),
        ((1,), {"z": 1}, "unexpected keyword argument 'z'"),
        ((1,), {"ctx": 1}, "unexpected keyword argument 'ctx'"),
    ],
)
def test_calls_that_do_not_fit_are_refused(args: Any, kwargs: Any, text: str) -> None:
    def task(a: int, ctx: Context = INJECTED) -> None: ...

    with pytest.raises(ValidationError, match=text):
        handler_of(task).encode(args, kwargs)


@pytest.mark.parametrize(
    "value",
    [{1}, math.nan, math.inf, {1: 2}, dt.datetime.now(dt.UTC), object(), b"x", [1, {"a": {2}}], Address("a", 1)],
    ids=["set", "nan", "inf", "number as name", "time", "object", "bytes", "set within", "struct"],
)
def test_untyped_arguments_that_json_would_change_are_refused(value: Any) -> None:
    def task(data: Any) -> None: ...

    def listed(data: list[Any]) -> None: ...

    with pytest.raises(EncodeError, match="data"):
        handler_of(task).encode((value,), {})
    with pytest.raises(EncodeError, match="data"):
        handler_of(listed).encode(([value],), {})


def test_untyped_plain_data_is_carried() -> None:
    def task(data, more=None): ...  # type: ignore[no-untyped-def]

    plain = {"a": [1, 2.5, None, True, "x", {"b": []}]}
    assert round_trip(task, plain, more=3) == {"data": plain, "more": 3}


def test_nan_is_refused_for_float_parameters_too() -> None:
    def task(x: float) -> None: ...

    with pytest.raises(ValidationError, match="x"):
        handler_of(task).encode((math.nan,), {})


def test_an_argument_that_fails_to_encode_is_named() -> None:
    def task(a: int, point: Point) -> None: ...

    with pytest.raises(EncodeError, match="point"):
        handler_of(task).encode((1, Unknown()), {})


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"a":1,"b":' + b"[" * 100_000], ids=len)
def test_bytes_that_are_no_json_are_undecodable(body: bytes) -> None:
    from postroom import DecodeError

    def task(a: int, b: Any = None) -> None: ...

    handler = handler_of(task)
    handler.compile()
    with pytest.raises(DecodeError):
        handler.decode(body)


def test_a_newer_producers_argument_is_not_ignored() -> None:
    def task(a: int) -> None: ...

    handler = handler_of(task)
    handler.compile()
    with pytest.raises(ValidationError) as caught:
        handler.decode(b'{"a":1,"b":2}')
    assert caught.value.field == "b"


def test_functions_that_cannot_be_called_by_message_are_refused() -> None:
    def star(*args: int) -> None: ...

    def keywords(**kwargs: int) -> None: ...

    def positional(a: int, /) -> None: ...

    def custom(a: Unknown) -> None: ...

    def injected(a: int, pool: Unknown = INJECTED) -> None: ...

    def result() -> Unknown: ...  # type: ignore[empty-body]

    for function, word in [
        (star, "args"),
        (keywords, "kwargs"),
        (positional, "'a'"),
        (custom, "Unknown"),
        (injected, "pool"),
        (result, "return value"),
    ]:
        with pytest.raises(ConfigurationError, match=word):
            handler_of(function).compile()


def test_generators_are_no_handlers() -> None:
    def generator() -> Any:
        yield

    with pytest.raises(ConfigurationError, match="generator"):
        handler_of(generator)


def test_uploads_are_found_among_the_parameters() -> None:
    def task(photo: Upload, mask: Upload | None = None, plain: Path = Path()) -> None: ...

    handler = handler_of(task)
    handler.compile()
    assert handler.uploads == {"photo", "mask"}


def test_a_pydantic_error_names_the_parameter() -> None:
    def task(order: Order) -> None: ...

    handler = handler_of(task)
    handler.compile()
    with pytest.raises(ValidationError) as caught:
        handler.decode(b'{"order":{"id":"x","placed":"2026-01-02"}}')
    assert caught.value.field == "order"
