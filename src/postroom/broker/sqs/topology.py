"""Which queues and topics there are. The services themselves remember it: the tags of each queue tell what it is for.

A subscription is a queue, beside it one for its dead letters. A topic is an SNS topic, and each subscription that
matches it hangs on it with its filter. So no publisher has to know who subscribes, but for one kind: the queue of an
ordered subscription cannot hang on an SNS topic that is open to all, and publishers send to it themselves.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from postroom.broker.base import Subscription, Topic
from postroom.broker.routing import matches
from postroom.broker.sqs.address import DEAD, FIFO
from postroom.broker.sqs.kept import Kept, check, kept_from, tags_of
from postroom.broker.sqs.service import Missing, Service, not_found
from postroom.broker.sqs.wire import MOST_BYTES, filter_policy
from postroom.errors import BrokerError, TopicNotFound

RETENTION = 1_209_600
"""Seconds a queue keeps a message at most: 14 days (SetQueueAttributes, ``MessageRetentionPeriod``)."""
MOST_RECEIVES = 1000
"""After so many the service itself moves a message to the dead letters: the most it allows, and only a backstop."""
ROUTES_HOLD = 5.0
"""Seconds for which a publisher goes on with the ordered subscriptions it knows."""
_TAGS_HOLD = 60.0
"""Seconds until it is asked again what a queue is for, but to declare: of tags the service tells only 30 times a
second, to all who use an account (SQS Developer Guide, "Standard queue quotas")."""
_AT_ONCE = 16
_AFTER_DELETION = 65.0  # A deleted queue's name is free again after 60 s (DeleteQueue).
_AFTER_CREATION = 1.0  # A new queue can be used after 1 s (CreateQueue).

T = TypeVar("T")
R = TypeVar("R")


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where a topic's messages go: to an SNS topic and the queues beside it, or to one queue."""

    arn: str | None
    limit: int = MOST_BYTES
    """Bytes that the SNS topic takes."""
    queues: tuple[Kept, ...]
    until: float
    """Monotonic time after which it must be asked for again."""


