"""What scores are called, which way is better, and how people read them: a row a metric. Needs no JAX."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Metric(NamedTuple):
    """A score of items.

    Attributes:
      about: what it is, for people.
      higher_is_better: else lower.
      shown: from the mean to what people read, which grows with it; None is the mean itself.
      shown_as: what that is called.
    """

    about: str
    higher_is_better: bool = True
    shown: Callable[[float], float] | None = None
    shown_as: str = ""


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))


METRICS = {
    "acc": Metric("the likeliest choice is right, or each token of the continuation is the likeliest"),
    "acc_per_token": Metric("the choice likeliest per token is right"),
    "acc_per_char": Metric("the choice likeliest per character is right (acc_norm, len_norm)"),
    "acc_per_byte": Metric("the choice likeliest per byte is right (acc_bytes)"),
    "acc_uncond": Metric("the choice that the question makes likelier the most is right (PMI)"),
    "probability": Metric("of the right choice, where one of them is said"),
    "nats": Metric("minus log-likelihood of a continuation", False, _perplexity, "perplexity"),
    "nats_per_token": Metric("of what is right", False, _perplexity, "perplexity"),
    "bits_per_byte": Metric("of what is right, all bytes alike", False),
    "bits_per_byte_mean": Metric("of what is right, all items alike", False),
    "exact": Metric("the reply is the answer, blanks around it aside"),
    "normalized": Metric("the same; case, blanks and a full stop aside"),
    "number": Metric("the last number of the reply is that of the answer; commas and $ aside"),
    "found": Metric("the pattern is found in the reply"),
    "strict": Metric("the number after #### is right"),
    "flexible": Metric("the last number is right"),
    "prompt_strict": Metric("all instructions of a prompt are followed"),
    "prompt_loose": Metric("the same; markup, first and last lines aside"),
    "instruction_strict": Metric("instructions that are followed"),
    "instruction_loose": Metric("the same; markup, first and last lines aside"),
    "partial": Metric("how near the number is, from 0 to 1"),
    "eq_bench": Metric("how near the intensities of feelings are, at most 100; 0 is random"),
    "parseable": Metric("replies of the form that is asked for"),
}


def metric(name: str) -> Metric:
    """A metric by its name; one that is not in the table is better the higher it is."""
    return METRICS.get(name, Metric(""))
