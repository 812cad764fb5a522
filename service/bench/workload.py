"""The requests of a load: texts of plain English words, since any endpoint takes text and a common word is one token to most vocabularies.

Guarantee: a seed gives the same requests everywhere. How many tokens a prompt really has is what the endpoint says (`usage`); the report
has that. Prompts differ from their first word on, except for the prefix that they share.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service.bench.lengths import Draw, Lengths

_COMMON = """
the of and to in is was for that with his on are by this have from they which one had not but what all were when your said
there use each she how their will other about out many then them these some her would make like him into time has look two
more write go see number no way could people my than first water been call who oil its now find long down day did get come
made may part over new sound take only little work know place year live me back give most very after thing our just name good
sentence man think say great where help through much before line right too mean old any same tell boy follow came want show
also around form three small set put end does another well large must big even such because turn here why ask went men read
need land different home us move try kind hand picture again change off play spell air away animal house point page letter
mother answer found study still learn should world high every near add food between own below country plant last school father
keep tree never start city earth eye light thought head under story saw left few while along might close something seem next
hard open example begin life always those both paper together got group often run important until children side feet car mile
night walk white sea began grow took river four carry state once book hear stop without second later miss idea enough eat face
watch far really almost let above girl sometimes mountain cut young talk soon list song being leave family
"""
_WORDS = tuple(_COMMON.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One request to send. `max_tokens` are wanted in full where the endpoint can be told to ignore the end of the text."""

    index: int
    text: str
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is sent. `shared_prefix_tokens`: words that every prompt of every run begins with, beside its own."""

    lengths: Lengths
    shared_prefix_tokens: int = 0

    def requests(self, new_draw: Callable[[str], Draw], stream: str) -> Iterator[Planned]:
        """Endless; those of another stream have other words, and the same prefix."""
        prefix = words(self.shared_prefix_tokens, new_draw("prefix"))
        uniform = new_draw(stream)
        index = 0
        while True:
            num_prompt, num_output = self.lengths.draw(uniform)
            text = " ".join([*prefix, *words(num_prompt, uniform)])
            yield Planned(index=index, text=text, max_tokens=num_output, seed=int(uniform() * 2**31))
            index += 1


def words(count: int, uniform: Draw) -> list[str]:
    """`count` words, drawn."""
    return [_WORDS[int(uniform() * len(_WORDS))] for _ in range(count)]
