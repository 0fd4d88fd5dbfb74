"""Typical user code; only type checkers run it. Each wrong line carries the error that it must raise."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import assert_type

from postroom import INJECTED, App, Context, Job, JobStatus, RetryPolicy, Upload, exponential

app = App("memory://")


class Pool: ...


@app.resource
def pool() -> Iterator[Pool]:
    yield Pool()


@app.lifespan
async def life() -> AsyncIterator[None]:
    yield


@dataclass
class UserSignup:
    user_id: int
    email: str


@app.task
def resize(photo: str, width: int = 320) -> str:
    return f"{photo}@{width}"


@app.task(queue="partners", retry=RetryPolicy(max_attempts=3, backoff=exponential(first=2)), timeout=10)
async def call_partner(order_id: int, ctx: Context = INJECTED, pool: Pool = INJECTED) -> int:
    ctx.progress(0.5, "half")
    return order_id


@app.task(isolation="process")
def develop(photo: Upload) -> None:
    photo.read_bytes()


signups = app.topic("user.signup", UserSignup)


@signups.subscribe("welcome-email")
async def send_welcome(event: UserSignup) -> None: ...


@app.subscribe("order.*", "audit", where={"region": "eu"}, start="earliest")
def audit(event: dict[str, object], ctx: Context) -> None: ...


def produce() -> None:
    assert_type(resize.enqueue("cat.jpg", width=200), Job[str])
    assert_type(resize.using(delay=60, key="user-7").enqueue("cat.jpg"), Job[str])
    assert_type(resize("cat.jpg"), str)
    assert_type(call_partner.enqueue(3), Job[int])
    assert_type(resize.enqueue("cat.jpg").result(timeout=10), str)
    assert_type(resize.enqueue("cat.jpg").status(), JobStatus)
    assert_type(resize.enqueue_many(resize.call(name) for name in ("a", "b")), list[Job[str]])
    signups.publish(UserSignup(1, "a@example.com"))
    resize.enqueue(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    resize.enqueue("cat.jpg", height=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    resize.enqueue()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    signups.publish("nobody")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def aproduce() -> None:
    assert_type(await resize.aenqueue("cat.jpg"), Job[str])
    assert_type(await call_partner(3), int)
    assert_type(await (await call_partner.aenqueue(3)).aresult(), int)
    await signups.apublish(UserSignup(1, "a@example.com"))
