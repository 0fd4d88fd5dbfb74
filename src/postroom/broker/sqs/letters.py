"""Dead letters: a queue nobody consumes. It is read as a whole, because the service cannot be asked for one letter."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any

import msgspec

from postroom.broker.sqs.kept import Kept
from postroom.broker.sqs.service import Answers, Missing, Service, not_found
from postroom.broker.sqs.wire import Copy, entry, letter, read
from postroom.clock import Clock
from postroom.errors import LeaseLost, PostroomError
from postroom.message import DeadLetter

logger = logging.getLogger("postroom.broker.sqs")

_HIDDEN = 60
"""Seconds for which a letter that is being read is invisible to other readers."""
_OLD = 604_800.0
"""Seconds, a week: half of what the service keeps a message."""
_FIRST_LOOK, _NEXT_LOOK = 600.0, 21_600.0
_PATIENCE = 15.0
"""Seconds for which a reader makes way for others until it has seen all."""


_Receipts = dict[str, str]
"""By the service's own id; more than one letter of one id if a crash left it twice."""


class _Found(msgspec.Struct):
    copy: Copy
    letter: DeadLetter
    sent_at: float
    """Unix time from which the service counts how long it keeps it."""
    receipts: _Receipts


async def browse(service: Service, kept: Kept, ids: Collection[str] | None) -> list[DeadLetter]:
    """Oldest death first; those of ``ids`` if given."""
    found = await _read(service, kept, ids)
    await _show(service, kept, [item.receipts for item in found.values()])
    chosen = [item.letter for item in found.values() if ids is None or item.letter.message.id in ids]
    return sorted(chosen, key=lambda item: (item.dead_at, item.message.id))


async def redrive(service: Service, kept: Kept, ids: Sequence[str]) -> list[str]:
    """Each is in its queue again before it leaves the dead letters."""
    wanted = dict.fromkeys(ids)
    found = await _read(service, kept, wanted)
    chosen = [found[name] for name in wanted if name in found]
    fifo = kept.declared.ordered
    entries = [entry(item.copy.redriven(), fifo=fifo, origin=min(item.receipts)) for item in chosen]
    sent = await service.send(kept.url, entries)
    moved = [item for item, answer in zip(chosen, sent, strict=True) if answer is None]
    await _show(service, kept, [item.receipts for item in found.values() if item not in moved])
    deleted = await _delete(service, kept, moved)
    _raise_if_nothing_is_known([*sent, *deleted], moved)
    return [item.letter.message.id for item in moved]


async def discard(service: Service, kept: Kept, ids: Sequence[str]) -> list[str]:
    wanted = dict.fromkeys(ids)
    found = await _read(service, kept, wanted)
    chosen = [found[name] for name in wanted if name in found]
    await _show(service, kept, [item.receipts for item in found.values() if item not in chosen])
    answers = await _delete(service, kept, chosen)
    gone = [item for item, answer in zip(chosen, answers, strict=True) if answer is None]
    _raise_if_nothing_is_known(answers, gone)
    return [item.letter.message.id for item in gone]


async def keep(service: Service, kept: Kept, clock: Clock) -> None:
    """As long as somebody consumes, no dead letter grows so old that the service drops it. Until cancelled."""
    pause = _FIRST_LOOK
    while True:
        await asyncio.sleep(pause)
        pause = _NEXT_LOOK
        try:
            await renew(service, kept, _OLD, clock.now())
        except PostroomError as error:
            logger.warning("%s: old dead letters could not be stored anew, trying again later: %s", kept.name, error)


async def renew(service: Service, kept: Kept, older_than: float, now: float) -> int:
    """Store anew what has been kept for so many seconds, before the service drops it. Returns how many.

    Page by page, as there may be more than a worker can hold. The oldest come first, about; what is not reached before
    the first are visible again waits for the next time, as what somebody else has in hand.
    """
    fifo, count = kept.declared.ordered, 0
    others: list[_Receipts] = []
    deadline = time.monotonic() + _HIDDEN
    async for messages in _visible(service, kept.dead_url):
        page = [_found(kept, raw) for raw in messages]
        old = [item for item in page if item.sent_at < now - older_than]
        entries = [
            entry(item.copy.changed(dead_at=item.letter.dead_at), fifo=fifo, origin=min(item.receipts), alone=True)
            for item in old
        ]
        sent = await service.send(kept.dead_url, entries)
        renewed = [item for item, answer in zip(old, sent, strict=True) if answer is None]
        await _delete(service, kept, renewed)
        count += len(renewed)
        others += [item.receipts for item in page if item not in renewed]
        if time.monotonic() > deadline:
            break
    await _show(service, kept, others)
    return count


