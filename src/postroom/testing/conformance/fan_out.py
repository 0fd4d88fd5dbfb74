"""Topics and subscriptions: everyone their own copy, by topic, pattern and header."""

from __future__ import annotations

import pytest

from postroom.broker.base import Dead, Subscription, Topic
from postroom.errors import ConfigurationError, SubscriptionNotFound
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires


async def _received(scene: Scene, subscription: str, count: int) -> list[str]:
    """The labels of exactly ``count`` messages, sorted; fails if there are more."""
    consumer = await scene.consume(subscription)
    got = await scene.take(consumer, count)
    await scene.nothing(consumer)
    await scene.ack(consumer, *got)
    await consumer.close()
    return sorted(labels(got))


@proves("C9")
async def test_consumer_groups(scene: Scene) -> None:
    """two subscriptions each get all of fifty messages."""
    topic = await scene.topic()
    names = [await scene.subscribe(topic), await scene.subscribe(topic)]
    sent = scene.messages(topic, " ".join(f"m{n}" for n in range(50)))
    await scene.publish(*sent)
    for name in names:
        assert await _received(scene, name, 50) == sorted(labels(sent))


@proves("C9", "I23")
async def test_subscriptions_share_nothing(scene: Scene) -> None:
    """attempts, leases and dead letters of one subscription are invisible to the other."""
    topic = await scene.topic()
    failing, other = await scene.subscribe(topic), await scene.subscribe(topic)
    message = scene.message(topic)
    await scene.publish(message)
    consumer = await scene.consume(failing)
    await scene.fail(consumer, await scene.take_one(consumer))
    await scene.do(consumer, Dead(failure(2)), await scene.take_one(consumer))
    assert await scene.counts(failing) == {"dead": 1}
    assert await scene.counts(other) == {"ready": 1}
    assert await scene.broker.dead_letters(other) == []
    mine = await scene.consume(other)
    delivery = await scene.take_one(mine)
    assert delivery.attempt == 1
    await scene.ack(mine, delivery)
    await scene.broker.redrive(failing, [message.id])
    assert await scene.counts(failing) == {"ready": 1}
    await scene.nothing(mine)


@proves("C9", "I23")
async def test_a_stopped_subscription_holds_up_nobody(scene: Scene) -> None:
    """messages pile up for the one that does not consume; the other has all of its own."""
    topic = await scene.topic()
    stopped, running = await scene.subscribe(topic), await scene.subscribe(topic)
    consumer = await scene.consume(running)
    for number in range(20):
        await scene.publish(scene.message(topic, f"m{number}"))
        await scene.ack(consumer, await scene.take_one(consumer))
    assert await scene.counts(stopped) == {"ready": 20}
    assert await scene.counts(running) == {}


@proves("C9")
async def test_topic(scene: Scene) -> None:
    """a message reaches its own topic only, whatever the other is called."""
    first = await scene.topic()
    second = await scene.topic(f"{first}.more")
    names = [await scene.subscribe(first), await scene.subscribe(second)]
    await scene.publish(scene.message(first, "first"), scene.message(second, "second"))
    assert await _received(scene, names[0], 1) == ["first"]
    assert await _received(scene, names[1], 1) == ["second"]


@proves("C9")
async def test_latest_gets_only_what_comes(scene: Scene) -> None:
    """a subscription has what is published after its declaration."""
    topic = await scene.topic()
    await scene.publish(scene.message(topic, "before"))
    name = await scene.subscribe(topic)
    await scene.publish(scene.message(topic, "after"))
    assert await _received(scene, name, 1) == ["after"]


@proves("C2")
async def test_declaring_again_changes_nothing(scene: Scene) -> None:
    """repeated declarations, also by another broker, lose nothing and duplicate nothing."""
    topic = await scene.topic()
    name = await scene.subscribe(topic)
    await scene.publish(scene.message(topic, "kept"))
    for broker in (scene.broker, await scene.another_broker()):
        await broker.declare([Topic(name=topic)], [Subscription(name=name, pattern=topic)])
    await scene.publish(scene.message(topic, "later"))
    assert await _received(scene, name, 2) == ["kept", "later"]


@proves("C9")
async def test_what_is_not_named_is_left_alone(scene: Scene) -> None:
    """a declaration of one thing does not remove another."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    await scene.queue()
    await scene.broker.declare([], [])
    assert await _received(scene, queue, 1) == ["m"]


@proves("C9")
async def test_a_queue_has_one_subscription(scene: Scene) -> None:
    """a second subscription of a queue is refused, and the refused declaration changes nothing."""
    queue = await scene.queue()
    name, other = scene.name("subscription"), scene.name("topic")
    with pytest.raises(ConfigurationError):
        await scene.broker.declare([Topic(name=other)], [Subscription(name=name, pattern=queue)])
    with pytest.raises(SubscriptionNotFound):
        await scene.broker.consume(name)
    await scene.publish(scene.message(queue))
    assert await _received(scene, queue, 1) == ["m"]


@proves("C9")
async def test_a_subscribed_topic_cannot_become_a_queue(scene: Scene) -> None:
    """a queue that would start with a foreign subscription is refused."""
    topic = await scene.topic()
    await scene.subscribe(topic)
    with pytest.raises(ConfigurationError):
        await scene.broker.declare([Topic(name=topic, queue=True)], [Subscription(name=topic, pattern=topic)])


@proves("C9")
@requires("patterns")
async def test_patterns(scene: Scene) -> None:
    """* stands for one word, # for any number, also none."""
    root = scene.name("order")
    topics = [root, f"{root}.paid", f"{root}.paid.eu", f"{root}.shipped", f"{root}s.paid"]
    for topic in topics:
        await scene.topic(topic)
    wanted = {
        f"{root}.*": [f"{root}.paid", f"{root}.shipped"],
        f"{root}.#": topics[:4],
        f"{root}.*.eu": [f"{root}.paid.eu"],
        f"{root}.#.eu": [f"{root}.paid.eu"],
        f"{root}.#.paid.#": [f"{root}.paid", f"{root}.paid.eu"],
        f"{root}.paid": [f"{root}.paid"],
    }
    names = {pattern: await scene.subscribe(pattern) for pattern in wanted}
    await scene.publish(*(scene.message(topic, topic) for topic in topics))
    for pattern, expected in wanted.items():
        assert await _received(scene, names[pattern], len(expected)) == sorted(expected), pattern


