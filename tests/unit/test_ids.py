"""Message ids: version 7 UUIDs that never repeat."""

from __future__ import annotations

import os
import threading
import time
import uuid

import pytest

from postroom.message import new_id


def test_ids_are_version_7_uuids_of_now() -> None:
    before = time.time_ns() // 1_000_000
    ids = [uuid.UUID(new_id()) for _ in range(2000)]
    after = time.time_ns() // 1_000_000
    for made in ids:
        assert (made.version, made.variant) == (7, uuid.RFC_4122)
        assert before <= made.int >> 80 <= after


def test_the_random_bits_are_random() -> None:
    """Each of the 74 is set in about half of the ids: 10 standard deviations are allowed."""
    values = [uuid.UUID(new_id()).int for _ in range(10_000)]
    for bit in (*range(62), *range(64, 76)):
        assert abs(sum(value >> bit & 1 for value in values) - 5_000) < 500, bit


def test_later_ids_sort_later() -> None:
    first = new_id()
    time.sleep(0.002)
    assert first < new_id()


def test_threads_get_ids_of_their_own() -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.extend([new_id() for _ in range(5_000)])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 20_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_makes_other_ids() -> None:
    new_id()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, new_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 100).decode()
    assert theirs[14:] != new_id()[14:]
