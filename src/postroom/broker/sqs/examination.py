"""What ``postroom doctor`` looks at: settings of queues, and whether topics reach them. It only reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from postroom.broker.routing import matches
from postroom.broker.sqs.kept import Kept
from postroom.broker.sqs.service import Missing, Service
from postroom.broker.sqs.topology import MOST_RECEIVES, RETENTION, Topology, each
from postroom.broker.sqs.wire import MOST_BYTES, filter_policy
from postroom.doctor import Finding
from postroom.errors import PostroomError

_FEW_RECEIVES = 100
_DAY = 86_400


async def examine(service: Service, topology: Topology) -> list[Finding]:
    """Every queue and every topic of the namespace."""
    try:
        found = await topology.all()
    except PostroomError as error:
        return [_unseen("queues", error, "sqs:ListQueues and sqs:ListQueueTags")]
    findings = [_nothing_here(service)] if not found else []
    for told in await each(sorted(found), lambda name: _queue(topology, found[name])):
        findings += told
    findings += await _topics(service, topology, found)
    findings.append(_ends(found))
    return findings


def _nothing_here(service: Service) -> Finding:
    return Finding(
        level="ok", title="queues", detail=f"no queue of ours begins with {service.address.prefix}; none is declared"
    )


def _ends(found: Mapping[str, Kept]) -> Finding:
    return Finding(
        level="warning" if found else "ok",
        title="retention",
        detail="SQS drops every message after 14 days: what waits for so long is lost; dead letters are stored anew "
        "before that, as long as a worker of their queue runs",
        remedy="keep a worker on every queue, and watch ApproximateAgeOfOldestMessage in CloudWatch" if found else "",
    )


async def _queue(topology: Topology, kept: Kept) -> list[Finding]:
    title = f"queue {kept.name}"
    try:
        own = await topology.attributes(kept.url, "All")
    except PostroomError as error:
        return [_unseen(title, error, "sqs:GetQueueAttributes")]
    try:
        dead = await topology.attributes(kept.dead_url, "All")
    except Missing:
        remedy = "start a worker that may create queues, or create it with the same retention and kind"
        return [_error(title, f"its queue of dead letters, {_place(kept.dead_url)}, is missing", remedy)]
    except PostroomError as error:
        return [_unseen(title, error, "sqs:GetQueueAttributes")]
    findings = [*_retention(title, kept, own, dead), *_settings(title, kept, own), *_backstop(title, kept, own, dead)]
    return findings or [Finding(level="ok", title=title, detail="its settings keep the promises")]


def _retention(title: str, kept: Kept, own: Mapping[str, str], dead: Mapping[str, str]) -> Iterator[Finding]:
    for url, attributes in ((kept.url, own), (kept.dead_url, dead)):
        seconds = int(attributes.get("MessageRetentionPeriod", RETENTION))
        if seconds < RETENTION:
            yield Finding(
                level="warning",
                title=title,
                detail=f"{_place(url)} keeps a message for {seconds / _DAY:.3g} days only, then it is lost",
                remedy=_set(url, MessageRetentionPeriod=str(RETENTION)),
            )


def _settings(title: str, kept: Kept, own: Mapping[str, str]) -> Iterator[Finding]:
    size = int(own.get("MaximumMessageSize", MOST_BYTES))
    if size < MOST_BYTES:
        detail = f"{_place(kept.url)} takes {size:,} bytes, where Postroom counts on {MOST_BYTES:,}"
        detail += ": larger messages, and failed ones with their history, are refused"
        yield _error(title, detail, _set(kept.url, MaximumMessageSize=str(MOST_BYTES)))
    delay = int(own.get("DelaySeconds", 0))
    if delay and kept.declared.ordered:
        detail = f"{_place(kept.url)} delays every message by {delay} s"
        yield Finding(level="warning", title=title, detail=detail, remedy=_set(kept.url, DelaySeconds="0"))
    key = own.get("KmsMasterKeyId")
    if key and not kept.queue and not kept.declared.ordered:
        yield Finding(
            level="warning",
            title=title,
            detail=f"{_place(kept.url)} is encrypted with {key}: SNS delivers to it only if the key's policy allows "
            "sns.amazonaws.com to use kms:GenerateDataKey and kms:Decrypt, which the default key's does not",
            remedy="use a key of your own with that policy, or SSE-SQS",
        )


def _backstop(title: str, kept: Kept, own: Mapping[str, str], dead: Mapping[str, str]) -> Iterator[Finding]:
    policy = _json(own.get("RedrivePolicy"))
    arn = dead.get("QueueArn", "")
    wanted = _set(
        kept.url, RedrivePolicy=json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": str(MOST_RECEIVES)})
    )
    if not policy:
        detail = "it has no redrive policy: a message that no worker can even read is received for ever"
        yield Finding(level="warning", title=title, detail=detail, remedy=wanted)
        return
    if policy.get("deadLetterTargetArn") != arn:
        detail = f"its redrive policy leads to {policy.get('deadLetterTargetArn')}: dead letters there are not shown"
        yield _error(title, detail, wanted)
    receives = int(policy.get("maxReceiveCount", MOST_RECEIVES))
    if receives < _FEW_RECEIVES:
        detail = f"SQS itself moves a message to the dead letters after {receives} receives, before its attempts are "
        detail += "used up, and without its history"
        yield _error(title, detail, wanted)


async def _topics(service: Service, topology: Topology, found: Mapping[str, Kept]) -> list[Finding]:
    """Whether SNS delivers to each queue that hangs on a topic, and what it lets through."""
    events = [kept for kept in found.values() if not kept.queue and not kept.declared.ordered]
    if not events:
        return []
    try:
        topics = {name: await topology.hanging(name) for name in await topology.topics()}
    except PostroomError as error:
        return [_unseen("topics", error, "sns:ListTopics and sns:ListSubscriptionsByTopic")]
    findings: list[Finding] = []
    for kept in events:
        title = f"subscription {kept.name}"
        try:
            told = await _links(service, topology, title, kept, topics)
        except PostroomError as error:
            told = [_unseen(title, error, "sqs:GetQueueAttributes and sns:GetSubscriptionAttributes")]
        findings += told or [Finding(level="ok", title=title, detail="SNS delivers to it what it asks for")]
    return findings


async def _links(
    service: Service, topology: Topology, title: str, kept: Kept, topics: Mapping[str, Mapping[str, str]]
) -> list[Finding]:
    own = await topology.attributes(kept.url, "QueueArn", "Policy")
    told = [] if _lets_in(own.get("Policy")) else [_closed(title, kept)]
    for topic, hanging in topics.items():
        if matches(kept.declared.pattern, topic):
            told += await _link(service, title, kept, topic, hanging.get(own["QueueArn"]))
    return told


async def _link(service: Service, title: str, kept: Kept, topic: str, arn: str | None) -> list[Finding]:
    again = "declare it again: start a worker that may call sns:Subscribe and sns:SetSubscriptionAttributes"
    if arn is None:
        return [_error(title, f"it gets nothing of topic {topic}: its queue is not subscribed there", again)]
    answer = await service.call("sns", "get_subscription_attributes", SubscriptionArn=arn)
    attributes = answer["Attributes"]
    findings = []
    if attributes.get("RawMessageDelivery") != "true":
        remedy = f"aws sns set-subscription-attributes --subscription-arn {arn} "
        remedy += "--attribute-name RawMessageDelivery --attribute-value true"
        findings.append(
            _error(title, f"of topic {topic} it gets envelopes of SNS, not messages: raw delivery is off", remedy)
        )
    if (_json(attributes.get("FilterPolicy")) or None) != filter_policy(kept.declared.where):
        detail = f"of topic {topic} it gets other messages than its where asks for: the filter policy is another"
        findings.append(_error(title, detail, again))
    return findings


def _lets_in(policy: str | None) -> bool:
    statements = _json(policy).get("Statement", [])
    return any(
        statement.get("Effect") == "Allow"
        and "sns.amazonaws.com" in json.dumps(statement.get("Principal"))
        and any(action.lower() in ("sqs:sendmessage", "sqs:*") for action in _list(statement.get("Action")))
        for statement in _list(statements)
    )


def _closed(title: str, kept: Kept) -> Finding:
    remedy = "delete the queue's policy and declare the subscription anew, or allow sns.amazonaws.com sqs:SendMessage"
    return _error(title, f"the policy of {_place(kept.url)} lets no SNS topic send to it: events are lost", remedy)


def _error(title: str, detail: str, remedy: str) -> Finding:
    return Finding(level="error", title=title, detail=detail, remedy=remedy)


def _unseen(title: str, error: PostroomError, permissions: str) -> Finding:
    detail = f"cannot be looked at: {error}"
    return Finding(level="warning", title=title, detail=detail, remedy=f"allow {permissions}")


def _set(url: str, **attributes: str) -> str:
    return f"aws sqs set-queue-attributes --queue-url {url} --attributes '{json.dumps(attributes)}'"


def _place(url: str) -> str:
    return url.rpartition("/")[2]


def _json(text: str | None) -> dict[str, Any]:
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
