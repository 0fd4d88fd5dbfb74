"""What a handler may raise to say how its message goes on. These are answers, not errors."""

from __future__ import annotations

from typing import Any


class Signal(Exception):
    """The root of the answers below; never raised itself."""


class Retry(Signal):
    """Count this attempt as failed and try again, in ``delay`` seconds (default: the policy's backoff).

    Once the attempts are used up the message becomes a dead letter, as after any other failure.
    """

    def __init__(self, reason: str = "", *, delay: float | None = None) -> None:
        super().__init__(reason)
        self.delay = delay


class Snooze(Signal):
    """Run it again in ``delay`` seconds; nothing failed, no attempt is counted."""

    def __init__(self, delay: float) -> None:
        if not delay > 0:
            raise ValueError(f"Snooze(delay={delay!r}): give the seconds to wait, more than 0")
        super().__init__(f"snoozed for {delay} s")
        self.delay = delay


class Reject(Signal):
    """Make it a dead letter now: trying again cannot help."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class AlreadyProcessed(Signal):
    """This message's effect was committed before; counts as success.

    Raised by ``ctx.once``. ``result`` is what the job's result becomes.
    """

    def __init__(self, reason: str = "already processed", *, result: Any = None) -> None:
        super().__init__(reason)
        self.result = result
