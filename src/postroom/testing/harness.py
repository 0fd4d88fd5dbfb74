"""The one class an author of a broker writes to run the conformance suite."""

from __future__ import annotations

from abc import ABC, abstractmethod

from postroom.broker.base import Broker, Capabilities
from postroom.testing.clock import ManualClock


class Harness(ABC):
    """Makes brokers of one kind on one storage, fresh for each test.

    ::

        class MyHarness(Harness):
            unit = 0.5

            def make_broker(self) -> Broker:
                return MyBroker("mine://localhost")

    Topics and subscriptions get unique names, so that tests can share a server.
    """

    clock: ManualClock | None = None
    """The clock given to every broker. ``None``: the server's own rules, and the suite really waits."""
    unit: float = 10.0
    """Seconds: the shortest delay the suite uses. Small where it has to wait, but well above ``slack``.

    Where the suite really waits, a test that failed after a step took more than an eighth of this proves nothing: it is
    repeated with this doubled, twice at most.
    """
    slack: float = 0.0
    """Seconds by which something may be late; at most half of ``unit``."""
    patience: float = 5.0
    """Real seconds after which something that should come counts as missing."""
    outage: float = 0.0
    """Real seconds that ``restart`` takes at most."""

    @property
    def lease(self) -> float:
        """Seconds: the lease used by the suite. Override it where the server has a minimum."""
        return 3 * self.unit

    @property
    def capabilities(self) -> Capabilities:
        return self.make_broker().capabilities

    @abstractmethod
    def make_broker(self) -> Broker:
        """A new broker, not connected, on the same storage as the others this harness made."""

    async def start(self) -> None:  # noqa: B027
        """Prepare the storage, before the first broker."""

    async def restart(self) -> None:  # noqa: B027
        """Restart the server, if there is one; all brokers are closed before, and made anew afterwards."""

    async def stop(self) -> None:  # noqa: B027
        """Remove what the test left, after the last broker was closed."""
