"""Odd and large messages: whole, or refused."""

from __future__ import annotations

from typing import Any

from postroom.broker.base import Dead, Retry
from postroom.errors import MessageTooLarge
from postroom.message import Failure
from postroom.testing.scene import Scene
from postroom.testing.suite import proves, requires


async def _comes_back(scene: Scene, queue: str, **fields: Any) -> None:
    sent = scene.message(queue, **fields)
    await scene.publish(sent)
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    assert delivery.message == sent
    await scene.ack(consumer, delivery)
    await consumer.close()


@proves("I16", "I2")
async def test_an_empty_body(scene: Scene) -> None:
    """no bytes are not nothing, and come back as no bytes."""
    await _comes_back(scene, await scene.queue(), body=b"")


@proves("I16", "I2")
async def test_every_byte(scene: Scene) -> None:
    """a body is bytes: zeros, invalid UTF-8, all 256."""
    queue = await scene.queue()
    for body in (bytes(range(256)), b"\0", b"\xff\xfe", b"'; DROP TABLE message; --", b'{"a": 1}\n'):
        await _comes_back(scene, queue, body=body)


@proves("I16", "I2")
async def test_unicode_everywhere(scene: Scene) -> None:
    """names, headers and keys are any text."""
    text = "Grüße, 東京 🚀 \u202e \" ' \\ % _ \t\n"
    await _comes_back(scene, await scene.queue(), name=text, headers={text: text, "": ""}, key=text)


@proves("I16", "I2")
@requires("ordering")
async def test_an_empty_key_is_a_key(scene: Scene) -> None:
    """the empty text is a key like any other; no key is another thing."""
    queue = await scene.queue(ordered=True)
    await scene.publish(*scene.messages(queue, "a b", key=""))
    consumer = await scene.consume(queue)
    first = await scene.take_one(consumer)
    assert first.message.key == ""
    await scene.nothing(consumer)


@proves("I16", "I2")
async def test_large_headers(scene: Scene) -> None:
    """64 KB of headers."""
    await _comes_back(scene, await scene.queue(), headers={f"header-{n}": "x" * 1000 for n in range(64)})


@proves("I16", "I2")
async def test_a_large_body(scene: Scene) -> None:
    """256 KiB, the default limit above the broker, or as much as the broker declares."""
    declared = scene.harness.capabilities.max_message_size
    await _comes_back(scene, await scene.queue(), body=b"x" * min(262_144, declared or 262_144))


@proves("I16")
@requires("max_message_size")
async def test_the_declared_size_is_the_limit(scene: Scene) -> None:
    """exactly the declared size is taken; one byte more is refused, and its neighbours are not."""
    queue = await scene.queue()
    size = scene.harness.capabilities.max_message_size or 0
    await _comes_back(scene, queue, body=b"x" * size)
    large, small = scene.message(queue, body=b"x" * (size + 1)), scene.message(queue)
    answers = await scene.broker.publish([large, small])
    assert isinstance(answers[0], MessageTooLarge)
    assert answers[1] == small.id


@proves("I12", "I16")
async def test_a_large_history(scene: Scene) -> None:
    """long tracebacks of many attempts are kept."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    failures = [
        Failure(attempt=n, reason="error", error="E", message="Grüße 🚀", traceback="x" * 8000, failed_at=1.0)
        for n in range(1, 21)
    ]
    for told in failures[:-1]:
        await scene.do(consumer, Retry(delay=0.0, failure=told), await scene.take_one(consumer))
    await scene.do(consumer, Dead(failures[-1]), await scene.take_one(consumer))
    (letter,) = await scene.broker.dead_letters(queue)
    assert list(letter.failures) == failures
