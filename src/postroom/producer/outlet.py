"""Where the messages of all tasks and topics of an app go out."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from postroom import codec
from postroom.broker.thread import BrokerThread
from postroom.config import HandlerOptions
from postroom.handler import TaskHandler
from postroom.message import Message
from postroom.producer.options import PublishOptions
from postroom.producer.publisher import Answers, Publisher
from postroom.store.blobs import SCHEME, BlobStore


class Outlet:
    """The publisher, and the files that go beside its messages."""

    def __init__(self, thread: BrokerThread, publisher: Publisher, blobs: BlobStore) -> None:
        self.thread = thread
        self.blobs = blobs
        self._publisher = publisher

    def send(self, messages: Sequence[Message], transaction: Any = None) -> Answers:
        """Publish and wait; inside the caller's ``transaction`` if there is one."""
        if transaction is not None:
            return self._publisher.publish_in(transaction, messages)
        return self._publisher.publish(messages)

    async def asend(self, messages: Sequence[Message], transaction: Any = None) -> Answers:
        """See :meth:`send`."""
        if transaction is not None:
            return self._publisher.publish_in(transaction, messages)
        return await self._publisher.apublish(messages)

    def submit(self, messages: Sequence[Message], transaction: Any = None) -> Future[Answers]:
        """Publish without waiting."""
        if transaction is None:
            return self._publisher.submit(messages)
        done: Future[Answers] = Future()
        done.set_result(self._publisher.publish_in(transaction, messages))
        return done

    def fields(self, options: PublishOptions, defaults: HandlerOptions | None) -> dict[str, Any]:
        """The message fields that follow from the options of the call and the defaults of its task."""
        fields = options.fields()
        if defaults is not None:
            fields["result_ttl"] = defaults.result_ttl
            fields.setdefault("priority", defaults.priority)
        return fields

    def keep_uploads(self, handler: TaskHandler, message_id: str, body: bytes) -> bytes:
        """Copy the files a call names into the blob store; the body then refers to the copies."""
        arguments = msgspec.json.decode(body)
        for name in handler.uploads & arguments.keys():
            if arguments[name] is not None:
                arguments[name] = self.blobs.copy(message_id, name, Path(arguments[name]))
        return codec.encode(arguments)

    def drop_uploads(self, messages: Sequence[Message]) -> None:
        """Remove the files of messages that were not stored."""
        for message in messages:
            if SCHEME.encode() in message.body:
                self.blobs.remove(message.id)
