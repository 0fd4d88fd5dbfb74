"""The example app's own code, by plain calls: no worker, no gateway."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from postroom import AlreadyProcessed, Context, Message, Reject
from postroom.demo.place import example, photographs

MODULES = ("app", "database", "pictures")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example's module, fresh, on the in-memory broker."""
    monkeypatch.setenv("POSTROOM_BROKER", "memory://")
    monkeypatch.delenv("POSTROOM_STORE", raising=False)
    monkeypatch.setenv("PHOTOS_OUT", str(tmp_path))
    monkeypatch.syspath_prepend(str(example()))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("app")
    module.app.check()
    yield module
    module.app.close()
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def database(service: ModuleType) -> Iterator[Any]:
    with_resource = service.database()
    yield next(with_resource)
    assert next(with_resource, None) is None


def rows(database: Any, query: str) -> list[Any]:
    with database.transaction() as connection:
        return list(connection.execute(query).fetchall())


def context(message_id: str = "m1", subscription: str = "payments") -> Context:
    message = Message(id=message_id, topic=subscription, name="pay", body=b"{}")
    return Context(message, subscription=subscription, attempt=1, max_attempts=5)


def event(service: ModuleType) -> Any:
    photo = photographs(example() / "photos")[0]
    result = service.make_thumbnail(photo)
    return service.PhotoResized(photo.name, result["thumbnail"], result["width"], result["height"])


def test_a_thumbnail_is_no_larger_than_asked_and_keeps_its_proportions(service: ModuleType, tmp_path: Path) -> None:
    for photo in photographs(example() / "photos"):
        result = service.make_thumbnail(photo, width=100)
        with Image.open(tmp_path / "thumbnails" / result["thumbnail"]) as small, Image.open(photo) as large:
            assert small.size == (result["width"], result["height"])
            assert max(small.size) == 100
            assert small.width / small.height == pytest.approx(large.width / large.height, rel=0.03)
    # Nothing half-written is left beside the pictures.
    assert {path.suffix for path in (tmp_path / "thumbnails").iterdir()} == {".jpg"}


def test_half_a_photo_is_an_error_and_leaves_no_thumbnail(service: ModuleType, tmp_path: Path) -> None:
    whole = photographs(example() / "photos")[0].read_bytes()
    half = tmp_path / "half.jpg"
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated"):
        service.make_thumbnail(half)
    assert not list(tmp_path.glob("thumbnails/*"))


def test_a_job_that_runs_twice_announces_its_photo_once(service: ModuleType) -> None:
    photo = photographs(example() / "photos")[0]
    ctx = context("job-1", "thumbnails")
    assert service.make_thumbnail(photo, ctx=ctx) == service.make_thumbnail(photo, ctx=ctx)
    assert {item.name: item.ready for item in service.app.stats()}["gallery"] == 1


def test_gallery_and_index_may_hear_twice(service: ModuleType, database: Any) -> None:
    resized = event(service)
    for _ in range(2):
        service.add_to_gallery(resized, database)
        service.index(resized, database)
    assert rows(database, "SELECT thumbnail, width FROM gallery") == [(resized.thumbnail, resized.width)]
    words = [word for [word] in rows(database, "SELECT word FROM search")]
    assert len(words) == len(set(words))
    assert set(words) & {"wide", "tall"}


def test_a_letter_is_written_once(service: ModuleType, database: Any) -> None:
    resized = event(service)
    service.notify(resized, context("e1", "notify"), database)
    with pytest.raises(AlreadyProcessed):
        service.notify(resized, context("e1", "notify"), database)
    assert rows(database, "SELECT text FROM letters") == [(f"{resized.photo} is in the gallery",)]


def test_a_payment_is_applied_once_for_each_message(service: ModuleType, database: Any) -> None:
    assert service.pay("alice", 10, ctx=context("m1"), db=database) == {"left": 90}
    with pytest.raises(AlreadyProcessed):
        service.pay("alice", 10, ctx=context("m1"), db=database)
    assert rows(database, "SELECT amount FROM accounts") == [(90,)]
    assert service.pay("alice", 10, ctx=context("m2"), db=database) == {"left": 80}


def test_a_payment_from_no_account_is_rejected_and_leaves_no_mark(service: ModuleType, database: Any) -> None:
    with pytest.raises(Reject, match="no account 'bob'"):
        service.pay("bob", 10, ctx=context(), db=database)
    assert rows(database, "SELECT count(*) FROM postroom_inbox") == [(0,)]


@pytest.mark.parametrize(
    ("rgb", "word"), [((200, 40, 40), "red"), ((60, 110, 190), "blue"), ((255, 255, 255), "white")]
)
def test_colours_are_named(service: ModuleType, tmp_path: Path, rgb: tuple[int, int, int], word: str) -> None:
    path = tmp_path / "plain.png"
    Image.new("RGB", (40, 30), rgb).save(path)
    assert importlib.import_module("pictures").colours(path) == {word}


def test_the_journal_is_one_json_object_a_line(service: ModuleType, tmp_path: Path) -> None:
    service.note("start", context("m1"))
    service.note("end", context("m1"))
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [(line["what"], line["id"]) for line in lines] == [("start", "m1"), ("end", "m1")]
