"""How a coroutine becomes a conformance test, and which tests a broker is excused from."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from postroom.broker.base import Capabilities
from postroom.testing.harness import Harness
from postroom.testing.scene import Scene

_LIMIT = 60.0
"""Real seconds for one test."""
_SLOWER = (1, 2, 4)
"""By how much the suite slows down, one time after the other, where the machine was too slow for its units."""


class ConformanceTest(NamedTuple):
    """A test of the suite."""

    name: str
    """``area.test_name``."""
    proves: tuple[str, ...]
    """The promises (C…) and invariants (I…) it stands for."""
    needs: tuple[str, ...]
    """The capabilities without which it is skipped."""
    run: Callable[[Harness], None]


SUITE: dict[str, ConformanceTest] = {}
"""Every test of the areas imported so far, by name; importing ``postroom.testing.conformance`` imports all."""


def proves(*promises: str) -> Callable[[Callable[[Scene], Awaitable[None]]], Callable[[Harness], None]]:
    """Make the coroutine a test that takes the ``harness`` fixture; the outermost decorator."""

    def decorate(scenario: Callable[[Scene], Awaitable[None]]) -> Callable[[Harness], None]:
        needs: tuple[str, ...] = getattr(scenario, "needs", ())

        def test(harness: Harness) -> None:
            lacking = [need for need in needs if not supports(harness.capabilities, need)]
            if lacking:
                pytest.skip(f"the broker declares that it lacks: {', '.join(lacking)}")
            __tracebackhide__ = True
            unit = harness.unit
            for factor in _SLOWER:
                harness.unit = unit * factor
                scene = Scene(harness)
                try:
                    asyncio.run(_play(scenario, scene))
                    break
                except AssertionError as error:
                    if factor == _SLOWER[-1] or not scene.was_too_slow:
                        raise _shortened(error, scenario) from None

        test.__name__ = test.__qualname__ = scenario.__name__
        test.__module__, test.__doc__ = scenario.__module__, f"{', '.join(promises)}: {scenario.__doc__}"
        name = f"{scenario.__module__.rpartition('.')[2]}.{scenario.__name__}"
        SUITE[name] = ConformanceTest(name, promises, needs, test)
        return test

    return decorate


def requires(*capabilities: str) -> Callable[[Any], Any]:
    """The only reason to skip: a capability the broker declares it lacks. Stands below ``proves``."""
    unknown = set(capabilities) - set(Capabilities.__struct_fields__)
    if unknown:
        raise ValueError(f"requires: no capability is named {', '.join(sorted(unknown))}")

    def decorate(scenario: Any) -> Any:
        scenario.needs = capabilities
        return scenario

    return decorate


def supports(capabilities: Capabilities, name: str) -> bool:
    """Whether the broker has the capability at all."""
    value = getattr(capabilities, name)
    if name == "durability":
        return bool(value != "none")
    if name in ("delay", "max_message_size"):
        # No limit at all is the most one can have of a delay; of a size limit it is none.
        return bool(value) or (name == "delay" and value is None)
    return bool(value)


def covered_by(capabilities: Capabilities) -> dict[str, tuple[str, ...]]:
    """Every test by name with the capabilities it is skipped for: none for those that run."""
    return {
        name: tuple(need for need in test.needs if not supports(capabilities, need)) for name, test in SUITE.items()
    }


async def _play(scenario: Callable[[Scene], Awaitable[None]], scene: Scene) -> None:
    async with asyncio.timeout(_LIMIT), scene:
        await scenario(scene)


def _shortened(error: AssertionError, scenario: Callable[[Scene], Awaitable[None]]) -> AssertionError:
    """Without the frames of the event loop, so that a failure begins in the test itself."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_name != scenario.__name__:
        found = found.tb_next
    return error.with_traceback(found or error.__traceback__)
