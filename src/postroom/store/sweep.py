"""Files whose message is gone: left behind by a crash between the two, or by a job that ended before it ran."""

from __future__ import annotations

import asyncio
import logging

from postroom.broker.base import Broker
from postroom.errors import BrokerUnavailable
from postroom.message import JobState
from postroom.store.blobs import BlobStore

logger = logging.getLogger("postroom.worker")

AGE = 3600.0
"""Seconds a file must be old: a younger one may belong to a message that is just being published."""
INTERVAL = 3600.0


async def sweep(broker: Broker, blobs: BlobStore, age: float = AGE) -> int:
    """Remove the files of messages that are unknown or have ended; dead letters keep theirs. Returns how many."""
    count = 0
    for message_id in await asyncio.to_thread(blobs.older_than, age):
        records = await broker.jobs.get(message_id)
        if all(record.state.final and record.state is not JobState.DEAD for record in records):
            await asyncio.to_thread(blobs.remove, message_id)
            count += 1
    return count


async def keep_sweeping(broker: Broker, blobs: BlobStore) -> None:
    """Now and then, until cancelled."""
    while True:
        try:
            count = await sweep(broker, blobs)
            if count:
                logger.info("removed the uploaded files of %d messages that have ended", count)
        except (BrokerUnavailable, OSError) as error:
            logger.warning("cannot look after old uploads: %s", error)
        await asyncio.sleep(INTERVAL)
