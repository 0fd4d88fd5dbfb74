"""Priorities for brokers that have none: beside each queue one more for each level that is kept apart, its lanes.

``sqs://eu-west-1?priorities=5,9`` puts a job of priority 5 into the lane ``mail.priority-5`` of its queue ``mail``.
Whoever consumes ``mail`` looks into the highest lane first. All else, retries and dead letters too, happens within a
lane, by the broker's own means; to everybody above, a queue and its lanes are one queue.
"""

from postroom.broker.lanes.broker import LanedBroker
from postroom.broker.lanes.names import take_levels

__all__ = ["LanedBroker", "take_levels"]
