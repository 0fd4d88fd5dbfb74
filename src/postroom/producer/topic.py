"""Topics: events of one type, published to every subscription."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from postroom import codec
from postroom.config import Isolation, RetryPolicy, Seconds
from postroom.errors import PostroomError, PublishFailed
from postroom.message import Message, new_id
from postroom.producer.job import Job
from postroom.producer.options import PublishOptions
from postroom.producer.outlet import Outlet
from postroom.producer.task import warn_if_blocking

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class EventType:
    """What a topic carries."""

    topic: str
    type: Any


class Publishing(Generic[T]):
    """The ways to publish an event under given options."""

    def __init__(self, event: EventType, outlet: Outlet, options: PublishOptions) -> None:
        self._event = event
        self._outlet = outlet
        self._options = options
        self._decoder = codec.decoder(event.type)
        self._loose = codec.is_loose(event.type)

    def publish(self, event: T) -> Job[None]:
        """Publish an event to every subscription; stored when this returns.

        The returned job's state tells how far the subscriptions are. Raises as ``task.enqueue`` does.
        """
        if self._options.transaction is None:
            warn_if_blocking("publish")
        return self._jobs([self._message(event)], self._outlet.send)[0]

    async def apublish(self, event: T) -> Job[None]:
        """See :meth:`publish`. Concurrent calls share one commit."""
        messages = [self._message(event)]
        answers = await self._outlet.asend(messages, self._options.transaction)
        return self._jobs(messages, lambda *_: answers)[0]

    def publish_many(self, events: Iterable[T]) -> list[Job[None]]:
        """Publish events as one confirmed batch. Raises ``PublishFailed`` with the ids of those refused."""
        warn_if_blocking("publish_many")
        return self._jobs([self._message(event) for event in events], self._outlet.send)

    def check(self, body: bytes) -> None:
        """Raise ``ValidationError`` or ``DecodeError`` if ``body`` is no event of this topic's type."""
        codec.decode_body(body, self._decoder, self._event.topic)

    def _message(self, event: T) -> Message:
        name = self._event.topic
        if self._loose:
            codec.refuse_lossy(event, f"{name}: event")
        body = codec.encode_field(event, f"{name}: event")
        self.check(body)
        return Message(id=new_id(), topic=name, name=name, body=body, **self._outlet.fields(self._options, None))

    def _jobs(self, messages: Sequence[Message], send: Callable[..., Any]) -> list[Job[None]]:
        answers: list[str | PostroomError] = send(messages, self._options.transaction)
        failed = [answer for answer in answers if isinstance(answer, PostroomError)]
        if failed and len(messages) == 1:
            raise failed[0]
        if failed:
            refused = [item.id for item, answer in zip(messages, answers, strict=True) if not isinstance(answer, str)]
            raise PublishFailed(
                f"{len(failed)} of {len(messages)} events were refused: {failed[0]}", refused
            ) from failed[0]
        return [Job(str(answer), self._outlet.thread) for answer in answers]


class Topic(Publishing[T]):
    """A named stream of events of one type. Made by ``app.topic``."""

    def __init__(self, event: EventType, outlet: Outlet, subscribe: Callable[..., Callable[[Any], Any]]) -> None:
        super().__init__(event, outlet, PublishOptions())
        self._subscribe = subscribe

    @property
    def name(self) -> str:
        return self._event.topic

    @property
    def event(self) -> EventType:
        """What the gateway describes and the app declares."""
        return self._event

    def __repr__(self) -> str:
        return f"<Topic {self.name}>"

    def subscribe(
        self,
        name: str,
        *,
        where: dict[str, str] | None = None,
        start: Literal["latest", "earliest"] = "latest",
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        lease: float | None = None,
        ordered: bool = False,
        isolation: Isolation | None = None,
        transaction: Any = None,
    ) -> Callable[[F], F]:
        """Decorator: the function handles every event of this topic, under a durable subscription ``name``.

        See ``App.subscribe`` for the options.
        """
        decorator: Callable[[F], F] = self._subscribe(
            self.name,
            name,
            where=where,
            start=start,
            retry=retry,
            timeout=timeout,
            lease=lease,
            ordered=ordered,
            isolation=isolation,
            transaction=transaction,
        )
        return decorator

    def using(
        self,
        *,
        delay: Seconds | None = None,
        at: datetime | None = None,
        priority: int | None = None,
        key: str | None = None,
        idempotency_key: str | None = None,
        headers: dict[str, str] | None = None,
        expires_in: Seconds | None = None,
        transaction: Any = None,
    ) -> Publishing[T]:
        """The same topic under these options; see ``Task.using``."""
        options = PublishOptions(
            delay=delay,
            at=at,
            priority=priority,
            key=key,
            idempotency_key=idempotency_key,
            headers=headers,
            expires_in=expires_in,
            transaction=transaction,
        )
        return Publishing(self._event, self._outlet, options)
