"""What to ask about the layers of a model. Needs no JAX, so that the command's `--help` is fast."""

import dataclasses
import functools
import re
from typing import Annotated

from jaxchat.errors import UsageError, option
from jaxchat.options import Flag

PARTS = ("influence", "angular", "skip", "halves", "rys", "lens")
"""What can be measured."""


def read_positions(text: str) -> tuple[int | None, int | None]:
    """`START:STOP`, a Python slice."""
    match = re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?", text.strip())
    if not match:
        raise UsageError(
            f"{option('lens_positions')} is {text!r}; expected a slice START:STOP, e.g. -12: or 20:36"
        )
    start, stop = (None if part is None else int(part) for part in match.groups())
    return start, stop


_flag = functools.partial(Flag, group="What to measure")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """What to measure.

    Raises:
      UsageError: a part that does not exist, or none at all, or an empty sample.
    """

    parts: Annotated[
        tuple[str, ...],
        _flag(
            help=f"Some of {','.join(PARTS)}",
            example="--parts influence,skip",
            value="LIST",
            read=lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
            shown=",".join(PARTS),
        ),
    ] = PARTS
    rys_sample: Annotated[
        int | None,
        _flag(
            help="Of the repeats (i, j), try so many drawn at random; all if not given",
            example="--rys_sample 200",
            low=1,
        ),
    ] = None
    seed: Annotated[int, _flag(help="Of the sample", example="--seed 7", low=0)] = 0
    lens_positions: Annotated[
        tuple[int | None, int | None],
        _flag(
            help="The tokens of the first window whose successors the lens shows, a Python slice",
            example="--lens_positions 20:36",
            value="START:STOP",
            read=read_positions,
            shown="-12:",
        ),
    ] = (-12, None)
    top_k: Annotated[
        int,
        _flag(
            help="How many candidates the lens and a comparison list for each token",
            example="--top_k 10",
            low=1,
        ),
    ] = 5

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise UsageError(
                    f"{option('parts')}: unknown part {part!r}; expected some of {','.join(PARTS)}"
                )
        if not self.parts:
            raise UsageError(f"{option('parts')} is empty; give some of {','.join(PARTS)}")
        if self.rys_sample is not None and self.rys_sample < 1:
            raise UsageError(f"{option('rys_sample')} is {self.rys_sample}; it must be at least 1")
