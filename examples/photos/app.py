"""A photo service: photographs come in over HTTP, workers make thumbnails of them, and three subscriptions
hear of each one. A payment shows an effect that happens once however often its message is delivered."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from database import Database
from pictures import colours, save, shrink

from postroom import INJECTED, App, Context, Reject, RetryPolicy, Upload, exponential

OUT = Path(os.environ.get("PHOTOS_OUT", "photos-out")).resolve()
"""Where thumbnails, the service's own database and the journal go."""

SOON = RetryPolicy(max_attempts=5, backoff=exponential(first=0.1, max=1.0))
LEASE = 8.0
"""Seconds after which a dead worker's job goes to another, where the broker cannot see that it died."""

app = App(uploads=OUT / "uploads")  # the broker's URL comes from POSTROOM_BROKER


@dataclass
class PhotoResized:
    photo: str
    thumbnail: str
    width: int
    height: int


resized = app.topic("photo.resized", PhotoResized)


@app.resource
def database() -> Iterator[Database]:
    database = Database(OUT / "photos.db")
    yield database
    database.close()


@app.task(queue="thumbnails", retry=SOON, lease=LEASE)
def make_thumbnail(photo: Upload, width: int = 320, pause: float = 0.0, ctx: Context = INJECTED) -> dict[str, Any]:
    """``pause``: seconds to dawdle half-way, so that there is time to pull the plug."""
    small = shrink(photo, width)
    ctx.progress(0.5, "scaled")
    time.sleep(pause)
    target = OUT / "thumbnails" / f"{photo.stem}.{ctx.job_id}.jpg"
    save(small, target)
    event = PhotoResized(photo.name, target.name, small.width, small.height)
    # The same key in every attempt: a job that runs again still announces its photo once.
    resized.using(idempotency_key=ctx.idempotency_key).publish(event)
    return {"thumbnail": target.name, "width": small.width, "height": small.height}


@resized.subscribe("gallery")
def add_to_gallery(event: PhotoResized, db: Database) -> None:
    """Idempotent by its primary key: once more changes nothing."""
    with db.transaction() as connection:
        row = (event.thumbnail, event.photo, event.width, event.height)
        connection.execute("INSERT OR REPLACE INTO gallery VALUES (?, ?, ?, ?)", row)


@resized.subscribe("search-index")
def index(event: PhotoResized, db: Database) -> None:
    words = {"wide" if event.width > event.height else "tall", *colours(OUT / "thumbnails" / event.thumbnail)}
    with db.transaction() as connection:
        connection.execute("DELETE FROM search WHERE thumbnail = ?", (event.thumbnail,))
        connection.executemany("INSERT INTO search VALUES (?, ?)", [(event.thumbnail, word) for word in words])


@resized.subscribe("notify")
def notify(event: PhotoResized, ctx: Context, db: Database) -> None:
    """Not idempotent by itself, so it marks the message as done in the same transaction."""
    with db.transaction() as connection:
        ctx.once(connection)
        connection.execute("INSERT INTO letters (text) VALUES (?)", (f"{event.photo} is in the gallery",))


@app.task(queue="payments", retry=SOON, lease=LEASE)
def pay(
    account: str, amount: int, crash: bool = False, ctx: Context = INJECTED, db: Database = INJECTED
) -> dict[str, int]:
    """``crash``: die after the commit, before Postroom learns of it: the message will be delivered again."""
    with db.transaction() as connection:
        ctx.once(connection)
        statement = "UPDATE accounts SET amount = amount - ? WHERE name = ? RETURNING amount"
        row = connection.execute(statement, (amount, account)).fetchone()
        if row is None:
            raise Reject(f"there is no account {account!r}")
    if crash:
        os._exit(70)
    return {"left": row[0]}


@app.middleware
async def journal(ctx: Context, call_next: Callable[[], Awaitable[Any]]) -> Any:
    """A line when a handler starts and one when it has ended well: who ran what, and when."""
    note("start", ctx)
    result = await call_next()
    note("end", ctx)
    return result


def note(what: str, ctx: Context) -> None:
    line = {"at": time.time(), "what": what, "subscription": ctx.subscription, "id": ctx.job_id, "pid": os.getpid()}
    with open(OUT / "journal.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
