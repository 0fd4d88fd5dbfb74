"""A group whose coordinator is away, asked by a process that must outlive that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from services.base import Server

from tests.servers import private

pytestmark = pytest.mark.server

ASKING = """
import asyncio, sys
from postroom.broker.kafka.groups import Groups
from postroom.broker.kafka.options import parse
from postroom.errors import BrokerUnavailable


async def answers(question, *asked):
    try:
        await question("group", *asked)
    except BrokerUnavailable:
        return False
    return True


async def main():
    groups = Groups(parse(sys.argv[1]))
    questions = [(groups.committed, [("topic", 0)]), (groups.delete,)]
    for line in sys.stdin:
        if line == "up\\n":
            async with asyncio.timeout(60):
                for question in questions:
                    while not await answers(*question):
                        await asyncio.sleep(0.1)
        else:
            for question in questions:
                assert not await answers(*question)
        print(line, end="", flush=True)


asyncio.run(main())
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with private("kafka", tmp_path) as made:
        yield made


@pytest.mark.timeout(240)
def test_whoever_asks_a_group_outlives_its_coordinator(server: Server) -> None:
    """The client would end the process once the server is back, if a question had run out of time within it."""
    with subprocess.Popen(
        [sys.executable, "-c", ASKING, f"{server.url}?timeout=1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as asking:  # fmt: skip
        assert asking.stdin
        assert asking.stdout

        def ask(state: str) -> None:
            print(state, file=asking.stdin, flush=True)
            assert asking.stdout.readline() == f"{state}\n"

        ask("up")
        for _ in range(2):
            server.kill()
            ask("down")
            server.start()
            ask("up")
        asking.stdin.close()
        assert asking.wait(30) == 0
