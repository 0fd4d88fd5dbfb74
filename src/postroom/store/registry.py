"""From a URL to a store: schemes are entry points, so that anybody can add one."""

from __future__ import annotations

from importlib.metadata import entry_points

from postroom.broker.base import Broker
from postroom.clock import Clock
from postroom.errors import ConfigurationError
from postroom.store.base import Store

GROUP = "postroom.stores"
"""The entry-point group: name = scheme of the URL, value = a class that takes ``(url, *, clock=None)``."""


def make_store(url: str, *, clock: Clock | None = None) -> Store:
    """The store for a URL, not connected yet. Raises ``ConfigurationError``."""
    scheme, separator, _ = url.partition("://")
    known = {point.name: point for point in entry_points(group=GROUP)}
    if not separator or scheme not in known:
        raise ConfigurationError(
            f"no store for {scheme + separator or url!r}; known are {'://, '.join(sorted(known))}://"
        )
    try:
        store_class = known[scheme].load()
    except ImportError as error:
        hint = f"pip install 'postroom[{known[scheme].module.rpartition('.')[2]}]'"
        raise ConfigurationError(f"{scheme}:// needs a package that is missing ({error}); {hint}") from error
    store: Store = store_class(url, clock=clock)
    return store


def with_store(broker: Broker, url: str | None) -> Broker:
    """``broker`` with a store beside it, if there is a URL of one.

    Raises ``ConfigurationError`` if the broker keeps status and results itself: two truths would differ.
    """
    if url is None:
        return broker
    if broker.capabilities.jobs:
        raise ConfigurationError(
            "App(store=…) or POSTROOM_STORE is set, but this broker keeps status and results itself; remove it"
        )
    from postroom.store.beside import StoredBroker

    return StoredBroker(broker, make_store(url))
