"""The client's errors in the words of the contract."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException

from postroom.errors import BrokerError, BrokerUnavailable, ConfigurationError, MessageTooLarge

GONE = {
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError._ASSIGNMENT_LOST,
}
"""What a group says to a member that it has given up."""

DENIED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}
"""What a user may not do."""

_REFUSED = DENIED | {
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError.INVALID_REPLICATION_FACTOR,
    KafkaError.INVALID_PARTITIONS,
    KafkaError.INVALID_CONFIG,
    KafkaError.POLICY_VIOLATION,
}


def error_of(exception: KafkaException) -> KafkaError:
    found: KafkaError = exception.args[0]
    return found


def translated(what: str, error: KafkaError) -> BrokerError | ConfigurationError:
    """What to raise, with the client's error as its cause."""
    made: BrokerError | ConfigurationError
    if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
        made = MessageTooLarge(f"{what}: too large for the topic; raise its max.message.bytes: {error.str()}")
    elif error.code() == KafkaError._INVALID_ARG:
        made = ConfigurationError(f"{what}: a setting of the URL cannot be used: {error.str()}")
    elif error.code() in _REFUSED:
        hint = "; ?ca= of the URL names the file of who is believed" if error.code() == KafkaError._SSL else ""
        if error.code() in DENIED:
            hint = "; docs/brokers/kafka.md names the permissions a user needs"
        made = ConfigurationError(f"{what}: Kafka refuses: {error.str()}{hint}")
    else:
        made = BrokerUnavailable(f"{what}: {error.str()}; it may succeed later")
    made.__cause__ = KafkaException(error)
    return made


def unavailable(what: str, error: KafkaError) -> BrokerUnavailable:
    """What to raise of a worker's fetching and settling, whatever the reason: it tries again until somebody has mended
    it, for what it holds must not be forgotten."""
    told = translated(what, error)
    made = BrokerUnavailable(str(told))
    made.__cause__ = told.__cause__
    return made
