"""Refuses what no step could serve: ids outside the model's vocabulary. Shared by every engine kind; standard library only.

Room in context and pool is the scheduler's to judge.
"""

from engine.errors import InvalidFieldError
from engine.request import Request


def check_vocabulary(request: Request, vocab_size: int) -> None:
    """Raises `InvalidFieldError` naming the field whose token id is outside [0, vocab_size)."""
    sampling = request.sampling
    _check(request.prompt_token_ids, "prompt", vocab_size)
    for said in request.output_token_ids:
        _check(said, "output_token_ids", vocab_size)
    _check(tuple(sampling.logit_bias), "sampling.logit_bias", vocab_size)
    _check(sampling.stop_token_ids, "sampling.stop_token_ids", vocab_size)


def _check(token_ids: tuple[int, ...], field: str, vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise InvalidFieldError(field, f"holds a token id outside the vocabulary of {vocab_size}")
