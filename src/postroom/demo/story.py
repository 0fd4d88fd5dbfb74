"""The demo told step by step. Each step makes something happen, looks at the traces, and claims only what it saw."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from postroom.demo import sheet
from postroom.demo.client import Answer
from postroom.demo.evidence import Line
from postroom.demo.narrator import Narrator
from postroom.demo.service import Service, if_more

SUBSCRIPTIONS = ("gallery", "search-index", "notify")
_DAWDLE = 2.0
"""Seconds a job takes that is to be interrupted."""


@dataclass(frozen=True)
class Handed:
    """A photograph that the gateway has accepted."""

    photo: Path
    job_id: str
    latency: float


@dataclass
class Story:
    """One telling. Raises ``DemoFailed`` at the first claim that does not hold."""

    service: Service
    narrator: Narrator
    photos: Sequence[Path]
    workers: int
    pictures: list[tuple[str, str]] = field(default_factory=list)
    """Caption and thumbnail of each photo that was made."""
    summary: list[tuple[str, str]] = field(default_factory=list)
    """What was promised, and what was seen."""

    def tell(self) -> None:
        begin = time.monotonic()
        self.hand_in()
        self.fan_out()
        self.kill_a_worker()
        self.damage_a_photo()
        self.pay_twice()
        self.conclude(time.monotonic() - begin)

    def hand_in(self) -> None:
        """The photographs go in over HTTP and come out as thumbnails."""
        narrator, service = self.narrator, self.service
        narrator.heading(f"1  {_plural(len(self.photos), 'photograph')} over HTTP")
        handed: list[Handed] = []
        with narrator.waiting("uploading", len(self.photos)) as waiting:
            for photo in self.photos:
                answer = service.upload(photo.name, photo.read_bytes())
                handed.append(Handed(photo, answer.body["id"], answer.seconds))
                waiting.now(len(handed))
        with narrator.waiting("thumbnails", len(handed)) as waiting:
            for number, item in enumerate(handed, start=1):
                self._succeeded(item.job_id, item.photo.stem)
                waiting.now(number)
        self._report(handed)

    def _report(self, handed: Sequence[Handed]) -> None:
        starts = Counter(line.id for line in self.service.evidence.lines("start", subscription="thumbnails"))
        ends = {line.id: line for line in self.service.evidence.lines("end", subscription="thumbnails")}
        began = {line.id: line.at for line in self.service.evidence.lines("start", subscription="thumbnails")}
        self.narrator.table(
            [("photo", "left"), ("size", "right"), ("202 after", "right"), ("job took", "right"), ("worker", "right")],
            [
                (
                    item.photo.name,
                    f"{item.photo.stat().st_size / 1024:.0f} KiB",
                    _milliseconds(item.latency),
                    _milliseconds(ends[item.job_id].at - began[item.job_id]),
                    str(ends[item.job_id].pid),
                )
                for item in handed
            ],
        )
        slowest = max(item.latency for item in handed)
        pids = {ends[item.job_id].pid for item in handed}
        count = len(handed)
        self.narrator.check(
            len({item.job_id for item in handed}) == count,
            f"{count} of {count} answered 202 Accepted, the slowest after {_milliseconds(slowest)}",
            handed,
        )
        self.narrator.check(
            all(starts[item.job_id] == 1 for item in handed),
            f"each was handled once, by {_plural(len(pids), 'worker')} sharing the queue",
            starts,
        )
        self.summary.append(
            ("202 means stored", f"{count} accepted, {count} done; slowest answer {_milliseconds(slowest)}")
        )
        self.summary.append(
            (
                "workers share one queue",
                f"{_plural(count, 'job')}, each run once, by {_plural(len(pids), 'process', 'es')}",
            )
        )

    def fan_out(self) -> None:
        """Each thumbnail is an event; three subscriptions hear of it independently."""
        narrator, evidence = self.narrator, self.service.evidence
        narrator.heading('2  One event "photo.resized", three subscriptions')
        count = len(self.photos)
        with narrator.waiting("the subscriptions", count * len(SUBSCRIPTIONS)) as waiting:

            def all_heard() -> bool | None:
                heard = sum(len(evidence.lines("end", subscription=name)) for name in SUBSCRIPTIONS)
                waiting.now(heard)
                return heard >= count * len(SUBSCRIPTIONS) or None

            self.service.wait("all subscriptions", all_heard)
        words = evidence.rows("SELECT word FROM search GROUP BY word ORDER BY count(*) DESC, word")
        traces = {
            "gallery": f"{evidence.value('SELECT count(*) FROM gallery')} rows",
            "search-index": f"{len(words)} keywords: {', '.join(word for [word] in words[:3])}, …",
            "notify": f"{evidence.value('SELECT count(*) FROM letters')} letters",
        }
        starts = {name: Counter(line.id for line in evidence.lines("start", subscription=name)) for name in traces}
        narrator.table(
            [("subscription", "left"), ("events", "right"), ("handled twice", "right"), ("left behind", "left")],
            [
                (name, str(len(times)), str(sum(number > 1 for number in times.values())), traces[name])
                for name, times in starts.items()
            ],
        )
        narrator.check(
            all(len(times) == count and set(times.values()) == {1} for times in starts.values()),
            f"{count} events x 3 subscriptions = {count * 3} deliveries, none missing, none twice",
            starts,
        )
        letters = evidence.value("SELECT count(*) FROM letters")
        indexed = evidence.value("SELECT count(DISTINCT thumbnail) FROM search")
        narrator.check(
            {thumbnail for [thumbnail] in evidence.rows("SELECT thumbnail FROM gallery")}
            == {thumbnail for _, thumbnail in self.pictures}
            and (letters, indexed) == (count, count),
            "gallery, search index and letters agree with the thumbnails on disk",
            (letters, indexed),
        )
        self.summary.append(("every subscription hears it", f"{count} events x 3 = {count * 3} deliveries"))

    def kill_a_worker(self) -> None:
        """kill -9 in the middle of a job: another worker takes it over."""
        narrator, service, evidence = self.narrator, self.service, self.service.evidence
        narrator.heading("3  kill -9 in the middle of a job")
        photo = self.photos[len(self.photos) // 2]
        name = f"{photo.stem}-survivor{photo.suffix}"
        job_id = service.upload(name, photo.read_bytes(), pause=_DAWDLE).body["id"]
        with narrator.waiting("a worker is half-way through"):
            service.wait("half-way progress", lambda: service.status(job_id).get("progress"))
        [first] = evidence.lines("start", job_id=job_id)
        killed_at = time.time()
        os.kill(first.pid, signal.SIGKILL)
        narrator.check(
            not evidence.lines("end", job_id=job_id), f"worker {first.pid} was half-way through {name}: killed", job_id
        )
        with narrator.waiting("another worker takes over"):
            second = service.wait("the redelivery", lambda: _second(evidence.lines("start", job_id=job_id)))
        delay = second.at - killed_at
        narrator.check(second.pid != first.pid, f"worker {second.pid} had the job {_milliseconds(delay)} later", second)
        with narrator.waiting("it finishes the job"):
            status = self._succeeded(job_id, f"{photo.stem}, survived kill -9")
        starts = evidence.lines("start", job_id=job_id)
        narrator.check(
            len(starts) == 2 and status["attempt"] == 2,
            "finished on attempt 2: a death counts, so a job that kills cannot loop",
            (starts, status),
        )
        with narrator.waiting("a new worker"):
            pids = service.wait("a new worker", lambda: if_more(service.pids(), self.workers))
        narrator.check(pids[-1] != first.pid, f"the supervisor has started worker {pids[-1]} in its place", pids)
        self.summary.append(("kill -9 loses nothing", f"redelivered after {_milliseconds(delay)}, done on attempt 2"))

    def damage_a_photo(self) -> None:
        """Half a JPEG fails five times, is kept as a dead letter, repaired, and sent again."""
        narrator, service = self.narrator, self.service
        narrator.heading("4  A damaged photo: five strikes, dead letter, redrive")
        photo = self.photos[-1]
        whole = photo.read_bytes()
        name = f"{photo.stem}-damaged{photo.suffix}"
        job_id = service.upload(name, whole[: len(whole) // 2]).body["id"]
        with narrator.waiting("five attempts"):
            status = service.ended(job_id)
        narrator.check(
            status["state"] == "dead", f"half of {photo.name}: dead after {status['attempt']} attempts", status
        )
        path = f"/v1/dead-letters/thumbnails/{job_id}"
        # With a store beside the broker the status is there a moment before the letter.
        letter = service.wait("the dead letter", lambda: _if_found(service.client.get(path)))
        self._show(letter)
        narrator.check(
            len(letter["failures"]) == 5 and len(service.evidence.lines("start", job_id=job_id)) == 5,
            "exactly 5 starts; body, file and all errors are kept until you decide",
            letter,
        )
        copy = service.uploads / job_id / "photo" / name
        copy.write_bytes(whole)
        narrator.say(
            f"  the uploaded file is repaired: {len(whole) // 2 / 1024:.0f} KiB -> {len(whole) / 1024:.0f} KiB"
        )
        answer = service.client.post(f"{path}/redrive")
        narrator.check(answer.status in (200, 202), f"POST {path}/redrive", answer)
        with narrator.waiting("redriven"):
            self._succeeded(job_id, f"{photo.stem}, repaired")
        narrator.check(
            service.client.get(path).status == 404, "the same job has succeeded, and the dead letter is gone", job_id
        )
        self.summary.append(("five strikes, then kept", "dead after 5 attempts, repaired, redriven, done"))

    def _show(self, letter: dict[str, Any]) -> None:
        self.narrator.quote(f"dead letter {letter['id']}\nqueue {letter['subscription']}, task {letter['name']}")
        self.narrator.quote(f"body  {json.dumps(letter['body'])}")
        times = [datetime.fromisoformat(item["failed_at"]) for item in letter["failures"]]
        self.narrator.table(
            [("attempt", "right"), ("after", "right"), ("error", "left")],
            [
                (
                    str(item["attempt"]),
                    f"{(at - times[0]).total_seconds():.2f} s",
                    f"{item['error']}: {item['message']}",
                )
                for item, at in zip(letter["failures"], times, strict=True)
            ],
        )

    def pay_twice(self) -> None:
        """A payment delivered twice is applied once."""
        narrator, service, evidence = self.narrator, self.service, self.service.evidence
        narrator.heading("5  A payment delivered twice, applied once")
        balance = "SELECT amount FROM accounts WHERE name = 'alice'"
        before = evidence.value(balance)
        narrator.say("  amount = amount - 10, and the worker dies after the commit, before the ack")
        job_id = service.enqueue("pay", {"account": "alice", "amount": 10, "crash": True}).body["id"]
        with narrator.waiting("two deliveries"):
            status = service.ended(job_id)
        starts = evidence.lines("start", job_id=job_id)
        narrator.check(
            len(starts) == 2 and starts[0].pid != starts[1].pid,
            f"delivered twice: to worker {starts[0].pid}, which died, and to worker {starts[-1].pid}",
            starts,
        )
        narrator.check(
            status["state"] == "succeeded" and status.get("result") is None,
            "the second found the mark of ctx.once beside the data and changed nothing",
            status,
        )
        marks = evidence.value("SELECT count(*) FROM postroom_inbox WHERE message_id = ?", job_id)
        after = evidence.value(balance)
        narrator.check((after, marks) == (before - 10, 1), f"balance {before} -> {after}", (after, marks))
        self.summary.append(("effects exactly once", f"2 deliveries, 1 payment: balance {before} -> {after}"))

    def conclude(self, seconds: float) -> None:
        """Nothing is left over, and the summary."""
        narrator, service = self.narrator, self.service
        narrator.heading("Summary")
        with narrator.waiting("the last events"):
            service.wait("all subscriptions", self._all_quiet)
        letters = service.evidence.value("SELECT count(*) FROM letters")
        narrator.table([("promise", "left"), ("seen", "left")], self.summary)
        narrator.check(
            letters == len(self.pictures),
            f"nothing waits, nothing is lost: {letters} thumbnails, {letters} letters, no dead letters",
            letters,
        )
        narrator.say(f"  {seconds:.1f} s; two workers were killed on the way")

    def draw(self, target: Path) -> None:
        """Write the contact sheet."""
        title = [
            "Postroom",
            f"{len(self.pictures)} thumbnails",
            f"by {_plural(self.workers, 'worker process', 'es')}",
            "while two were killed",
        ]
        sheet.write(
            target, title, [(caption, self.service.out / "thumbnails" / name) for caption, name in self.pictures]
        )

    def _all_quiet(self) -> bool | None:
        queues = self.service.client.get("/v1/queues").body["queues"]
        return all(queue[kind] == 0 for queue in queues for kind in ("ready", "delayed", "running", "dead")) or None

    def _succeeded(self, job_id: str, caption: str) -> dict[str, Any]:
        status = self.service.ended(job_id)
        if status["state"] != "succeeded":
            self.narrator.check(False, f"the job for {caption} succeeds", status)
        self.pictures.append((caption, status["result"]["thumbnail"]))
        return status


def _if_found(answer: Answer) -> Any | None:
    return answer.body if answer.status == 200 else None


def _second(lines: Sequence[Line]) -> Line | None:
    return lines[1] if len(lines) > 1 else None


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _plural(number: int, word: str, ending: str = "s") -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}{ending}"
