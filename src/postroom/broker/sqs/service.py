"""Calls to SQS and SNS: their errors in our words, and full batches of them."""

from __future__ import annotations

import asyncio
import atexit
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import wait
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import AioSession  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    MetadataRetrievalError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)

from postroom.broker.sqs.address import FIFO, Address
from postroom.broker.sqs.wire import MOST_BYTES, size_of
from postroom.errors import (
    BrokerClosed,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    LeaseLost,
    MessageTooLarge,
    PostroomError,
    SubscriptionNotFound,
)

_FULL = 10
"""Entries of a batch request, at most (SendMessageBatch, DeleteMessageBatch, PublishBatch)."""
_LANES = 8
"""Batches of one kind that are under way at once."""
_GONE = ("NonExistentQueue", "QueueDoesNotExist", "NotFound", "ResourceNotFound")
_LOST = ("ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue")
_DENIED = ("AccessDenied", "AuthorizationError", "InvalidClientTokenId", "InvalidSecurity", "SignatureDoesNotMatch")
_DENIED_TOO = ("UnrecognizedClientException", "OptInRequired")
_FOR_NOW = ("Throttl", "TooManyRequests", "RequestLimitExceeded", "ExpiredToken", "ServiceUnavailable", "Internal")
_FOR_NOW_TOO = ("OverLimit", "ConcurrentAccess", "RequestExpired", "RequestTimeTooSkewed")
"""``OverLimit``: as many messages are in flight as may be, until some are settled (ReceiveMessage)."""
_SKEWED = ("Signature expired", "Signature not yet current")
"""This clock is wrong, as after a pause of the machine, until it is set."""
_MOST_CONNECTIONS = 10_000
"""No limit: what is under way at once is bounded by lanes and polls, and nothing shall wait behind a poll."""
_FAREWELL = 2.0
"""Seconds that the end of a process waits for what is still under way."""
_CONNECT, _READ = 5.0, 10.0
"""Seconds until a connection, or an answer, is not waited for any longer."""

Answers = list[PostroomError | None]


class _Use(NamedTuple):
    """What a client of the library is made for."""

    attempts: int
    waits: bool = False
    """The service may wait with its answer."""


# A send that the library repeats on its own makes a second message, and of a lost receive nobody knows what it took.
# The others can be repeated: a start shall not fail because one of its many questions was one too many a second.
_ASK, _ACT, _POLL = _Use(3), _Use(1), _Use(1, waits=True)
_USES = {
    "send_message_batch": _ACT,
    "publish_batch": _ACT,
    "delete_message_batch": _ACT,
    "change_message_visibility_batch": _ACT,
    "receive_message": _POLL,
}


class Missing(BrokerError):
    """The queue, topic or subscription that was asked for is not there."""


