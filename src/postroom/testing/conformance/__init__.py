"""The conformance suite: what every broker must do, as tests.

An author's test module::

    import pytest
    from postroom.testing.conformance import *
    from postroom.testing.harness import Harness

    class MyHarness(Harness): ...

    @pytest.fixture
    def harness():
        return MyHarness()

A test is skipped only for a capability that the broker declares it lacks: ``covered_by`` tells which.
"""

from postroom.testing.conformance import (  # noqa: F401
    concurrency,
    consume,
    dead_letters,
    deduplication,
    fan_out,
    fencing,
    jobs,
    lifecycle,
    limits,
    ordering,
    priorities,
    publish,
    retention,
    settle,
    timing,
    unique,
)
from postroom.testing.suite import SUITE

_TESTS = {name.rpartition(".")[2]: test.run for name, test in SUITE.items()}
if len(_TESTS) != len(SUITE):
    raise RuntimeError("two conformance tests have one name; pytest would run only the later")
globals().update(_TESTS)

__all__ = list(_TESTS)
