"""The broker on Apache Kafka 3.x and 4.x.

Read it from the inside out: ``ledger`` (what of a partition is done), ``wire`` (a message as a record), ``backlog``
(who is next), ``hub`` (one subscription in one process), ``member`` (its place in the consumer group), ``topology``,
``letters`` and ``broker`` (the contract).
"""

from postroom.broker.kafka.broker import KafkaBroker

__all__ = ["KafkaBroker"]
