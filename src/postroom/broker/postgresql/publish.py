"""Storing messages, and what the answers of the database mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from postroom.broker.postgresql import rows
from postroom.broker.postgresql.link import Link
from postroom.errors import EncodeError, IdempotencyConflict, PostroomError, QueueFull, TopicNotFound
from postroom.message import Message

_PUBLISH = "SELECT answers, woken FROM ~.publish($1, false, $2, $3)"

Answers = list[str | PostroomError]


class _Answer(msgspec.Struct):
    """What differs from being stored under its own id."""

    id: str | None = None
    refusal: str | None = None
    name: str = ""
    maximum: int = 0


_answers = msgspec.json.Decoder(dict[int, _Answer])


async def publish(
    link: Link, messages: Sequence[Message], moment: float | None, told: float
) -> tuple[Answers, list[int]]:
    """The answers, and the subscriptions in which something may be ready now. ``told``: the time here."""
    fit, answered = split(messages)
    if not fit:
        return answered([]), []
    ((differing, woken),) = await link.fetch(_PUBLISH, rows.batch(fit), moment, told)
    return answered(read(fit, differing)), woken or []


def split(messages: Sequence[Message]) -> tuple[Sequence[Message], Callable[[Answers], Answers]]:
    """Those the database can keep, and a function from their answers to those of all."""
    unfit = {place: error for place, message in enumerate(messages) if (error := _unstorable(message)) is not None}
    if not unfit:
        return messages, lambda answers: answers

    def answered(answers: Answers) -> Answers:
        rest = iter(answers)
        return [unfit.get(place) or next(rest) for place in range(len(messages))]

    return [message for place, message in enumerate(messages) if place not in unfit], answered


def read(messages: Sequence[Message], differing: str | None) -> Answers:
    """The answer for each."""
    if differing is None:
        return [message.id for message in messages]
    found = _answers.decode(differing)
    answers: Answers = [_answer(message, found.get(place)) for place, message in enumerate(messages, 1)]
    # Whoever has the key of a message that was refused, in the same batch, is refused as that is.
    refused: Mapping[Any, PostroomError] = {
        message.id: answer
        for message, answer in zip(messages, answers, strict=True)
        if isinstance(answer, PostroomError) and not isinstance(answer, IdempotencyConflict)
    }
    return [refused.get(answer, answer) for answer in answers]


def _unstorable(message: Message) -> EncodeError | None:
    """The database's texts hold every character but one."""
    texts = (message.id, message.topic, message.name, message.key or "", message.idempotency_key or "")
    if any("\0" in text for text in texts) or any("\0" in f"{k}{v}" for k, v in message.headers.items()):
        return EncodeError(
            f"message {message.id!r}: PostgreSQL cannot keep a zero character in names, keys and headers; the body may "
            "hold any bytes"
        )
    return None


def _answer(message: Message, answer: _Answer | None) -> str | PostroomError:
    if answer is None:
        return message.id
    if answer.refusal == "topic":
        return TopicNotFound(f"no topic or queue {message.topic!r} was ever declared on this broker")
    if answer.refusal == "full":
        return QueueFull(f"{answer.name} holds its maximum of {answer.maximum} messages; try again later")
    if answer.refusal == "conflict":
        return IdempotencyConflict(
            f"the idempotency key {message.idempotency_key!r} was used before for another {message.topic} message; "
            "use a new key for a new payload"
        )
    return answer.id or message.id
