"""mergekit's YAML as it is written: keys, types and positions. What it means is in `recipe.py`.

Grammar of mergekit 0.1.5 (mergekit/config.py), as much of it as `merge_method: passthrough` uses. What else
does something in mergekit is refused by name, what does nothing there is remarked on. Every error says file,
line, column and the path of the key.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import yaml

from jaxchat.errors import UsageError
from jaxchat.files import UnreadableError, read_small_text
from jaxchat.notations import MAX_SLOTS, is_finite, position_of, printable

ADVICE = "run mergekit and load the model it writes"
DTYPES = ("float32", "bfloat16", "float16")

_KEYS = ("merge_method", "slices", "base_model", "dtype", "out_dtype", "tokenizer_source", "parameters")
_OTHER_KEYS = ("models", "modules", "tokenizer")
"""Keys that do something in mergekit and are not read here; every other one does nothing there."""
_SLICE_KEYS = ("sources", "parameters", "base_model", "residual_weight")
_WITHOUT_EFFECT = ("base_model", "residual_weight")
"""Keys of a slice that mergekit reads and passthrough does not use."""


class RecipeError(UsageError):
    """A recipe that cannot be read, or asks for what a layer plan cannot do."""

    def __init__(self, message: str):
        # A name out of a file somebody else wrote must not reach the terminal as control characters.
        super().__init__(printable(message))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where something stands in a recipe: file, line and column from 1, and the path of its key."""

    file: str
    line: int
    column: int
    path: str

    def fail(self, problem: str) -> NoReturn:
        """Raises a `RecipeError` about this place."""
        key = f"{self.path}: " if self.path else ""
        raise RecipeError(f"{self.file}:{self.line}:{self.column}: {key}{problem}")

    def __str__(self) -> str:
        return f"{self.path} (line {self.line})"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One entry of a `scale` setting.

    Attributes:
      filter: a substring of the names of the tensors it is for; None is all.
      values: the scale, or a gradient of them over the layers of a slice.
      place: where it stands.
    """

    filter: str | None
    values: tuple[float, ...]
    place: Place

    def matches(self, tensor: str) -> bool:
        """Whether it is for the tensor of that Hugging Face name."""
        return self.filter is None or self.filter in tensor


@dataclasses.dataclass(frozen=True)
class ModelName:
    """A reference to a model: a path, or a name that the user maps to one."""

    name: str
    place: Place


@dataclasses.dataclass(frozen=True)
class Slice:
    """Layers `first` to `stop - 1` of one model, with the scales of its source and of the slice itself."""

    model: ModelName
    first: int
    stop: int
    source_scale: tuple[Rule, ...]
    slice_scale: tuple[Rule, ...]
    range_place: Place


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe file; the attributes are its keys.

    `tokenizer_source` is None for `base`; `notes` are remarks on keys that have no effect.
    """

    slices: tuple[Slice, ...]
    base_model: ModelName | None
    tokenizer_source: ModelName | None
    dtype: str | None
    out_dtype: str | None
    scale: tuple[Rule, ...]
    notes: tuple[str, ...]


def read(path: Path) -> Recipe:
    """Reads a recipe file.

    Raises:
      RecipeError: there is no such file, it is not YAML, or not a passthrough recipe.
    """
    try:
        text = read_small_text(path)
    except UnreadableError as error:
        raise RecipeError(f"{path}: {error}; give the YAML file of a mergekit recipe") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        Place(str(path), line, column, "").fail(f"not YAML: {error.problem or error.context}")
    except yaml.reader.ReaderError as error:
        line, column = position_of(text, error.position)
        Place(str(path), line, column, "").fail(f"not YAML: {error.reason}")
    except RecursionError:
        Place(str(path), 1, 1, "").fail("not a recipe: nested too deeply")
    notes: list[str] = []
    if root is None:
        raise RecipeError(f"{path}: the file is empty; expected a mergekit recipe")
    return _recipe(_Node(root, str(path), "", notes), notes)


# --- YAML nodes with their positions