async def purge(service: Service, kept: Kept) -> int:
    """Delete what is visible. ``PurgeQueue`` would take what runs as well."""
    count = 0
    async for messages in _visible(service, kept.url):
        answers = await service.delete(kept.url, [message["ReceiptHandle"] for message in messages])
        count += sum(answer is None for answer in answers)
    return count


async def _read(service: Service, kept: Kept, wanted: Collection[str] | None) -> dict[str, _Found]:
    """All letters by id, now invisible to others; no further than until all of ``wanted`` are found."""
    deadline = time.monotonic() + _PATIENCE
    found: dict[str, _Found] = {}
    while wanted is None or wanted:
        if await _seize(service, kept, wanted, found):
            deadline = time.monotonic() + _PATIENCE
        if wanted is not None and set(wanted) <= found.keys():
            return found
        mine = sum(len(item.receipts) for item in found.values())
        # Also the visible: they may have been put back since.
        elsewhere = await _count(service, kept.dead_url) - mine
        if elsewhere <= 0:
            return found
        if time.monotonic() > deadline:
            logger.warning("%s: about %d dead letters are in the hands of somebody else", kept.name, elsewhere)
            return found
        if mine <= elsewhere:
            # Who has the others may be waiting for ours, and has more of them.
            await _show(service, kept, [item.receipts for item in found.values()])
            found.clear()
            await asyncio.sleep(random.uniform(0.5, 2.0))
    return found


async def _seize(service: Service, kept: Kept, wanted: Collection[str] | None, found: dict[str, _Found]) -> bool:
    """Until nothing new comes. Those that were read a minute ago are visible again. Whether there was anything new."""
    any_new = False
    async for messages in _visible(service, kept.dead_url):
        is_new = False
        for raw in messages:
            came = _found(kept, raw)
            name = came.letter.message.id
            if name in found and found[name].copy.text != came.copy.text:
                # Another message with the id of this one, from another client. It is the next, once this one has gone.
                name = raw["MessageId"]
            item = found.setdefault(name, came)
            is_new = is_new or item is came or raw["MessageId"] not in item.receipts
            item.receipts |= came.receipts
        any_new = any_new or is_new
        if not is_new or (wanted is not None and set(wanted) <= found.keys()):
            break
    return any_new


def _found(kept: Kept, raw: Mapping[str, Any]) -> _Found:
    system = raw.get("Attributes", {})
    group = system.get("MessageGroupId") if kept.declared.ordered else None
    sent_at = int(system.get("SentTimestamp", 0)) / 1000
    copy = read(raw["Body"], raw.get("MessageAttributes", {}), raw["MessageId"], kept.name, group)
    told = letter(kept.name, copy, dead_at=sent_at)
    return _Found(copy, told, sent_at, {raw["MessageId"]: raw["ReceiptHandle"]})


async def _visible(service: Service, url: str) -> AsyncIterator[list[dict[str, Any]]]:
    """Receive until nothing is left."""
    while True:
        try:
            answer = await service.call(
                "sqs",
                "receive_message",
                QueueUrl=url,
                MaxNumberOfMessages=10,
                # Without waiting the service asks only some of its servers, and may miss one.
                WaitTimeSeconds=1,
                VisibilityTimeout=_HIDDEN,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["All"],
            )
        except Missing:
            raise not_found(url.rpartition("/")[2]) from None
        messages = answer.get("Messages", [])
        if not messages:
            return
        yield messages


async def _count(service: Service, url: str) -> int:
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    told = await service.call("sqs", "get_queue_attributes", QueueUrl=url, AttributeNames=names)
    return sum(int(told["Attributes"][name]) for name in names)


async def _show(service: Service, kept: Kept, letters: Sequence[_Receipts]) -> None:
    """Visible again at once. If that fails they are, after a minute."""
    await service.hide(kept.dead_url, [(receipt, 0) for receipts in letters for receipt in receipts.values()])


async def _delete(service: Service, kept: Kept, items: Sequence[_Found]) -> Answers:
    """One answer a letter."""
    answers: Answers = []
    receipts = [receipt for item in items for receipt in item.receipts.values()]
    told = iter(await service.delete(kept.dead_url, receipts))
    for item in items:
        own = [next(told) for _ in item.receipts]
        answers.append(next((answer for answer in own if answer is not None), None))
    return answers


def _raise_if_nothing_is_known(answers: Answers, done: Sequence[object]) -> None:
    errors = [answer for answer in answers if answer is not None and not isinstance(answer, LeaseLost)]
    if errors and not done:
        raise errors[0]
