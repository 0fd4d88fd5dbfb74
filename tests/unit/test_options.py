"""Options are checked where they are written, and name themselves when they are wrong."""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

import pytest

from postroom import App, ConfigurationError, PostroomError, RetryPolicy, exponential

app = App("memory://")


@app.task(priority=3, result_ttl=dt.timedelta(hours=1))
def task(a: int) -> None: ...


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"delay": -1}, "delay"),
        ({"delay": "soon"}, "delay"),
        ({"delay": float("inf")}, "delay"),
        ({"delay": 1, "at": dt.datetime.now(dt.UTC)}, "delay"),
        ({"at": dt.datetime(2026, 1, 1)}, "time zone"),
        ({"priority": 10}, "priority"),
        ({"priority": True}, "priority"),
        ({"key": ""}, "key"),
        ({"key": "x" * 256}, "key"),
        ({"idempotency_key": "a\nb"}, "idempotency_key"),
        ({"headers": {"a": 1}}, "headers"),
        ({"headers": {"a": "x" * 70_000}}, "headers"),
        ({"expires_in": 0}, "expires_in"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(PostroomError, match=field):
        task.using(**options)


def test_options_reach_the_message() -> None:
    before = time.time()
    message = (
        task.using(delay=dt.timedelta(minutes=1), key="k", idempotency_key="i", headers={"h": "v"}, expires_in=90)
        .call(1)
        .message
    )
    assert message.not_before == pytest.approx(before + 60, abs=5)
    assert message.expires_at == pytest.approx(before + 90, abs=5)
    assert (message.key, message.idempotency_key, message.headers) == ("k", "i", {"h": "v"})
    assert (message.priority, message.result_ttl, message.topic, message.name) == (3, 3600.0, "default", "task")
    assert task.using(priority=7).call(1).message.priority == 7


def test_an_absolute_time_is_kept_exactly() -> None:
    when = dt.datetime(2027, 5, 4, 3, 2, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    assert task.using(at=when).call(1).message.not_before == when.timestamp()


def test_exponential_backoff_doubles_up_to_its_limit() -> None:
    waits = exponential(first=1, factor=2, max=300, jitter=False)
    assert [waits(n) for n in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert waits(100) == waits(10**6) == 300


def test_jitter_stays_between_zero_and_the_wait() -> None:
    waits = exponential(first=10, factor=2, max=300)
    drawn = [waits(2) for _ in range(200)]
    assert 0 <= min(drawn) < 5 < 15 < max(drawn) <= 20


@pytest.mark.parametrize(
    "make",
    [
        lambda: RetryPolicy(max_attempts=0),
        lambda: RetryPolicy(backoff=3),  # type: ignore[arg-type]
        lambda: RetryPolicy(retry_on=["x"]),  # type: ignore[arg-type]
        lambda: exponential(first=-1),
        lambda: exponential(first=5, max=1),
        lambda: app.task(timeout=0)(print),
        lambda: app.task(lease=0.01)(print),
        lambda: app.task(isolation="thread")(print),  # type: ignore[call-overload]
        lambda: app.task(priority=11)(print),
        lambda: app.task(result_ttl=-1)(print),
        lambda: app.task(queue="a b")(print),
        lambda: app.task(name="")(lambda: None),
        lambda: app.topic("two words"),
        lambda: app.subscribe("a..b", "sub")(print),
        lambda: app.subscribe("default", "sub")(lambda event: None),
        lambda: app.topic("default"),
        lambda: App("memory://", queue_limit=0),
        lambda: App("memory://", max_message_size=0),
    ],
)
def test_wrong_configuration_is_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


def test_names_are_unique() -> None:
    mine = App("memory://")

    @mine.task
    def one() -> None: ...

    with pytest.raises(ConfigurationError, match="two tasks are named 'one'"):
        mine.task(name="one")(lambda: None)
    mine.topic("t")
    with pytest.raises(ConfigurationError, match="already"):
        mine.topic("t")
    mine.subscribe("t", "s")(lambda event: None)
    with pytest.raises(ConfigurationError, match="two subscriptions"):
        mine.subscribe("t", "s")(lambda event: None)
    with pytest.raises(ConfigurationError, match="subscription"):
        mine.task(queue="s")(lambda: None)


def test_the_broker_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTROOM_BROKER", raising=False)
    assert App().url == "sqlite:///postroom.db"
    monkeypatch.setenv("POSTROOM_BROKER", "memory://here")
    assert App().url == "memory://here"
    assert App("sqlite:///x.db").url == "sqlite:///x.db"


def test_a_store_is_refused_where_the_broker_is_the_store() -> None:
    with pytest.raises(ConfigurationError, match="store"):
        App("memory://", store="sqlite:///status.db").connect()
