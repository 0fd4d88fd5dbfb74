"""Replaying to one subscription, and deleting it, from Python."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from postroom import App, SubscriptionNotFound
from tests.conftest import wait_until, working


def with_events(app: App) -> list[int]:
    """Two events handled by ``audit``. Returns what it has handled, as it grows."""
    handled: list[int] = []
    orders = app.topic("order.paid")

    @orders.subscribe("audit")
    async def audit(event: dict[str, Any]) -> None:
        handled.append(event["id"])

    @orders.subscribe("mail")
    async def mail(event: dict[str, Any]) -> None:
        raise AssertionError("not worked on here")

    orders.publish_many([{"id": 1}, {"id": 2}])
    with working(app, queues=["audit"]):
        wait_until(lambda: len(handled) == 2, "both were handled")
    return handled


def test_replay_goes_to_one_subscription(app: App) -> None:
    handled = with_events(app)
    assert app.replay("audit", since=time.time() + 60) == 0
    assert app.replay("audit") == 2
    assert {item.name: item.ready for item in app.stats()} == {"audit": 2, "mail": 2}
    assert asyncio.run(app.areplay("audit", since=0.0)) == 0, "those that have not ended are left alone"
    with working(app, queues=["audit"]):
        wait_until(lambda: len(handled) == 4, "both were handled again")
    assert sorted(handled) == [1, 1, 2, 2]


def test_unsubscribe_deletes_one_subscription(app: App) -> None:
    with_events(app)
    app.unsubscribe("mail")
    assert [item.name for item in app.stats()] == ["audit"]
    asyncio.run(app.aunsubscribe("audit"))
    assert app.stats() == []


def test_an_unknown_subscription_is_named(app: App) -> None:
    with pytest.raises(SubscriptionNotFound, match="nobody"):
        app.unsubscribe("nobody")
    with pytest.raises(SubscriptionNotFound, match="nobody"):
        app.replay("nobody")