class _Node:
    """A YAML node that knows its place; every reader fails with it."""

    def __init__(self, node: yaml.Node, file: str, path: str, notes: list[str]):
        self._node, self._file, self._path, self._notes = node, file, path, notes

    @property
    def place(self) -> Place:
        mark = self._node.start_mark
        return Place(self._file, mark.line + 1, mark.column + 1, self._path)

    def fail(self, problem: str) -> NoReturn:
        self.place.fail(problem)

    def _child(self, node: yaml.Node, step: str) -> "_Node":
        return _Node(node, self._file, f"{self._path}{step}".removeprefix("."), self._notes)

    @property
    def is_list(self) -> bool:
        return isinstance(self._node, yaml.SequenceNode)

    @property
    def is_mapping(self) -> bool:
        return isinstance(self._node, yaml.MappingNode)

    @property
    def is_null(self) -> bool:
        return self._node.tag == "tag:yaml.org,2002:null"

    def note(self, problem: str) -> None:
        """A remark for the user."""
        self._notes.append(f"{self.place}: {problem}")

    def mapping(self, expected: str) -> dict[str, "_Node"]:
        """The values by key; of a key that is there twice the last counts, as in mergekit, with a remark."""
        node = self._node
        if not isinstance(node, yaml.MappingNode):
            self.fail(f"{self.shown}; expected {expected}")
        try:
            yaml.SafeLoader("").flatten_mapping(node)  # `<<: *other`
        except yaml.MarkedYAMLError as error:
            self.fail(f"not YAML: {error.problem}")
        found: dict[str, _Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._child(key, "").fail("a key that is not text; expected " + expected)
            child = self._child(value, f".{key.value}")
            if key.value in found:
                child.note(f"{key.value!r} is given twice; the last one counts, as in mergekit")
            found[key.value] = child
        return found

    def known(self, keys: tuple[str, ...], expected: str) -> dict[str, "_Node"]:
        """`mapping`, with keys from a list; an explicit null counts as absent."""
        found = self.mapping(expected)
        for key, child in found.items():
            if key not in keys:
                child.fail(
                    f"unknown key {key!r}; known here: {', '.join(keys)}. For everything else {ADVICE}"
                )
        return {key: child for key, child in found.items() if not child.is_null}

    def items(self, expected: str) -> "list[_Node]":
        """The entries of a list that is not empty."""
        node = self._node
        if not isinstance(node, yaml.SequenceNode):
            self.fail(f"{self.shown}; expected {expected}")
        if not node.value:
            self.fail(f"the list is empty; expected {expected}")
        return [self._child(child, f"[{number}]") for number, child in enumerate(node.value)]

    def text(self, expected: str) -> str:
        """A string that is not empty."""
        if self._node.tag != "tag:yaml.org,2002:str" or not self._node.value.strip():
            self.fail(f"{self.shown}; expected {expected}")
        return str(self._node.value)

    def integer(self, expected: str) -> int:
        """A whole number."""
        value = self._number("int")
        if value is None:
            self.fail(f"{self.shown}; expected {expected}")
        return int(value)

    def number(self, expected: str) -> float:
        """A number that is finite in float32; `1e-3`, a string in YAML 1.1, is one, as in mergekit."""
        value = self._number("int", "float", "str")
        if value is None or math.isnan(value) or not is_finite(value):
            self.fail(f"{self.shown}; expected {expected}")
        return float(value)

    def _number(self, *tags: str) -> float | None:
        if self._node.tag not in [f"tag:yaml.org,2002:{tag}" for tag in tags]:
            return None
        try:
            value = yaml.SafeLoader("").construct_object(self._node)
            return float(value) if isinstance(value, str) else value
        except (ValueError, OverflowError):
            return None

    @property
    def shown(self) -> str:
        """What is there instead of what was expected."""
        if self.is_list:
            return "found a list"
        if self.is_mapping:
            return "found keys and values"
        text = str(self._node.value)
        return f"found {text[:60] + '...' if len(text) > 60 else text!r}" if text else "found nothing"


# --- the grammar


def _recipe(root: _Node, notes: list[str]) -> Recipe:
    keys = root.mapping("the keys of a mergekit recipe: merge_method, slices and so on")
    method = keys.get("merge_method")
    if method is None:
        root.fail("the key 'merge_method' is missing; expected merge_method: passthrough")
    if method.text("the name of a merge method") != "passthrough":
        method.fail(
            f"merge method {method.text('')!r} computes new weights, which no layer plan can; {ADVICE}. "
            "A recipe is read for passthrough"
        )
    keys = {key: child for key, child in keys.items() if not child.is_null}
    for key, child in keys.items():
        if key in _OTHER_KEYS:
            child.fail(
                f"{key!r} is not supported; known here: {', '.join(_KEYS)}. For everything else {ADVICE}"
            )
        elif key == "chat_template":
            child.note("chat_template is not applied: the chat template is the tokenizer's own")
        elif key not in _KEYS:
            child.note("has no effect, in mergekit as here")
    if "slices" not in keys:
        root.fail("the key 'slices' is missing; expected a list of slices")
    items = keys["slices"].items("a list of slices")
    if len(items) > MAX_SLOTS:  # of one layer each
        keys["slices"].fail(f"found {len(items)} slices; expected at most {MAX_SLOTS}")
    slices = tuple(_slice(item) for item in items)
    tokenizer = keys.get("tokenizer_source")
    if tokenizer is not None and tokenizer.text("base or a model") == "union":
        tokenizer.fail(f"a union of tokenizers needs a new embedding, which no layer plan has; {ADVICE}")
    is_base = tokenizer is None or tokenizer.text("base or a model") == "base"
    return Recipe(
        slices=slices,
        base_model=_model(keys["base_model"]) if "base_model" in keys else None,
        tokenizer_source=None if is_base or tokenizer is None else _model(tokenizer),
        dtype=_dtype(keys.get("dtype")),
        out_dtype=_dtype(keys.get("out_dtype")),
        scale=_scale(keys.get("parameters")),
        notes=tuple(dict.fromkeys(notes)),
    )


def _slice(node: _Node) -> Slice:
    keys = node.known(_SLICE_KEYS, "a slice: sources, and parameters if there are any")
    for key in _WITHOUT_EFFECT:
        if key in keys:
            keys[key].note("has no effect in a passthrough merge, in mergekit as here")
    if "sources" not in keys:
        node.fail("the key 'sources' is missing; expected a list with one source")
    sources = keys["sources"].items("a list with one source")
    if len(sources) > 1:
        sources[1].fail(
            f"{len(sources)} sources in one slice; passthrough takes one: give each its own slice, or "
            f"for a merge of them {ADVICE}"
        )
    source = sources[0].known(("model", "layer_range", "parameters"), "a source: model and layer_range")
    for key in ("model", "layer_range"):
        if key not in source:
            sources[0].fail(f"the key {key!r} is missing; expected model and layer_range")
    first, stop = _layer_range(source["layer_range"])
    return Slice(
        model=_model(source["model"]),
        first=first,
        stop=stop,
        source_scale=_scale(source.get("parameters")),
        slice_scale=_scale(keys.get("parameters")),
        range_place=source["layer_range"].place,
    )


def _layer_range(node: _Node) -> tuple[int, int]:
    expected = "[first, stop], layers first to stop - 1"
    ends = node.items(expected)
    if len(ends) != 2:
        node.fail(f"found {len(ends)} number{'s' * (len(ends) != 1)}; expected {expected}")
    first, stop = (end.integer("a whole number") for end in ends)
    if first < 0 or stop < 0:
        node.fail(f"[{first}, {stop}] has a negative end, and mergekit does not count from the end; "
                  f"expected {expected}")  # fmt: skip
    if first >= stop:
        problem = "holds no layer" if first == stop else "is reversed"
        node.fail(f"[{first}, {stop}] {problem}; expected {expected}")
    return first, stop


def _model(node: _Node) -> ModelName:
    if node.is_mapping:
        node.fail(f"a model with lora or override_architecture is not supported; {ADVICE}")
    return ModelName(node.text("the path or name of a model"), node.place)


def _dtype(node: _Node | None) -> str | None:
    if node is None:
        return None
    name = node.text(f"one of {', '.join(DTYPES)}").removeprefix("torch.")
    if name not in DTYPES:
        node.fail(f"dtype {name!r} is not supported; expected one of {', '.join(DTYPES)}")
    return name


def _scale(parameters: _Node | None) -> tuple[Rule, ...]:
    """The rules of the one parameter that passthrough has."""
    if parameters is None:
        return ()
    keys = parameters.mapping("scale: a number, a list of numbers, or a list of value and filter")
    for key, child in keys.items():
        if key != "scale":
            child.note("has no effect in a passthrough merge, in mergekit as here")
    return () if "scale" not in keys or keys["scale"].is_null else tuple(_rules(keys["scale"]))


def _rules(node: _Node) -> Iterator[Rule]:
    expected = "a number, a list of numbers, or a list of value and filter"
    if node.is_mapping:
        yield _conditional(node)
    elif node.is_list and any(item.is_mapping for item in node.items(expected)):
        yield from (_conditional(item) for item in node.items(expected))
    else:
        yield Rule(None, _values(node), node.place)


def _conditional(node: _Node) -> Rule:
    keys: Mapping[str, _Node] = node.known(("value", "filter"), "value, and filter if not for all tensors")
    if "value" not in keys:
        node.fail("the key 'value' is missing; expected a number or a list of numbers")
    text = keys["filter"].text("a part of tensor names, or *") if "filter" in keys else "*"
    return Rule(None if text == "*" else text, _values(keys["value"]), node.place)


def _values(node: _Node) -> tuple[float, ...]:
    if not node.is_list:
        return (node.number("a number, or a list of numbers for a gradient"),)
    return tuple(item.number("a number") for item in node.items("at least one number"))
