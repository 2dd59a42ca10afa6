"""Layer plans: which source layer each executed block uses, as data. Check, compose, to arrays.

Nothing here knows a model or JAX: a plan needs only the number of stacked layers `L`. How plans are spelled
is in `notations.py`. `L` stacked source layers · `P` plan slots.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxchat import notations
from jaxchat.arguments import refused
from jaxchat.config import MAX_LAYERS, Half
from jaxchat.notations import MAX_SLOTS, PlanError
from jaxchat.visible import shown

__all__ = ["LayerPlan", "PlanArrays", "PlanError", "PlanItems", "PlanLike", "Slot", "as_plan"]


@dataclass(frozen=True)
class Slot:
    """One block of the executed model.

    Attributes:
      layer: the source layer in `[0, L)` whose weights the block uses.
      attn_scale: multiplies the output of the attention output projection (0 skips attention).
      mlp_scale: multiplies the output of the MLP down projection (0 skips the MLP).
    """

    layer: int
    attn_scale: float = 1.0
    mlp_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", operator.index(self.layer))
        object.__setattr__(self, "attn_scale", float(self.attn_scale))
        object.__setattr__(self, "mlp_scale", float(self.mlp_scale))

    def scale_of(self, half: Half) -> float:
        """The scale of one half's output."""
        return self.attn_scale if half == "attention" else self.mlp_scale

    @property
    def is_identity(self) -> bool:
        """Whether the block passes its input through unchanged."""
        return self.attn_scale == 0.0 and self.mlp_scale == 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the block is the source layer as trained."""
        return self.attn_scale == 1.0 and self.mlp_scale == 1.0


class PlanArrays(NamedTuple):
    """The executed slots of a plan as arrays of a fixed size, so that every plan runs in one executable.

    numpy's, as a plan makes them; traced ones inside of an executable.
    """

    layer: Any  # int32 [P], padded with 0
    attn_scale: Any  # float32 [P], padded with 0
    mlp_scale: Any  # float32 [P], padded with 0
    length: Any  # int32 [], how many slots are executed


PlanItems: TypeAlias = Sequence[int | range | slice | Sequence[float] | Slot] | range | slice
"""A range or slice of layers, or a list of layers, ranges, slices and [layer, attn_scale, mlp_scale]."""


@dataclass(frozen=True, repr=False)
class LayerPlan:
    """A list of slots over `num_layers` source layers. Immutable and hashable.

    Attributes:
      slots: at least one; `slots[p].layer` picks weights, `p` itself picks the KV cache slot.
      num_layers: `L`, how many layers the slots choose from (for an outer plan in `compose`: inner slots).

    Raises:
      PlanError: there is no slot, a layer is not in `[0, num_layers)`, or a scale is not finite in float32.
    """

    slots: tuple[Slot, ...]
    num_layers: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(self.slots))
        object.__setattr__(self, "num_layers", operator.index(self.num_layers))
        _check_num_layers(self.num_layers)
        if not self.slots:
            raise PlanError("the layer plan has no slot: expected at least one")
        if len(self.slots) > MAX_SLOTS:
            raise PlanError(f"the layer plan has {len(self.slots)} slots: expected at most {MAX_SLOTS}")
        for position, slot in enumerate(self.slots):
            if not 0 <= slot.layer < self.num_layers:
                raise PlanError(
                    f"slot {position} of the layer plan uses layer {slot.layer}: "
                    f"expected 0 to {self.num_layers - 1}"
                )
            for name, scale in (("attn_scale", slot.attn_scale), ("mlp_scale", slot.mlp_scale)):
                if not notations.is_finite(scale):
                    raise PlanError(
                        f"slot {position} of the layer plan has {name} {scale!r}: "
                        "expected a number that is finite in float32"
                    )

    @classmethod
    def parse(cls, spec: str, num_layers: int) -> "LayerPlan":
        """Read a plan for a model of `num_layers` layers.

        How the text begins tells the notations apart:

            "0:8,4:12,8:"           layers and Python slices: 0..7, 4..11, 8..L-1
            "0:10, 10:20:2, -1"     0..9, 10 12 14 16 18, L-1
            "[0, [1, 0.0, 1.0], 2]" a JSON list: layers, and [layer, attn_scale, mlp_scale]
            "(4,8)"                 RYS: 0..7, then 4..L-1; also "blocks:4,8;12,14"
            "[(0,8),(4,12)]"        exllamav2: 0..7, then 4..L-1, as the last range runs on to the end
            "@plan.txt"             what that file holds, in any of these, on any number of lines

        Slices have exactly Python's meaning: ends are clamped, negative numbers count from the end, `::-1`
        reverses; `all` is every layer. `first..last` is a range with both ends (llm-circuit-finder).

        Raises:
          PlanError: `spec` is malformed, an item selects nothing, or a layer is out of range. The message is
            one line, then the text with the culprit underlined.
        """
        _check_num_layers(num_layers)
        return cls(tuple(Slot(*entry) for entry in notations.parse(spec, num_layers)), num_layers)

    @classmethod
    def of(cls, items: PlanItems, num_layers: int) -> "LayerPlan":
        """A plan from Python's own lists, ranges and slices; negative layers count from the end.

        >>> str(LayerPlan.of([0, 1, slice(0, 2), [2, 0.5, 1.0], -1], 4))
        '[0, 1, 0, 1, [2, 0.5, 1], 3]'

        Raises:
          PlanError: it is none, an item selects nothing, or a layer is out of range; names the item.
        """
        _check_num_layers(num_layers)
        if isinstance(items, tuple) and len(items) == 2 and all(type(item) is int for item in items):
            raise PlanError(
                f"the layer plan is {items}; write {list(items)} for these two layers, or the text "
                f"'({items[0]},{items[1]})' for RYS"
            )
        listed = [items] if isinstance(items, range | slice) else list(items)
        slots = [slot for place, item in enumerate(listed) for slot in _slots_of(item, place, num_layers)]
        return cls(tuple(slots), num_layers)

    @classmethod
    def recorded(cls, spec: str, num_layers: int) -> "LayerPlan":
        """The same of a plan that is recorded in a file: spelled out there, for no file opens another.

        Raises:
          PlanError: `spec` is malformed, or names a file; one line.
        """
        if spec.lstrip().startswith("@"):
            raise PlanError(f"the recorded layer plan is {shown(spec)}: expected the plan itself")
        try:
            return cls.parse(spec, num_layers)
        except PlanError as error:
            reason = str(error).splitlines()[0]
            raise PlanError(f"the recorded layer plan is {shown(spec)}: {reason}") from None

    @classmethod
    def identity(cls, num_layers: int) -> "LayerPlan":
        """The model as trained: every layer once, in order."""
        return cls(tuple(Slot(layer) for layer in range(num_layers)), num_layers)

    def __repr__(self) -> str:
        """What makes it: of a long plan the beginning."""
        spec = str(self)
        spec = spec if len(spec) <= 200 else f"{spec[:200]}..."
        return f"LayerPlan.parse({spec!r}, {self.num_layers})"

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def __str__(self) -> str:
        """The shortest usual spelling: `parse(str(plan), plan.num_layers) == plan`."""
        return self.to_notation("spec")

    def to_notation(self, kind: str) -> str:
        """The plan as `parse` reads it, in a notation: `spec`, `json`, `rys` or `exllama`.

        Raises:
          PlanError: that notation cannot say this plan, or does not exist.
        """
        entries = [(slot.layer, slot.attn_scale, slot.mlp_scale) for slot in self.slots]
        return notations.write(kind, entries, self.num_layers)

    def compose(self, inner: "LayerPlan") -> "LayerPlan":
        """Apply this plan to the slots of `inner`.

        Slot p of the result is `inner.slots[self.slots[p].layer]`, with the scales multiplied.

        Raises:
          PlanError: `self.num_layers != len(inner)`, or a product of scales is not finite in float32.
        """
        if self.num_layers != len(inner):
            raise PlanError(
                f"the outer layer plan is for {self.num_layers} slots but the inner one has {len(inner)}: "
                f"parse the outer one for {len(inner)}"
            )
        return LayerPlan(tuple(_scaled(inner.slots[s.layer], s) for s in self.slots), inner.num_layers)

    def __call__(self, inner: "LayerPlan") -> "LayerPlan":
        """`outer(inner)` is `outer.compose(inner)`."""
        return self.compose(inner)

    def select(self, plan: str | PlanItems) -> "LayerPlan":
        """The plan that `plan` says over the slots of this one: `parse` or `of`, then `compose`.

        >>> str(LayerPlan.parse("0:2,0:2", 4).select("::-1"))
        '1,0,1,0'
        """
        count = len(self)
        outer = LayerPlan.parse(plan, count) if isinstance(plan, str) else LayerPlan.of(plan, count)
        return outer.compose(self)

    def executed(self) -> tuple[Slot, ...]:
        """The slots that compute something, in order. Identity slots cost no compute and no KV cache.

        May be empty: the model is then embedding, final norm and head.
        """
        return tuple(slot for slot in self.slots if not slot.is_identity)

    def arrays(self, capacity: int) -> PlanArrays:
        """The executed slots, padded to `capacity` (= P) with layer 0 at scale 0.

        Raises:
          PlanError: more than `capacity` slots are executed.
        """
        slots = self.executed()
        if len(slots) > capacity:
            raise PlanError(
                f"the layer plan executes {len(slots)} slots but there is room for {capacity}: "
                f"shorten the plan, or load the model with a slot capacity of at least {len(slots)}"
            )
        padding = capacity - len(slots)
        return PlanArrays(
            layer=np.array([s.layer for s in slots] + [0] * padding, np.int32),
            attn_scale=np.array([s.attn_scale for s in slots] + [0.0] * padding, np.float32),
            mlp_scale=np.array([s.mlp_scale for s in slots] + [0.0] * padding, np.float32),
            length=np.array(len(slots), np.int32),
        )


PlanLike: TypeAlias = str | PlanItems | LayerPlan
"""What says a plan: text in any notation, layers in order, or a plan."""


def as_plan(plan: PlanLike | None, base: LayerPlan, name: str = "plan") -> LayerPlan:
    """A plan over the stacked layers.

    Args:
      plan: text or layers count the slots of `base`; a plan is as it is; None is `base` itself.
      base: a plan over the stacked layers.
      name: what the caller calls `plan`, for the error.

    Raises:
      PlanError: it is no plan, or fits neither the slots nor the model.
    """
    if plan is None:
        return base
    if isinstance(plan, LayerPlan):
        if plan.num_layers != base.num_layers:
            raise PlanError(f"the plan is over {plan.num_layers} layers, the model has {base.num_layers}")
        return plan
    if isinstance(plan, bytes | Mapping) or not isinstance(plan, str | slice | Iterable):
        raise refused(
            name, plan, "a text such as '0:8,4:', a list of layers such as [0, 1, 0, 1], or a LayerPlan"
        )
    layers: Any = plan
    return base.select(layers)


def _slots_of(item: Any, place: int, num_layers: int) -> list[Slot]:
    """What an entry of `LayerPlan.of` says."""
    where = f"item {place} of the layer plan, {shown(item)},"
    if isinstance(item, Slot):
        return [_wrapped(item.layer, (item.attn_scale, item.mlp_scale), where, num_layers)]
    if isinstance(item, slice):
        try:
            item = range(num_layers)[item]
        except (TypeError, ValueError) as error:
            raise PlanError(f"{where} is no slice of layers: {error}") from None
    if isinstance(item, range):
        if not item:
            raise PlanError(f"{where} selects no layer: expected some of 0..{num_layers - 1}")
        return [_wrapped(layer, (), where, num_layers) for layer in item]
    layer, *scales = item if isinstance(item, list | tuple) and len(item) == 3 else (item,)
    number = all(isinstance(scale, Real) and not isinstance(scale, bool) for scale in scales)
    if isinstance(layer, bool) or not hasattr(layer, "__index__") or not number:
        raise PlanError(
            f"{where} is no layer: expected an integer, a range or slice, or [layer, attn_scale, mlp_scale]; "
            "RYS and exllamav2 are given as text"
        )
    return [_wrapped(operator.index(layer), scales, where, num_layers)]


def _wrapped(layer: int, scales: Sequence[Any], where: str, num_layers: int) -> Slot:
    if not -num_layers <= layer < num_layers:
        raise PlanError(
            f"{where} is out of range: the model has {num_layers} layers, expected {-num_layers} to "
            f"{num_layers - 1}"
        )
    return Slot(layer % num_layers, *scales)


def _check_num_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise PlanError(f"a layer plan needs a model with layers: expected num_layers >= 1, got {num_layers}")
    if num_layers > MAX_LAYERS:
        raise PlanError(f"a model of {shown(num_layers)} layers: expected at most {MAX_LAYERS}")


def _scaled(inner: Slot, outer: Slot) -> Slot:
    return Slot(inner.layer, inner.attn_scale * outer.attn_scale, inner.mlp_scale * outer.mlp_scale)
