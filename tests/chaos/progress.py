"""The done-bits of an offset commit, read by the checker's own decoder from their published form.

`sluice1 e=<epoch> … b=<bits>` or `r=<runs>`: base64 without padding; bits little-endian from the committed offset on; runs are varints
of alternating lengths of not-done and done, from the committed offset on. Words that are not known are passed over.
"""

import base64
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Offsets below `low` are done, and those whose bit (offset - low) is set. `epoch` is the owner's."""

    low: int
    bits: int = 0
    epoch: int = 0

    def __contains__(self, offset: int) -> bool:
        return offset < self.low or bool(self.bits >> (offset - self.low) & 1)

    def missing_from(self, later: "Done") -> list[int]:
        """Offsets that are done here and not in `later`, at or above its `low`."""
        bits = self.bits
        if later.low >= self.low:
            bits >>= later.low - self.low
            lost = bits & ~later.bits
        else:
            bits = bits << (self.low - later.low) | ((1 << (self.low - later.low)) - 1)
            lost = bits & ~later.bits
        found = []
        while lost:
            lowest = lost & -lost
            found.append(later.low + lowest.bit_length() - 1)
            lost ^= lowest
        return found


def done_of(offset: int, metadata: str) -> Done:
    """What a commit says. Raises ValueError for metadata of this version that cannot be read: the service would have lost its bits."""
    words = metadata.split(" ")
    if words[0] != "sluice1":
        return Done(low=max(offset, 0))
    fields = dict(word.split("=", 1) for word in words[1:])
    bits = 0
    if "b" in fields:
        bits = int.from_bytes(_raw(fields["b"]), "little")
    elif "r" in fields:
        bits = _bits_of_runs(_raw(fields["r"]))
    return Done(low=max(offset, 0), bits=bits, epoch=int(fields.get("e", "0")))


def _raw(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _bits_of_runs(raw: bytes) -> int:
    bits, position, is_done = 0, 0, False
    length, shift = 0, 0
    for byte in raw:
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if is_done:
                bits |= ((1 << length) - 1) << position
            position, is_done, length, shift = position + length, not is_done, 0, 0
    if shift:
        raise ValueError("the runs end inside a number")
    return bits
