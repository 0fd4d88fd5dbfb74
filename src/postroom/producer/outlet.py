"""Where the messages of all tasks and topics of an app go out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from postroom import codec
from postroom.broker.base import Broker, Capabilities
from postroom.broker.demands import unmet
from postroom.broker.thread import BrokerThread
from postroom.config import HandlerOptions
from postroom.errors import BrokerUnavailable, UnsupportedOperation
from postroom.handler import TaskHandler
from postroom.message import Message
from postroom.producer.options import PublishOptions
from postroom.producer.publisher import Answers, Publisher
from postroom.store import outbox
from postroom.store.blobs import SCHEME, BlobStore


class Outlet:
    """The publisher, and the files that go beside its messages."""

    def __init__(
        self, thread: BrokerThread, publisher: Publisher, blobs: BlobStore, make_broker: Callable[[], Broker]
    ) -> None:
        """``make_broker()``: one like that of the thread, to be asked what it can do without connecting."""
        self.thread = thread
        self.blobs = blobs
        self._publisher = publisher
        self._make_broker = make_broker
        self._asked: Capabilities | None = None
        """What the broker can do at its server, once that has been asked: a newer one may do more."""

    @cached_property
    def _model(self) -> Broker:
        return self._make_broker()

    def send(self, messages: Sequence[Message], transaction: Any = None) -> Answers:
        """Publish and wait; inside the caller's ``transaction`` if there is one."""
        if transaction is None:
            return self._publisher.publish(messages)
        if self._model.joins(transaction):
            return self._publisher.publish_in(transaction, messages)
        self._check(messages)
        outbox.write(transaction, messages)
        return [message.id for message in messages]

    async def asend(self, messages: Sequence[Message], transaction: Any = None) -> Answers:
        """See :meth:`send`."""
        if transaction is None:
            return await self._publisher.apublish(messages)
        if self._model.joins(transaction):
            return await self._publisher.apublish_in(transaction, messages)
        await self._acheck(messages)
        await outbox.awrite(transaction, messages)
        return [message.id for message in messages]

    def submit(self, messages: Sequence[Message], transaction: Any = None) -> Future[Answers]:
        """Publish without waiting."""
        if transaction is None:
            return self._publisher.submit(messages)
        done: Future[Answers] = Future()
        done.set_result(self.send(messages, transaction))
        return done

    def _check(self, messages: Sequence[Message]) -> None:
        """Refuse now what the broker would refuse later, when nobody could be told."""
        refusal = self._refusal(messages)
        if refusal is not None:
            try:
                self._asked = self.thread.call(_capabilities)
            except BrokerUnavailable as error:
                raise _unknown(refusal, error) from error
            self._check_again(messages)

    async def _acheck(self, messages: Sequence[Message]) -> None:
        """See :meth:`_check`."""
        refusal = self._refusal(messages)
        if refusal is not None:
            try:
                self._asked = await self.thread.acall(_capabilities)
            except BrokerUnavailable as error:
                raise _unknown(refusal, error) from error
            self._check_again(messages)

    def _check_again(self, messages: Sequence[Message]) -> None:
        refusal = self._refusal(messages)
        if refusal is not None:
            raise refusal

    def _refusal(self, messages: Sequence[Message]) -> UnsupportedOperation | None:
        self._publisher.check(messages)
        now, capabilities = time.time(), self._asked or self._model.capabilities
        return next((refusal for message in messages if (refusal := unmet(capabilities, message, now))), None)

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


async def _capabilities(broker: Broker) -> Capabilities:
    return broker.capabilities


def _unknown(refusal: UnsupportedOperation, error: BrokerUnavailable) -> UnsupportedOperation:
    text = f"{refusal}; whether its server can do more is not known before it can be reached: {error}"
    return UnsupportedOperation(text, refusal.capability)
