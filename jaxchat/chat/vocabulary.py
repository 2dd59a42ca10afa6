"""What a model's token ids are: whether they are text, which of them end one, how many there are."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxchat.errors import JaxchatError
from jaxchat.text.tokenizer import Tokenizer
from jaxchat.visible import shown


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

    def check(self, ids: Iterable[int]) -> None:
        """Refuses ids that a text has for the tokenizer, and the model does not have.

        Raises:
          JaxchatError: names the token, and says what is wrong and what to do.
        """
        if (unknown := self.unknown(ids)) is not None:
            raise JaxchatError(
                f"{unknown}: tokenizer and weights are not of one model, or tokens were added and the model "
                "was not resized; use the matching tokenizer, or texts without that token"
            )

    def unknown(self, ids: Iterable[int]) -> str | None:
        """The first of the ids that the model does not have, in words; None if it has them all."""
        found = next((i for i in ids if i >= self.size), None)
        if found is None or self.tokenizer is None:
            return None
        name = shown(self.tokenizer.decode([found]))
        return f"the token {name} (id {found}) is not in the model's vocabulary of {self.size} tokens"
