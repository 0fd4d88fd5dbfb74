"""Power fails: of what was not synced to the disk, anything may be missing. What was confirmed is there."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from postroom import SubscriptionNotFound
from postroom.broker.base import Ack
from postroom.broker.sqlite import SQLiteBroker
from postroom.message import JobState
from tests.faults.power import QUEUE

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
SECTOR = 512
LINES = 800
"""What the process may say before the power fails."""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler: the power-loss tests need one")
        pytest.skip("no C compiler")
    made = tmp_path_factory.mktemp("power") / "power.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, FOLDER / "power.c", "-ldl"], check=True)
    return made


def cut_power(folder: Path, shim: Path, lines: int, weaker: str | None = None) -> dict[str, set[str]]:
    """Let the process say so many lines, then end it. Returns the ids by what was said of them last."""
    for name in ("disk", "durable"):
        (folder / name).mkdir(parents=True)
    environment = os.environ | {
        "LD_PRELOAD": str(shim),
        "POWER_WATCH": str(folder / "disk"),
        "POWER_DURABLE": str(folder / "durable"),
    }
    command = [sys.executable, "-m", "tests.faults.power", f"sqlite:///{folder}/disk/q.db"]
    said: dict[str, str] = {}
    with subprocess.Popen(
        command + ([weaker] if weaker else []), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _, line in zip(range(lines), process.stdout, strict=False):
            what, message_id = line.split()
            said[message_id] = what
        process.kill()
        rest = process.stdout.read()
    # What it said while it was being killed was confirmed, too.
    for line in rest.splitlines():
        if len(words := line.split()) == 2 and len(words[1]) == 36:
            said[words[1]] = words[0]
    kinds: dict[str, set[str]] = {}
    for message_id, what in said.items():
        kinds.setdefault(what, set()).add(message_id)
    return kinds


def after_power_cut(folder: Path, chance: random.Random | None) -> Path:
    """The files as found afterwards: what was synced, and by ``chance`` some sectors of what was not."""
    found = folder / "found"
    found.mkdir()
    for durable in (folder / "durable").glob("q.db*"):
        written, synced = (folder / "disk" / durable.name), durable.read_bytes()
        if chance is not None and written.exists():
            synced = _mixed(synced, written.read_bytes(), chance)
        (found / durable.name).write_bytes(synced)
    return found / "q.db"


def _mixed(synced: bytes, written: bytes, chance: random.Random) -> bytes:
    length = chance.randint(min(len(synced), len(written)), max(len(synced), len(written)))
    sectors = []
    for at in range(0, length, SECTOR):
        one, other = synced[at : at + SECTOR], written[at : at + SECTOR]
        chosen = chance.choice((one, other))
        sectors.append(chosen.ljust(min(SECTOR, length - at), b"\0"))
    return b"".join(sectors)[:length]


async def found_in(path: Path) -> dict[str, set[str]]:
    """What a broker finds in the file, by what it can do with it."""
    broker = SQLiteBroker(f"sqlite:///{path}")
    await broker.connect()
    records = await broker.jobs.search(limit=100_000)
    dead = {letter.message.id for letter in await broker.dead_letters(QUEUE, limit=100_000)}
    consumer = await broker.consume(QUEUE)
    delivered: set[str] = set()
    # What the machine held is free once its lease is over.
    while deliveries := await consumer.receive(1000, 1.5):
        delivered |= {delivery.message.id for delivery in deliveries}
        await consumer.settle([(delivery, Ack()) for delivery in deliveries])
    await broker.close()
    done = {record.id for record in records if record.state is JobState.SUCCEEDED}
    return {"delivered": delivered, "dead": dead, "done": done}


def losses(said: dict[str, set[str]], found: dict[str, set[str]]) -> list[str]:
    """What contradicts the confirmations."""
    there = found["delivered"] | found["dead"] | found["done"]
    confirmed = said.get("published", set()) | said.get("settling", set())
    wrong = [f"{message_id} was published and is gone" for message_id in confirmed - there]
    wrong += [f"{message_id} was done and is not" for message_id in said.get("done", set()) - found["done"]]
    wrong += [f"{message_id} was dead and is not" for message_id in said.get("dead", set()) - found["dead"]]
    wrong += [f"{message_id} came back" for message_id in said.get("done", set()) & found["delivered"]]
    phantoms = there - set().union(*said.values())
    return wrong + [f"{message_id} came from nowhere" for message_id in phantoms]


@pytest.mark.parametrize(("seed", "torn"), [(seed, seed % 3 != 0) for seed in range(12)])
def test_what_was_confirmed_survives(tmp_path: Path, shim: Path, seed: int, torn: bool) -> None:
    """Nothing unsynced is left, or any sectors of it are."""
    chance = random.Random(seed)
    said = cut_power(tmp_path, shim, chance.randint(20, LINES))
    assert said.get("published") or said.get("done")
    path = after_power_cut(tmp_path, chance if torn else None)
    assert losses(said, asyncio.run(found_in(path))) == []


@pytest.mark.parametrize("weaker", ["synchronous=NORMAL", "synchronous=OFF"])
def test_a_weaker_setting_is_found(tmp_path: Path, shim: Path, weaker: str) -> None:
    said = cut_power(tmp_path, shim, LINES, weaker)
    path = after_power_cut(tmp_path, None)
    try:
        found = asyncio.run(found_in(path))
    except SubscriptionNotFound:
        return  # Not even the tables were synced.
    assert losses(said, found)
