"""The broker on Amazon SQS and SNS.

``address`` (URL and names), ``wire`` (a message as attributes and text), ``service`` (calls, their errors and their
batches), ``topology`` (which queues and topics there are), ``consumer`` and ``broker`` (the contract), ``letters``
(dead letters), ``examination`` (what the doctor tells).
"""

from postroom.broker.sqs.broker import SQSBroker

__all__ = ["SQSBroker"]