class Service:
    """One connection to the services of one region. ``open`` connects; SNS and STS only when they are needed."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._clients: dict[tuple[str, _Use], Any] = {}
        self._opening = asyncio.Lock()
        self._session = AioSession()
        self._stack = AsyncExitStack()
        self._batchers: dict[tuple[str, str], Batcher] = {}
        self._worked: set[tuple[str, str]] = set()
        self._closed = False

    async def open(self) -> None:
        """Raises ``BrokerUnavailable`` or ``ConfigurationError``."""
        await self.call("sqs", "list_queues", QueueNamePrefix=self.address.prefix, MaxResults=1)
        self._loop, self._process = asyncio.get_running_loop(), os.getpid()
        atexit.register(self._leave)

    def _leave(self) -> None:
        """The process ends, and nobody has closed this: the client's library would complain of every connection."""
        if os.getpid() == self._process and self._loop.is_running():
            closing = asyncio.run_coroutine_threadsafe(self.close(), self._loop)
            wait([closing], timeout=_FAREWELL)

    async def close(self) -> None:
        """What is under way is finished; what waits is refused."""
        self._closed = True
        atexit.unregister(self._leave)
        for batcher in list(self._batchers.values()):
            await batcher.close()
        await self._stack.aclose()

    async def call(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]:
        """Raises ``Missing`` and what else :func:`translated` makes of the client's exceptions."""
        if self._closed:
            raise BrokerClosed(f"the broker was closed before {operation}")
        try:
            client = await self._client(service, _USES.get(operation, _ASK))
            answer: dict[str, Any] = await getattr(client, operation)(**parameters)
            return answer
        except Exception as error:
            if self._closed:
                raise BrokerClosed(f"the broker was closed during {operation}") from error
            raise translated(error, f"{service}:{operation}") from error

    async def pages(self, service: str, operation: str, result: str, **parameters: Any) -> list[Any]:
        """All pages of a listing."""
        found: list[Any] = []
        while True:
            page = await self.call(service, operation, **parameters)
            found += page.get(result, [])
            token = page.get("NextToken")
            if not token:
                return found
            parameters["NextToken"] = token

    async def region(self) -> str:
        """The one in use, where the URL names none."""
        return str((await self._client("sqs", _ASK)).meta.region_name)

    async def send(self, queue: str, entries: Sequence[dict[str, Any]]) -> Answers:
        """To a queue, by its URL; answered in order. One that keeps order gets them in order."""
        lanes = 1 if queue.endswith(FIFO) else _LANES
        return await self._batcher("send_message_batch", queue, lanes).all(entries)

    async def publish(self, topic: str, entries: Sequence[dict[str, Any]], room: int) -> Answers:
        """To a topic, by its ARN. ``room``: bytes that it takes, of one message and of a batch."""
        batcher = self._batcher("publish_batch", topic, _LANES)
        batcher.room = room
        return await batcher.all(entries)

    async def delete(self, queue: str, receipts: Sequence[str]) -> Answers:
        batcher = self._batcher("delete_message_batch", queue, _LANES)
        return await batcher.all([{"ReceiptHandle": receipt} for receipt in receipts])

    async def hide(self, queue: str, receipts: Sequence[tuple[str, int]]) -> Answers:
        """Make them visible so many seconds from now."""
        batcher = self._batcher("change_message_visibility_batch", queue, _LANES)
        return await batcher.all(
            [{"ReceiptHandle": receipt, "VisibilityTimeout": seconds} for receipt, seconds in receipts]
        )

    def _batcher(self, operation: str, target: str, lanes: int) -> Batcher:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        found = self._batchers.get((operation, target))
        if found is None:

            async def call(entries: list[dict[str, Any]]) -> Answers:
                return await self._batch(operation, target, entries)

            found = self._batchers[operation, target] = Batcher(call, lanes, MOST_BYTES)
        return found

    async def _batch(self, operation: str, target: str, entries: list[dict[str, Any]]) -> Answers:
        numbered = [entry | {"Id": str(number)} for number, entry in enumerate(entries)]
        has_worked = (operation, target) in self._worked
        try:
            if operation == "publish_batch":
                answer = await self.call("sns", operation, TopicArn=target, PublishBatchRequestEntries=numbered)
            else:
                answer = await self.call("sqs", operation, QueueUrl=target, Entries=numbered)
        except ConfigurationError as error:
            if has_worked:
                raise passing(error) from error.__cause__
            raise
        done = {int(entry["Id"]) for entry in answer.get("Successful", ())}
        if done:
            self._worked.add((operation, target))
        failed = {int(entry["Id"]): _refusal(entry, operation) for entry in answer.get("Failed", ())}
        for number, refusal in failed.items():
            if has_worked and isinstance(refusal, ConfigurationError):
                failed[number] = passing(refusal)
        silence = BrokerUnavailable(f"{operation}: the service did not answer for every entry")
        return [None if number in done else failed.get(number, silence) for number in range(len(entries))]

    async def _client(self, service: str, use: _Use) -> Any:
        found = self._clients.get((service, use))
        if found is not None:
            return found
        async with self._opening:
            if (service, use) not in self._clients:
                # A client that adapts sends less of everything to whatever queue, also leases to be renewed, while one
                # queue is throttled. It is right for questions: they are for all queues, and may wait.
                mode = "adaptive" if use.attempts > 1 else "standard"
                config = AioConfig(
                    retries={"total_max_attempts": use.attempts, "mode": mode},
                    connect_timeout=_CONNECT,
                    read_timeout=_READ + (self.address.wait if use.waits else 0),
                    max_pool_connections=_MOST_CONNECTIONS,
                    parameter_validation=False,
                )
                made = self._session.create_client(
                    service,
                    region_name=self.address.region,
                    endpoint_url=self.address.endpoint_url,
                    config=config,
                )
                self._clients[service, use] = await self._stack.enter_async_context(made)
            return self._clients[service, use]


