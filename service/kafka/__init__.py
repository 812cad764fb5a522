"""The Kafka transport: `KafkaTransport` for the application, topics and the embedded broker for it and the command line."""

from service.kafka.embedded import EmbeddedBroker
from service.kafka.topics import Topics
from service.kafka.transport import KafkaStatus, KafkaTransport

__all__ = ["EmbeddedBroker", "KafkaStatus", "KafkaTransport", "Topics"]
