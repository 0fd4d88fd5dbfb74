"""Uploaded files go when nobody can need them any more, and not before."""

from __future__ import annotations

import os
from pathlib import Path

from postroom import App, JobState, RetryPolicy, Upload
from postroom.message import new_id
from postroom.store.sweep import sweep
from tests.conftest import wait_until, working


def test_only_files_of_messages_that_have_ended_are_removed(url: str, tmp_path: Path) -> None:
    source = tmp_path / "cat.jpg"
    source.write_bytes(b"meow")
    with App(url, uploads=tmp_path / "uploads") as app:

        @app.task(retry=RetryPolicy(max_attempts=1))
        def fail(file: Upload) -> None:
            raise ValueError

        dead = fail.enqueue(source)
        with working(app):
            wait_until(lambda: dead.status().state is JobState.DEAD, "it is dead")
        waiting, cancelled, unknown = fail.enqueue(source), fail.enqueue(source), new_id()
        cancelled.cancel()
        app.blobs.copy(unknown, "file", source)
        young = new_id()
        app.blobs.copy(young, "file", source)
        for job_id in (dead.id, waiting.id, cancelled.id, unknown):
            os.utime(app.blobs.directory / job_id, (0, 0))

        assert app.thread.call(lambda broker: sweep(broker, app.blobs)) == 2
        assert {entry.name for entry in app.blobs.directory.iterdir()} == {dead.id, waiting.id, young}
