"""Ending a handler in a thread, and only the handler."""

from __future__ import annotations

import threading

import pytest

from postroom.worker.threads import Interrupted, Interruptible, ThreadPool


def test_a_spinning_function_is_ended() -> None:
    guard, spinning, ended = Interruptible(), threading.Event(), []

    def spin() -> None:
        try:
            while True:
                spinning.set()
        except Interrupted:
            ended.append("inside")

    thread = threading.Thread(target=lambda: guard.run(spin))
    thread.start()
    assert spinning.wait(5)
    guard.interrupt()
    thread.join(5)
    assert ended == ["inside"]


def test_what_follows_the_function_is_never_hit() -> None:
    for _ in range(300):
        guard, running = Interruptible(), threading.Event()
        survived = []

        def job(guard: Interruptible = guard, running: threading.Event = running, out: list[int] = survived) -> None:
            try:
                guard.run(running.set)
            except Interrupted:
                out.append(0)
            # Were the exception still on its way it would strike in here.
            out.append(sum(range(2000)))

        thread = threading.Thread(target=job)
        thread.start()
        running.wait(5)
        guard.interrupt()
        thread.join(5)
        assert survived[-1] == sum(range(2000))


def test_an_interrupt_before_or_after_does_nothing() -> None:
    guard = Interruptible()
    guard.interrupt()
    done: list[int] = []
    guard.run(lambda: done.append(1))
    guard.interrupt()
    assert done == [1]


def test_errors_pass_through() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Interruptible().run(fail)


def test_the_pool_runs_as_many_at_once_as_its_limit_and_no_more() -> None:
    pool, gate, started = ThreadPool(3), threading.Event(), threading.Semaphore(0)
    done = threading.Semaphore(0)

    def job() -> None:
        started.release()
        gate.wait(10)
        done.release()

    for _ in range(5):
        pool.submit(job)
    for _ in range(3):
        assert started.acquire(timeout=5)
    assert not started.acquire(timeout=0.1)
    gate.set()
    for _ in range(5):
        assert done.acquire(timeout=5)
    pool.close()