class Batcher:
    """Gathers entries into full requests, whoever they come from, and keeps their order.

    With one lane the next request leaves when the one before is answered; after a failure whatever has been waiting
    behind is not sent, as it would overtake.
    """

    def __init__(self, call: Callable[[list[dict[str, Any]]], Awaitable[Answers]], lanes: int, room: int) -> None:
        """``lanes``: requests under way at once; ``room``: bytes of one."""
        self._call = call
        self._lanes = lanes
        self.room = room
        self._waiting: deque[tuple[dict[str, Any], asyncio.Future[PostroomError | None]]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._scheduled = False

    async def all(self, entries: Sequence[dict[str, Any]]) -> Answers:
        """An answer for each: ``None`` if done, else its error. Raises what concerns all of them."""
        loop = asyncio.get_running_loop()
        answers = [loop.create_future() for _ in entries]
        self._waiting.extend(zip(entries, answers, strict=True))
        if not self._scheduled:
            # At the end of this turn of the loop, so that what many send at once leaves together.
            self._scheduled = True
            loop.call_soon(self._start)
        await asyncio.wait(answers) if answers else None
        return [answer.result() for answer in answers]

    async def close(self) -> None:
        self._refuse(BrokerClosed("the broker was closed before this was sent"))
        while self._running:
            await asyncio.wait(self._running)

    def _start(self) -> None:
        self._scheduled = False
        while self._waiting and len(self._running) < self._lanes:
            task = asyncio.get_running_loop().create_task(self._run(self._next()))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    def _next(self) -> list[tuple[dict[str, Any], asyncio.Future[PostroomError | None]]]:
        batch: list[tuple[dict[str, Any], asyncio.Future[PostroomError | None]]] = []
        size = 0
        while self._waiting and len(batch) < _FULL:
            entry = self._waiting[0][0]
            size += size_of(entry) if "MessageAttributes" in entry else 0
            if batch and size > self.room:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _run(self, batch: list[tuple[dict[str, Any], asyncio.Future[PostroomError | None]]]) -> None:
        answers: Sequence[PostroomError | None]
        try:
            answers = await self._call([entry for entry, _ in batch])
        except PostroomError as error:
            answers = [error] * len(batch)
            if self._lanes == 1:
                self._refuse(error)
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    def _refuse(self, error: PostroomError) -> None:
        while self._waiting:
            future = self._waiting.popleft()[1]
            if not future.done():
                future.set_result(error)


def translated(error: Exception, what: str) -> PostroomError:
    """The client's exception in our words."""
    if isinstance(error, ClientError):
        found = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
        return _told(str(found.get("Code", "")), str(found.get("Message", "")), what, status)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return ConfigurationError(f"{what}: no AWS credentials; set AWS_ACCESS_KEY_ID, a profile, or a role ({error})")
    if isinstance(error, NoRegionError):
        return ConfigurationError(f"{what}: no region; write sqs://eu-west-1 or set AWS_REGION")
    if isinstance(error, ProfileNotFound | ConfigNotFound | ConfigParseError | SSOError | TokenRetrievalError):
        return ConfigurationError(f"{what}: {error}; correct AWS_PROFILE or the AWS config file, or log in anew")
    if isinstance(error, CredentialRetrievalError | MetadataRetrievalError):
        return BrokerUnavailable(f"{what}: the AWS credentials cannot be fetched now: {error}")
    if isinstance(error, ConnectionError | HTTPClientError | OSError | TimeoutError):
        return BrokerUnavailable(f"{what}: the service cannot be reached: {error or type(error).__name__}")
    if isinstance(error, BotoCoreError):
        return BrokerError(f"{what}: {error}")
    # The library has errors of its own for but a few of the pages that it cannot read.
    told = f"{type(error).__name__}: {error}"
    return BrokerUnavailable(f"{what}: this is no answer of the service; is a proxy in between? {told}")


def _refusal(entry: dict[str, Any], what: str) -> PostroomError:
    status = 400 if entry.get("SenderFault", True) else 500
    return _told(str(entry.get("Code", "")), str(entry.get("Message", "")), what, status)


def passing(error: PostroomError) -> BrokerUnavailable:
    """What has worked may work again, as soon as somebody has mended the policy or the key."""
    if isinstance(error, BrokerUnavailable):
        return error
    made = BrokerUnavailable(str(error))
    made.__cause__ = error.__cause__
    return made


def _told(code: str, message: str, what: str, status: int) -> PostroomError:
    # What follows the first line is our own request, with the token of the session, where its signature is wrong.
    first_line = message.strip().split("\n")[0]
    text = f"{what}: {code}: {first_line}"
    short = code.rpartition(".")[2]
    if short in _GONE:
        return Missing(text)
    for_now = short in _FOR_NOW_TOO or any(word in short for word in _FOR_NOW)
    if for_now or status >= 500 or any(words in message for words in _SKEWED):
        return BrokerUnavailable(text)
    # SQS says KMS.DisabledException, SNS KMSDisabled.
    if short.startswith((*_DENIED, *_DENIED_TOO)) or "KMS" in code.upper():
        return ConfigurationError(f"{text}; the policy this needs stands in docs/brokers/sqs.md")
    if "too long" in message or "must be shorter" in message or short == "BatchRequestTooLong":
        return MessageTooLarge(text)
    if short in _LOST and ("visibility" in what or "delete_message" in what):
        return LeaseLost(text)
    return BrokerError(text)


def not_found(name: str) -> SubscriptionNotFound:
    return SubscriptionNotFound(f"no subscription {name!r} here; declare it, or start a worker that does")
