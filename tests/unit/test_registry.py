"""From a URL to the class of its broker."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from postroom import ConfigurationError
from postroom.broker import registry
from postroom.broker.memory import MemoryBroker
from postroom.broker.sqlite import SQLiteBroker
from postroom.testing.clock import ManualClock


def test_the_scheme_decides() -> None:
    assert isinstance(registry.make_broker("memory://"), MemoryBroker)
    assert isinstance(registry.make_broker("sqlite:///x.db"), SQLiteBroker)


def test_the_clock_is_handed_on() -> None:
    clock = ManualClock()
    broker = registry.make_broker("sqlite:///x.db", clock=clock)
    assert isinstance(broker, SQLiteBroker)
    assert broker.clock is clock


@pytest.mark.parametrize("url", ["mongodb://localhost", "postroom.db", ""])
def test_an_unknown_scheme_is_refused_and_the_known_ones_are_named(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"memory://.*, sqlite://"):
        registry.make_broker(url)


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="redis", value="no_such_client.broker:Broker", group=registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [point] if group == registry.GROUP else [])
    with pytest.raises(ConfigurationError, match=r"no_such_client.*pip install 'postroom\[redis\]'"):
        registry.make_broker("redis://localhost")


def test_the_extra_is_that_of_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="kafka+ssl", value="postroom.broker.no_such_adapter:Broker", group=registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [point])
    with pytest.raises(ConfigurationError, match=r"pip install 'postroom\[no_such_adapter\]'"):
        registry.make_broker("kafka+ssl://localhost")
