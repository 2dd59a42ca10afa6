"""What a candidate changes in the base plan: blocks of its slots that are run again, left out, or turned."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping

from jaxchat.layer_plan import LayerPlan, Slot

WHISPER = 0.2
"""What the MLP counts for in the second pass of a block that whispers: published as better than 1."""

Block = tuple[Slot, ...]


def _scaled(block: Block, attention: float, mlp: float) -> Block:
    return tuple(Slot(slot.layer, slot.attn_scale * attention, slot.mlp_scale * mlp) for slot in block)


KINDS: Mapping[str, Callable[[Block], Block]] = {
    "repeat": lambda block: block + block,
    "drop": lambda block: (),
    "whisper": lambda block: block + _scaled(block, 1, WHISPER),
    "repeat attention": lambda block: block + _scaled(block, 1, 0),
    "repeat MLP": lambda block: block + _scaled(block, 0, 1),
    "drop attention": lambda block: _scaled(block, 0, 1),
    "drop MLP": lambda block: _scaled(block, 1, 0),
    "reverse": lambda block: block[::-1],
}
"""Kind -> what becomes of a block of slots."""

VARIANTS = ("whisper", "repeat attention", "repeat MLP", "drop attention", "drop MLP", "reverse")
"""Kinds that are tried where `repeat` or `drop` of a block did well."""


@dataclasses.dataclass(frozen=True, order=True)
class Move:
    """What becomes of the slots [start, stop) of the base plan; `kind` is one of `KINDS`."""

    start: int
    stop: int
    kind: str

    def __str__(self) -> str:
        """For people."""
        last = self.stop - 1
        return f"{self.kind} {self.start}" + (f" to {last}" if last > self.start else "")


Genes = tuple[Move, ...]
"""Moves of blocks that do not overlap, in order; () is the base plan."""


def disjoint(moves: Iterable[Move]) -> Genes | None:
    """Moves as genes; None if two of them are of the same slot."""
    ordered = tuple(sorted(moves))
    if any(a.stop > b.start for a, b in itertools.pairwise(ordered)):
        return None
    return ordered


def plan_of(base: LayerPlan, genes: Genes) -> LayerPlan | None:
    """The base plan with its moves made; None if no slot is left."""
    slots: list[Slot] = []
    place = 0
    for move in genes:
        slots += base.slots[place : move.start]
        slots += KINDS[move.kind](base.slots[move.start : move.stop])
        place = move.stop
    slots += base.slots[place:]
    if not any(not slot.is_identity for slot in slots):
        return None
    return LayerPlan(tuple(slots), base.num_layers)


def neighbours(genes: Genes, slots: int) -> list[Genes]:
    """Genes one step away: a block begins or ends a slot earlier or later, another kind, or a move less."""
    found: dict[Genes, None] = {}
    for number, move in enumerate(genes):
        others = genes[:number] + genes[number + 1 :]
        steps = [
            Move(move.start + start, move.stop + stop, move.kind)
            for start, stop in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1))
        ]
        steps += [Move(move.start, move.stop, kind) for kind in KINDS if kind != move.kind]
        for step in steps:
            if 0 <= step.start < step.stop <= slots and not (
                step.kind == "reverse" and step.stop - step.start < 2
            ):
                changed = disjoint((*others, step))
                if changed is not None:
                    found[changed] = None
        if others:
            found[others] = None
    return list(found)
