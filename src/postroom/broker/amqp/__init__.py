"""RabbitMQ: ``amqp://`` and ``amqps://``. Needs ``pip install 'postroom[amqp]'``.

Read in this order: ``wire`` (a message as it travels), ``topology`` (what is declared on the server) and ``ladder``
(how a message waits there), ``link`` and ``confirms`` (connections, confirmed publishing), ``consumer``, ``letters``.
"""

from postroom.broker.amqp.broker import AMQPBroker

__all__ = ["AMQPBroker"]
