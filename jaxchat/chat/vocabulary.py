"""What a model's token ids are: whether they are text, which of them end one, how many there are."""

from dataclasses import dataclass

from jaxchat.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """What the ids that a model draws are.

    Attributes:
      tokenizer: turns them into text; None where the model has none.
      eos_ids: the ids that end a text: the model's and the tokenizer's.
      size: `V`, the model draws ids below it.
    """

    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    size: int
