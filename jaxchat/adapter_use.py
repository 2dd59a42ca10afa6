"""How much of which adapter: what people write of one, `DIR`, `DIR=0.5` or `DIR@3`, as a value."""

import dataclasses
import os
import re
from pathlib import Path

from jaxchat.errors import UsageError
from jaxchat.options import MAX_SLOTS
from jaxchat.values import Range, check_number, read_number, wrong
from jaxchat.visible import shown

STRENGTHS = Range(float, -1e4, 1e4, note="1 is as it was trained, 0 is off")
SLOTS = Range(int, 0, MAX_SLOTS - 1, note="the first slot of the layer plan is 0")

_WRITTEN = re.compile(r"(?P<name>.*?)(?:@(?P<slot>[^@=/]*))?(?:=(?P<strength>[^@=/]*))?", re.DOTALL)
EXPECTED = "a folder, as DIR, DIR=0.5 (its strength) or DIR@3 (only in that slot of the layer plan)"


@dataclasses.dataclass(frozen=True)
class AdapterUse:
    """An adapter, and how much of it.

    Attributes:
      name: its directory, or the last part of that.
      strength: 1 is as the adapter was trained, 0.5 is halfway from the model to that, 0 is none of it.
      slot: the one slot of the layer plan that it is in; None is every layer that it has something for, and
        embedding and head.

    Raises:
      UsageError: a value out of its range.
    """

    name: str
    strength: float = 1.0
    slot: int | None = None

    def __post_init__(self) -> None:
        check_number(f"the strength of adapter {shown(self.name)}", self.strength, STRENGTHS)
        if self.slot is not None:
            check_number(f"the slot of adapter {shown(self.name)}", self.slot, SLOTS)

    @classmethod
    def parse(cls, text: str, where: str) -> "AdapterUse":
        """Reads `DIR`, `DIR=STRENGTH`, `DIR@SLOT` or `DIR@SLOT=STRENGTH`; what is a folder's name is that.

        Args:
          text: as typed.
          where: what it was given to, for errors.

        >>> AdapterUse.parse("loras/poet@3=0.5", "--adapter")
        AdapterUse(name='loras/poet', strength=0.5, slot=3)
        """
        if os.path.isdir(text):
            return cls(text)
        match = _WRITTEN.fullmatch(text)
        name, slot, strength = match.groups() if match else ("", None, None)
        if not name:
            raise wrong(where, text, EXPECTED)
        return cls(
            name,
            1.0 if strength is None else read_number(f"{where} {name}: the strength", strength, STRENGTHS),
            None if slot is None else read_number(f"{where} {name}: the slot", slot, SLOTS),
        )

    def __str__(self) -> str:
        """As `parse` reads it."""
        slot = "" if self.slot is None else f"@{self.slot}"
        return f"{self.name}{slot}" + ("" if self.strength == 1 else f"={self.strength:g}")


Uses = tuple[AdapterUse, ...]
AdapterLike = str | Path | AdapterUse
"""What says how an adapter is used: text as `AdapterUse.parse` reads it, a directory, or a use."""


def read_uses(given: object, where: str) -> Uses:
    """The uses that a parameter or flag says: one, a list of some, or None for none.

    Raises:
      UsageError: it is something else.
    """
    if given is None:
        return ()
    if isinstance(given, str | Path | AdapterUse):
        given = [given]
    if not isinstance(given, list | tuple):
        raise wrong(where, given, f"{EXPECTED}, or a list of such")
    found = []
    for entry in given:
        if isinstance(entry, AdapterUse):
            found.append(entry)
        elif isinstance(entry, Path):
            found.append(AdapterUse(str(entry)))
        elif isinstance(entry, str):
            found.append(AdapterUse.parse(entry, where))
        else:
            raise wrong(where, entry, EXPECTED)
    return tuple(found)


def refuse_recipe(where: str) -> UsageError:
    """The error for an adapter on top of a recipe."""
    return UsageError(
        f"{where}: a recipe's layers are of several models, and an adapter is for one; convert the recipe "
        "with --to_hf first, and give the adapter that was made for the result"
    )
