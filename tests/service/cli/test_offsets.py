"""What `sluice offsets show` reads out of a commit."""

from service.cli.offsets import describe
from service.kafka.tracker import Progress


def test_a_commit_is_decoded_to_what_is_done_and_what_is_not() -> None:
    progress = Progress(epoch=4, next_offset=18, done=0b1011_0110, chunk_low=70)
    assert describe("p-0", 10, progress, 2, 30) == {
        "partition": "p-0",
        "low": 10,
        "taken_to": 18,
        "end": 30,
        "lag": 15,
        "epoch": 4,
        "num_done_above_low": 5,
        "done_ranges": [[11, 12], [14, 15], [17, 17]],
        "unfinished": [10, 13, 16],
        "chunk_low": 70,
    }


def test_a_partition_without_a_commit_has_everything_before_it() -> None:
    row = describe("p-0", None, Progress(), 5, 9)
    assert (row["low"], row["lag"], row["unfinished"], row["epoch"]) == (None, 4, [], None)
