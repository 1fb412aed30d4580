"""Apache Kafka as the broker: ``kafka://host:port[,host:port…]/[prefix][?option=value&…]``.

What follows the slash stands before the name of each topic as it is: ``kafka://h:9092/shop.`` keeps the stream
``orders`` in the topic ``shop.orders``. Options come from the query, or from the environment as ``CDC_KAFKA_…``
(``password-file`` is ``CDC_KAFKA_PASSWORD_FILE``); the query wins. They are described at :data:`OPTIONS`. A password
comes from ``CDC_KAFKA_PASSWORD``, from the file, or percent-encoded from the URL, and is in no message.

A topic of ours has one partition, is written by an idempotent producer with ``acks=all`` and read by offset, without
a consumer group (https://kafka.apache.org/documentation/#producerconfigs, #consumerconfigs). Three things are done in
another way than a Kafka client's defaults suggest:

- What is appended together travels as one record batch, which Kafka keeps whole or not at all, and the next batch is
  sent only after it: with several on the way a client may lose one and still deliver the one behind it.
- A topic is known by its id, not by its name: one that was deleted and created again is a gap.
- A record batch that others compressed is inflated up to 64 MiB and no further.
"""

from cdc.brokers.kafka.broker import MESSAGE_BYTES_MAX, KafkaBroker, connect
from cdc.brokers.kafka.target import OPTIONS, Target, decode_topic, encode_topic, parse

__all__ = ["MESSAGE_BYTES_MAX", "OPTIONS", "KafkaBroker", "Target", "connect", "decode_topic", "encode_topic", "parse"]
