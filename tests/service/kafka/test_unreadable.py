"""A partition that cannot be read is found among the others and held back alone."""

from aiokafka.errors import CorruptRecordException

from service.kafka.records import TopicPartition
from service.kafka.unreadable import Unreadable

BAD, GOOD = TopicPartition("t", 0), TopicPartition("t", 1)
ERROR = CorruptRecordException("Invalid CRC")


async def test_a_failed_poll_of_several_makes_each_a_suspect_in_turn() -> None:
    unreadable = Unreadable()
    assert not unreadable.failed((BAD, GOOD), 7, ERROR)
    assert {unreadable.suspect((BAD, GOOD)) for _ in range(2)} == {BAD, GOOD}
    assert (unreadable.limit((BAD,), 64), unreadable.reason) == (1, "")


async def test_one_that_fails_alone_as_a_suspect_is_held_back_with_a_reason() -> None:
    unreadable = Unreadable()
    assert not unreadable.failed((BAD,), 7, ERROR)
    assert unreadable.failed((BAD,), 7, ERROR)
    assert (unreadable.holds(BAD), unreadable.holds(GOOD)) == (True, False)
    assert unreadable.reason == "t-0 from offset 7 on cannot be read (CorruptRecordException)"


async def test_one_that_was_read_alone_is_no_suspect_any_more() -> None:
    unreadable = Unreadable()
    unreadable.failed((BAD, GOOD), 7, ERROR)
    unreadable.read(GOOD)
    assert unreadable.suspect((BAD, GOOD)) == BAD
    assert unreadable.limit((GOOD,), 64) == 64
