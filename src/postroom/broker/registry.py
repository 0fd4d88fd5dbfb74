"""From a URL to a broker: schemes are entry points, so that anybody can add one."""

from __future__ import annotations

from importlib.metadata import entry_points

from postroom.broker.base import Broker
from postroom.broker.lanes import LanedBroker, take_levels
from postroom.clock import Clock
from postroom.errors import ConfigurationError

GROUP = "postroom.brokers"
"""The entry-point group: name = scheme of the URL, value = a class that takes ``(url, *, clock=None)``."""


def make_broker(url: str, *, clock: Clock | None = None) -> Broker:
    """The broker for a URL, not connected yet. Raises ``ConfigurationError``."""
    scheme, separator, _ = url.partition("://")
    known = {point.name: point for point in entry_points(group=GROUP)}
    if not separator or scheme not in known:
        raise ConfigurationError(
            f"no broker for {scheme + separator or url!r}; known are {'://, '.join(sorted(known))}://, "
            "and others by installing a package that provides them"
        )
    try:
        broker_class = known[scheme].load()
    except ImportError as error:
        # Several schemes may lead to one of our adapters, whose package bears the name of its extra.
        *ours, adapter = known[scheme].module.split(".")
        hint = f"pip install 'postroom[{adapter if ours == ['postroom', 'broker'] else scheme}]'"
        raise ConfigurationError(f"{scheme}:// needs a package that is missing ({error}); {hint}") from error
    address, levels = take_levels(url)
    broker: Broker = broker_class(address, clock=clock)
    return LanedBroker(broker, levels, clock=clock) if levels else broker
