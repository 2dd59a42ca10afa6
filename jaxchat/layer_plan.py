"""Layer plans: which source layer each executed block uses, as data. Parse, print, check, compose, to arrays.

Nothing here knows a model or JAX: a plan needs only the number of stacked layers `L`.
`L` stacked source layers · `P` plan slots.
"""

import json
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jaxchat.errors import UsageError

_INTEGER = re.compile(r"[+-]?[0-9]{1,4000}")  # int() refuses more than 4300 digits with an error of its own
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_ITEM = "an integer, a slice start:stop[:step] or 'all'"
_ENTRY = "an integer or [layer, attn_scale, mlp_scale]"


class PlanError(UsageError):
    """A layer plan that cannot be read, does not fit the model, or does not fit the room reserved for it."""


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

    @property
    def is_identity(self) -> bool:
        """Whether the block passes its input through unchanged."""
        return self.attn_scale == 0.0 and self.mlp_scale == 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the block is the source layer as trained."""
        return self.attn_scale == 1.0 and self.mlp_scale == 1.0


class PlanArrays(NamedTuple):
    """The executed slots of a plan as arrays of a fixed size, so that every plan runs in one executable."""

    layer: np.ndarray  # int32 [P], padded with 0
    attn_scale: np.ndarray  # float32 [P], padded with 0
    mlp_scale: np.ndarray  # float32 [P], padded with 0
    length: np.ndarray  # int32 [], how many slots are executed


@dataclass(frozen=True)
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
        for position, slot in enumerate(self.slots):
            if not 0 <= slot.layer < self.num_layers:
                raise PlanError(
                    f"slot {position} of the layer plan uses layer {slot.layer}: "
                    f"expected 0 to {self.num_layers - 1}"
                )
            for name, scale in (("attn_scale", slot.attn_scale), ("mlp_scale", slot.mlp_scale)):
                if not _is_finite(scale):
                    raise PlanError(
                        f"slot {position} of the layer plan has {name} {scale!r}: "
                        "expected a number that is finite in float32"
                    )

    @classmethod
    def parse(cls, spec: str, num_layers: int) -> "LayerPlan":
        """Read a plan for a model of `num_layers` layers.

        `spec` is a comma-separated list of layers and slices over `0..num_layers-1`, as in chatllm.cpp's
        `--layer_spec` but with exactly Python's meaning: ends are clamped, negative numbers count from the
        end, `::-1` reverses; `all` is every layer. Or it is a JSON list of layers and of
        `[layer, attn_scale, mlp_scale]`:

            "0:8,4:12,8:"           0..7, 4..11, 8..L-1
            "0:10, 10:20:2, -1"     0..9, 10 12 14 16 18, L-1
            "[0, [1, 0.0, 1.0], 2]" layer 1 without its attention

        Raises:
          PlanError: `spec` is malformed, an item selects nothing, or a layer is out of range. The message is
            one line, then the spec with the culprit underlined.
        """
        _check_num_layers(num_layers)
        if not spec.strip():
            _fail(spec, 0, 0, f"the layer plan is empty: expected {_ITEM}, or a comma-separated list of them")
        parse_slots = _parse_json if spec.lstrip().startswith("[") else _parse_items
        return cls(tuple(parse_slots(spec, num_layers)), num_layers)

    @classmethod
    def identity(cls, num_layers: int) -> "LayerPlan":
        """The model as trained: every layer once, in order."""
        return cls(tuple(Slot(layer) for layer in range(num_layers)), num_layers)

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def __str__(self) -> str:
        """The shortest usual spelling: `parse(str(plan), plan.num_layers) == plan`."""
        if not all(slot.is_plain for slot in self.slots):
            entries = [s.layer if s.is_plain else [s.layer, s.attn_scale, s.mlp_scale] for s in self.slots]
            return json.dumps(entries)
        layers = [slot.layer for slot in self.slots]
        if layers == list(range(self.num_layers)):
            return "all"
        return ",".join(_runs(layers))

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


def _check_num_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise PlanError(f"a layer plan needs a model with layers: expected num_layers >= 1, got {num_layers}")


def _is_finite(scale: float) -> bool:
    # Scales run as float32: a larger number would become inf there. NaN compares false.
    return abs(scale) <= _FLOAT32_MAX


def _scaled(inner: Slot, outer: Slot) -> Slot:
    return Slot(inner.layer, inner.attn_scale * outer.attn_scale, inner.mlp_scale * outer.mlp_scale)


# --- printing


def _runs(layers: Sequence[int]) -> Iterator[str]:
    """Spell `layers` as items: [0, 1, 2, 3, 9, 8, 7, 5, 5] -> "0:4" "9:6:-1" "5" "5"."""
    start = 0
    while start < len(layers):
        length = _run_length(layers, start)
        if length < 3:  # two layers are as short written out, and clearer
            yield str(layers[start])
            start += 1
            continue
        step = layers[start + 1] - layers[start]
        stop = layers[start + length - 1] + (1 if step > 0 else -1)
        # A stop of -1 would count from the end: the way down to layer 0 is an open end.
        yield f"{layers[start]}:{stop if stop >= 0 else ''}" + (f":{step}" if step != 1 else "")
        start += length


def _run_length(layers: Sequence[int], start: int) -> int:
    """How many of `layers[start:]` keep one constant, non-zero distance."""
    end = start + 1
    while end < len(layers):
        step = layers[end] - layers[end - 1]
        if step == 0 or step != layers[start + 1] - layers[start]:
            break
        end += 1
    return end - start


# --- parsing. A span is (start, end) in the spec, kept so that an error can underline it.


def _fail(spec: str, start: int, end: int, problem: str) -> NoReturn:
    shown = "".join(char if char.isprintable() else " " for char in spec)
    underline = " " * start + "^" + "~" * (end - start - 1)
    raise PlanError(f"{problem}\n{shown}\n{underline}")


def _split(spec: str, start: int, end: int, separator: str) -> Iterator[tuple[int, int]]:
    """Spans between separators, without the blanks around them (a blank span stays as it is)."""
    position = start
    for part in spec[start:end].split(separator):
        left = position + len(part) - len(part.lstrip())
        right = position + len(part.rstrip())
        yield (left, right) if left < right else (position, position + len(part))
        position += len(part) + 1


def _parse_items(spec: str, num_layers: int) -> Iterator[Slot]:
    for start, end in _split(spec, 0, len(spec), ","):
        for layer in _parse_item(spec, start, end, num_layers):
            yield Slot(layer)


def _parse_item(spec: str, start: int, end: int, num_layers: int) -> Sequence[int]:
    item = spec[start:end]
    if not item.strip():
        _fail(spec, start, end, f"empty item in the layer plan: expected {_ITEM} here, or no comma")
    if item == "all":
        return range(num_layers)
    if ":" in item:
        return _parse_slice(spec, start, end, num_layers)
    if not _INTEGER.fullmatch(item):
        _fail(spec, start, end, f"cannot read {item!r} in the layer plan: expected {_ITEM}")
    return [_wrapped(spec, start, end, int(item), num_layers)]


def _parse_slice(spec: str, start: int, end: int, num_layers: int) -> range:
    fields = list(_split(spec, start, end, ":"))
    if len(fields) > 3:
        _fail(spec, fields[3][0], end, "too many fields in the slice: expected start:stop[:step]")
    values: list[int | None] = []
    for left, right in fields:
        field = spec[left:right].strip()
        if field and not _INTEGER.fullmatch(field):
            _fail(spec, left, right, f"cannot read {field!r} in the slice: expected an integer or nothing")
        values.append(int(field) if field else None)
    bounds = slice(*values)
    if bounds.step == 0:
        _fail(spec, *fields[2], "the step of a slice cannot be 0: expected a positive or negative integer")
    layers = range(num_layers)[bounds]
    if not layers:
        item = spec[start:end]
        _fail(spec, start, end, f"{item!r} selects no layer: expected a slice of 0..{num_layers - 1}")
    return layers


def _wrapped(spec: str, start: int, end: int, layer: int, num_layers: int) -> int:
    if not -num_layers <= layer < num_layers:
        expected = f"the model has {num_layers} layers, expected {-num_layers} to {num_layers - 1}"
        _fail(spec, start, end, f"layer {layer} is out of range: {expected}")
    return layer % num_layers


def _parse_json(spec: str, num_layers: int) -> Iterator[Slot]:
    """Slots of a JSON list, entry by entry so that an error can underline its entry."""
    decoder = json.JSONDecoder()
    position = _skip_blanks(spec, spec.index("[") + 1)
    while True:
        try:
            entry, end = decoder.raw_decode(spec, position)
        except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
            _fail(spec, position, position, f"cannot read the list of the layer plan here: expected {_ENTRY}")
        yield _parse_entry(spec, position, end, entry, num_layers)
        position = _skip_blanks(spec, end)
        if spec[position : position + 1] not in (",", "]"):
            _fail(
                spec, position, position, "cannot read the list of the layer plan here: expected ',' or ']'"
            )
        if spec[position] == "]":
            break
        position = _skip_blanks(spec, position + 1)
    rest = _skip_blanks(spec, position + 1)
    if rest < len(spec):
        _fail(
            spec,
            rest,
            len(spec.rstrip()),
            "text after the list of the layer plan: expected nothing after ']'",
        )


def _skip_blanks(spec: str, position: int) -> int:
    return len(spec) - len(spec[position:].lstrip())


def _parse_entry(spec: str, start: int, end: int, entry: Any, num_layers: int) -> Slot:
    layer, *scales = entry if isinstance(entry, list) and len(entry) == 3 else (entry,)
    if type(layer) is not int or not all(type(scale) in (int, float) for scale in scales):  # bool is an int
        _fail(spec, start, end, f"cannot read {spec[start:end]!r} in the layer plan: expected {_ENTRY}")
    layer = _wrapped(spec, start, end, layer, num_layers)
    if not all(map(_is_finite, scales)):
        _fail(spec, start, end, "a scale is not finite: expected numbers that are finite in float32")
    return Slot(layer, *scales)