class Topology:
    """What the services know of our queues and topics, and how it is changed."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._address = service.address
        self._routes: dict[str, Route] = {}
        self._asking: dict[str, asyncio.Task[Route]] = {}
        self._tagged: dict[str, tuple[Kept, float]] = {}
        self._arn_prefix: str | None = None

    # Seen

    async def route(self, topic: str) -> Route:
        """Raises ``TopicNotFound``."""
        known = self._routes.get(topic)
        if known is not None and known.until >= time.monotonic():
            return known
        # All who publish find it over at the same moment: one asks for them all, whoever of them gives up meanwhile.
        asking = self._asking.get(topic)
        if asking is None:
            asking = asyncio.get_running_loop().create_task(self._find_route(topic, time.monotonic()))
            self._asking[topic] = asking
            asking.add_done_callback(lambda done: self._found(topic, done))
        return await asyncio.shield(asking)

    def _found(self, topic: str, asking: asyncio.Task[Route]) -> None:
        if self._asking.get(topic) is asking:
            del self._asking[topic]
            if not asking.cancelled() and asking.exception() is None:
                self._routes[topic] = asking.result()

    def forget(self, topic: str) -> None:
        """Its queue or SNS topic is not where it was."""
        self._routes.pop(topic, None)

    def _forget_all(self) -> None:
        """What is being asked at this moment may be of before: it is told, but not kept."""
        self._routes.clear()
        self._asking.clear()
        self._tagged = {}

    async def find(self, subscription: str) -> Kept:
        """Raises ``SubscriptionNotFound``."""
        found = await self._find(subscription)
        if found is None:
            raise not_found(subscription)
        return found

    async def all(self) -> dict[str, Kept]:
        """Every subscription by name."""
        return {kept.name: kept for kept in await self._kept(await self._queue_urls())}

    async def all_recent(self) -> dict[str, Kept]:
        """The same, but of those that are not new as it was within a minute."""
        return {kept.name: kept for kept in await self._recent(await self._queue_urls())}

    async def topics(self) -> list[str]:
        """Every topic that is no queue."""
        arns = await self._service.pages("sns", "list_topics", "Topics")
        places = [arn for arn in (topic["TopicArn"] for topic in arns) if _place(arn).startswith(self._address.prefix)]
        return [name for name in await each(places, self._topic_name) if name is not None]

    async def hanging(self, topic: str) -> dict[str, str]:
        """The SNS subscriptions of a topic: queue's ARN → subscription's ARN."""
        arn = await self.topic_arn(topic)
        found = await self._service.pages("sns", "list_subscriptions_by_topic", "Subscriptions", TopicArn=arn)
        return {item["Endpoint"]: item["SubscriptionArn"] for item in found if item["Protocol"] == "sqs"}

    async def queue_arn(self, url: str) -> str:
        return str((await self.attributes(url, "QueueArn"))["QueueArn"])

    async def attributes(self, url: str, *names: str) -> dict[str, str]:
        answer = await self._service.call("sqs", "get_queue_attributes", QueueUrl=url, AttributeNames=[*names])
        return {name: str(value) for name, value in answer.get("Attributes", {}).items()}

    async def topic_arn(self, topic: str) -> str:
        if self._arn_prefix is None:
            me = await self._service.call("sts", "get_caller_identity")
            region = self._address.region or (await self._service.region())
            self._arn_prefix = f"arn:{me['Arn'].split(':')[1]}:sns:{region}:{me['Account']}:"
        return self._arn_prefix + self._address.place(topic)

    # Declared

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        """Raises ``ConfigurationError``."""
        known = await self.all()
        queues = {topic.name for topic in topics if topic.queue}
        queues |= {kept.name for kept in known.values() if kept.queue}
        check(known, topics, subscriptions)
        self._forget_all()
        made = await each(subscriptions, lambda wanted: self._keep(wanted, wanted.name in queues, known))
        plain = [topic.name for topic in topics if not topic.queue]
        await each(plain, self._make_topic)
        events = [kept for kept in made if not kept.queue]
        if plain or events:
            await self._hang(plain, events, known)
        await each([kept for kept in made if kept.name in known], self._tag_again)
        self._forget_all()
        if any(kept.declared.ordered and kept.name not in known for kept in events):
            # Until then publishers elsewhere may not know that they have to send to it.
            await asyncio.sleep(ROUTES_HOLD)

    async def unsubscribe(self, kept: Kept) -> None:
        self._forget_all()
        if not kept.queue and not kept.declared.ordered:
            arn = await self.queue_arn(kept.url)
            for topic in await self.topics():
                if matches(kept.declared.pattern, topic) and (hanging := (await self.hanging(topic)).get(arn)):
                    await self._unhang(hanging)
        # The queue itself last: as long as it is there the rest can be found again.
        for url in (kept.dead_url, kept.url):
            try:
                await self._service.call("sqs", "delete_queue", QueueUrl=url)
            except Missing:
                continue  # Somebody was quicker.

    async def _keep(self, wanted: Subscription, is_queue: bool, known: Mapping[str, Kept]) -> Kept:
        """The queue of ``wanted``, made unless it is there."""
        dead = self._address.place(wanted.name, ordered=wanted.ordered, dead=True)
        own = {"FifoQueue": "true"} if wanted.ordered else {}
        own |= {"MessageRetentionPeriod": str(RETENTION), "MaximumMessageSize": str(MOST_BYTES)}
        if wanted.name in known:
            if await self._queue_url(dead) is None:
                # Whoever removed the subscription died half-way: without it nothing could become a dead letter.
                await self._create(dead, own, {"postroom-dead-letters-of": wanted.name})
            return msgspec.structs.replace(known[wanted.name], declared=wanted, queue=is_queue)
        tags = tags_of(wanted, is_queue)
        dead_url = await self._create(dead, own, {"postroom-dead-letters-of": wanted.name})
        dead_arn = await self.queue_arn(dead_url)
        own["RedrivePolicy"] = json.dumps({"deadLetterTargetArn": dead_arn, "maxReceiveCount": MOST_RECEIVES})
        if wanted.ordered:
            own |= {"DeduplicationScope": "messageGroup", "FifoThroughputLimit": "perMessageGroupId"}
        elif not is_queue:
            own["Policy"] = await self._policy(dead_arn.removesuffix(DEAD))
        url = await self._create(self._address.place(wanted.name, ordered=wanted.ordered), own, tags)
        return Kept(declared=wanted, queue=is_queue, url=url, dead_url=dead_url)

    async def _create(self, place: str, attributes: dict[str, str], tags: dict[str, str]) -> str:
        deadline = time.monotonic() + _AFTER_DELETION
        while True:
            try:
                answer = await self._service.call(
                    "sqs", "create_queue", QueueName=place, Attributes=attributes, tags=tags
                )
                # Emulators need no time for it.
                await asyncio.sleep(_AFTER_CREATION if self._address.endpoint_url is None else 0.0)
                return str(answer["QueueUrl"])
            except BrokerError as error:
                if "QueueDeletedRecently" not in str(error) or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(5.0)

    async def _policy(self, queue_arn: str) -> str:
        """Our topics may send to the queue, and no other."""
        statement = {
            "Sid": "postroom",
            "Effect": "Allow",
            "Principal": {"Service": "sns.amazonaws.com"},
            "Action": "sqs:SendMessage",
            "Resource": queue_arn,
            "Condition": {"ArnLike": {"aws:SourceArn": (await self.topic_arn("x")).removesuffix("x") + "*"}},
        }
        return json.dumps({"Version": "2012-10-17", "Statement": [statement]})

    async def _make_topic(self, name: str) -> None:
        tags = [{"Key": "postroom-name", "Value": name}]
        place = self._address.place(name)
        arn = await self.topic_arn(name)
        try:
            await self._service.call("sns", "get_topic_attributes", TopicArn=arn)
        except Missing:
            await self._service.call(
                "sns", "create_topic", Name=place, Attributes={"MaximumMessageSize": str(MOST_BYTES)}, Tags=tags
            )

    async def _hang(self, topics: Sequence[str], events: Sequence[Kept], known: Mapping[str, Kept]) -> None:
        """Hang every subscription on each topic it matches, with its filter, and on no other."""
        # Asked only now: whoever declares the other half at the same time sees ours, or we see theirs.
        current = await self.all() | {kept.name: kept for kept in events}
        changed = {kept.name for kept in events}
        patterns = {kept.declared.pattern for kept in events}
        patterns |= {known[name].declared.pattern for name in changed if name in known}
        affected = set(topics)
        if patterns:
            affected |= {name for name in await self.topics() if any(matches(pattern, name) for pattern in patterns)}
        candidates = [
            kept
            for kept in current.values()
            if not kept.queue and not kept.declared.ordered and (topics or kept.name in changed)
        ]
        arns = dict(zip([kept.name for kept in candidates], await each(candidates, self._arn_of), strict=True))

        async def hang(topic: str) -> None:
            hanging = await self.hanging(topic)
            for kept in candidates:
                arn, fits = arns[kept.name], matches(kept.declared.pattern, topic)
                if fits and arn not in hanging:
                    await self._subscribe(topic, arn, kept.declared)
                elif fits and kept.name in changed:
                    await self._filter(hanging[arn], kept.declared)
                elif not fits and arn in hanging:
                    await self._unhang(hanging[arn])

        await each(sorted(affected), hang)

    async def _arn_of(self, kept: Kept) -> str:
        return await self.queue_arn(kept.url)

    async def _subscribe(self, topic: str, queue_arn: str, wanted: Subscription) -> None:
        attributes = {"RawMessageDelivery": "true"}
        policy = filter_policy(wanted.where)
        if policy is not None:
            attributes["FilterPolicy"] = json.dumps(policy)
        arn = await self.topic_arn(topic)
        await self._service.call(
            "sns", "subscribe", TopicArn=arn, Protocol="sqs", Endpoint=queue_arn, Attributes=attributes
        )

    async def _unhang(self, subscription_arn: str) -> None:
        try:
            await self._service.call("sns", "unsubscribe", SubscriptionArn=subscription_arn)
        except Missing:
            return  # Somebody was quicker.

    async def _filter(self, subscription_arn: str, wanted: Subscription) -> None:
        known = await self._service.call("sns", "get_subscription_attributes", SubscriptionArn=subscription_arn)
        policy = filter_policy(wanted.where)
        if (json.loads(known["Attributes"].get("FilterPolicy") or "null") or None) != policy:
            await self._service.call(
                "sns",
                "set_subscription_attributes",
                SubscriptionArn=subscription_arn,
                AttributeName="FilterPolicy",
                AttributeValue="{}" if policy is None else json.dumps(policy),
            )

    async def _tag_again(self, kept: Kept) -> None:
        tags = tags_of(kept.declared, kept.queue)
        if (await self._tags_of(kept.url)) != tags:
            await self._service.call("sqs", "tag_queue", QueueUrl=kept.url, Tags=tags)

    # Found

    async def _find_route(self, topic: str, asked: float) -> Route:
        found = await self._find(topic)
        if found is not None and found.queue:
            return Route(arn=None, queues=(found,), until=float("inf"))
        arn = await self.topic_arn(topic)
        try:
            answer = await self._service.call("sns", "get_topic_attributes", TopicArn=arn)
        except Missing:
            raise TopicNotFound(f"no queue or topic {topic!r} here; declare it first") from None
        ordered = [url for url in await self._queue_urls() if url.endswith(FIFO)]
        queues = [
            kept for kept in await self._recent(ordered) if not kept.queue and matches(kept.declared.pattern, topic)
        ]
        limit = int(answer["Attributes"].get("MaximumMessageSize", 262_144))
        return Route(arn=arn, limit=limit, queues=tuple(queues), until=asked + ROUTES_HOLD)

    async def _find(self, subscription: str) -> Kept | None:
        places = [self._address.place(subscription, ordered=ordered) for ordered in (False, True)]
        urls = [url for url in await each(places, self._queue_url) if url is not None]
        return next((kept for kept in await self._kept(urls) if kept.name == subscription), None)

    async def _queue_url(self, place: str) -> str | None:
        try:
            return str((await self._service.call("sqs", "get_queue_url", QueueName=place))["QueueUrl"])
        except Missing:
            return None

    async def _queue_urls(self) -> list[str]:
        """Of all subscriptions."""
        found = await self._service.pages(
            "sqs", "list_queues", "QueueUrls", QueueNamePrefix=self._address.prefix, MaxResults=1000
        )
        return [url for url in found if not url.removesuffix(FIFO).endswith(DEAD)]

    async def _kept(self, urls: Iterable[str]) -> list[Kept]:
        found = await each(list(urls), self._read)
        return [kept for kept in found if kept is not None]

    async def _recent(self, urls: Sequence[str]) -> list[Kept]:
        now, tagged = time.monotonic(), self._tagged
        known = {url: tagged[url][0] for url in urls if url in tagged and tagged[url][1] > now}
        for kept in await self._kept(url for url in urls if url not in known):
            known[kept.url] = kept
            tagged[kept.url] = (kept, now + _TAGS_HOLD)
        return list(known.values())

    async def _read(self, url: str) -> Kept | None:
        """``None`` if the queue is not one of ours, or not any more."""
        try:
            tags = await self._tags_of(url)
        except Missing:
            return None
        return kept_from(url, tags)

    async def _tags_of(self, url: str) -> dict[str, str]:
        tags = (await self._service.call("sqs", "list_queue_tags", QueueUrl=url)).get("Tags", {})
        return {name: value for name, value in tags.items() if name.startswith("postroom-")}

    async def _topic_name(self, arn: str) -> str | None:
        name = self._address.name_at(_place(arn))
        if name is not None:
            return name
        try:
            tags = await self._service.call("sns", "list_tags_for_resource", ResourceArn=arn)
        except Missing:
            return None  # Somebody has just deleted it.
        return next((tag["Value"] for tag in tags.get("Tags", []) if tag["Key"] == "postroom-name"), None)


def _place(arn: str) -> str:
    return arn.rpartition(":")[2]


async def each(items: Sequence[T], do: Callable[[T], Awaitable[R]]) -> list[R]:
    """All at once, but not too many; in order. The first failure ends it."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(item: T) -> R:
        async with room:
            return await do(item)

    return list(await asyncio.gather(*(one(item) for item in items)))