@proves("C9")
@requires("patterns")
async def test_patterns_match_later_topics(scene: Scene) -> None:
    """a topic declared after the subscription is matched, too."""
    root = scene.name("order")
    name = await scene.subscribe(f"{root}.*")
    topic = await scene.topic(f"{root}.new")
    await scene.publish(scene.message(topic))
    assert await _received(scene, name, 1) == ["m"]


@proves("C9")
@requires("patterns")
async def test_patterns_do_not_match_queues(scene: Scene) -> None:
    """what is sent to a queue is for its workers alone."""
    root = scene.name("jobs")
    queue = f"{root}.mail"
    await scene.broker.declare([Topic(name=queue, queue=True)], [Subscription(name=queue, pattern=queue)])
    names = [await scene.subscribe(f"{root}.*"), await scene.subscribe(f"{root}.#")]
    await scene.publish(scene.message(queue))
    for name in names:
        assert await scene.counts(name) == {}
    assert await _received(scene, queue, 1) == ["m"]


@proves("C9")
@requires("patterns")
async def test_a_message_comes_once_to_a_subscription(scene: Scene) -> None:
    """a pattern that fits in two ways still makes one copy."""
    root = scene.name("a")
    topic = await scene.topic(f"{root}.a.a")
    name = await scene.subscribe(f"{root}.#.#")
    await scene.publish(scene.message(topic))
    assert await _received(scene, name, 1) == ["m"]


@proves("C9")
@requires("filters")
async def test_filters(scene: Scene) -> None:
    """only messages whose headers have all the wanted values."""
    topic = await scene.topic()
    eu = await scene.subscribe(topic, where={"region": "eu"})
    large = await scene.subscribe(topic, where={"region": "eu", "size": "large"})
    everything = await scene.subscribe(topic)
    await scene.publish(
        scene.message(topic, "eu-small", headers={"region": "eu", "size": "small"}),
        scene.message(topic, "eu-large", headers={"region": "eu", "size": "large", "more": "x"}),
        scene.message(topic, "us-large", headers={"region": "us", "size": "large"}),
        scene.message(topic, "none"),
        scene.message(topic, "case", headers={"region": "EU"}),
    )
    assert await _received(scene, eu, 2) == ["eu-large", "eu-small"]
    assert await _received(scene, large, 1) == ["eu-large"]
    assert len(await _received(scene, everything, 5)) == 5


@proves("C9")
@requires("filters")
async def test_a_changed_filter_applies_to_later_messages(scene: Scene) -> None:
    """what was copied before the change stays."""
    topic = await scene.topic()
    name = await scene.subscribe(topic, where={"region": "eu"})
    await scene.publish(scene.message(topic, "eu-1", headers={"region": "eu"}))
    await scene.broker.declare([], [Subscription(name=name, pattern=topic, where={"region": "us"})])
    await scene.publish(scene.message(topic, "eu-2", headers={"region": "eu"}))
    await scene.publish(scene.message(topic, "us-1", headers={"region": "us"}))
    assert await _received(scene, name, 2) == ["eu-1", "us-1"]


@proves("C9")
async def test_unsubscribe(scene: Scene) -> None:
    """a deleted subscription is gone with all it held; declared again it is empty; the others keep theirs."""
    topic = await scene.topic()
    gone, kept = await scene.subscribe(topic), await scene.subscribe(topic)
    await scene.bury(gone, scene.message(topic, "dead"))
    await scene.publish(scene.message(topic, "waiting"))
    await scene.broker.unsubscribe(gone)
    with pytest.raises(SubscriptionNotFound):
        await scene.broker.consume(gone)
    assert gone not in [stats.name for stats in await scene.broker.stats()]
    await scene.broker.declare([], [Subscription(name=gone, pattern=topic)])
    assert await scene.counts(gone) == {}
    assert await scene.broker.dead_letters(gone) == []
    assert await _received(scene, kept, 2) == ["dead", "waiting"]


@proves("C15", "C9")
@requires("limits")
async def test_a_full_subscription_refuses_for_all(scene: Scene) -> None:
    """a message that one subscription cannot take is stored in none, so that publishing it again makes no duplicate."""
    topic = await scene.topic()
    full, roomy = await scene.subscribe(topic, limit=1), await scene.subscribe(topic)
    await scene.publish(scene.message(topic, "a"))
    refused = scene.message(topic, "b")
    await scene.refused(refused)
    assert await scene.counts(roomy) == {"ready": 1}
    assert await _received(scene, full, 1) == ["a"]
    await scene.publish(refused)
    assert await _received(scene, roomy, 2) == ["a", "b"]
    assert await _received(scene, full, 1) == ["b"]
