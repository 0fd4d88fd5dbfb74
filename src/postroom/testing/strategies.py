"""What the sequences of the state machine are made of."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from postroom.broker.base import Ack, Cancel, Dead, Outcome, Release, Retry
from postroom.testing.scene import failure

outcomes: st.SearchStrategy[Outcome] = st.one_of(
    st.just(Ack(b"1")),
    st.builds(Retry, delay=st.sampled_from([0.0, 20.0]), failure=st.just(failure()), suspect=st.booleans()),
    st.builds(Release, delay=st.sampled_from([0.0, 20.0])),
    st.just(Dead(failure())),
    st.just(Dead(failure())),
    st.just(Cancel()),
)
picks = st.integers(min_value=0, max_value=1_000)


class Draft(NamedTuple):
    """What a message is to be made of; times in seconds from now."""

    delay: float | None
    lifetime: float | None
    priority: int
    key: str | None
    idempotency_key: str | None
    body: str


drafts = st.builds(
    Draft,
    delay=st.sampled_from([None, None, None, 15.0, 50.0]),
    lifetime=st.sampled_from([None, None, None, 12.5, 100.5]),
    priority=st.integers(0, 2),
    key=st.sampled_from([None, "x", "y"]),
    idempotency_key=st.sampled_from([None, None, None, "i", "j"]),
    body=st.sampled_from(["a", "b"]),
)
