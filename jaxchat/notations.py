"""The spellings of a layer plan: text -> slots, slots -> text. `LayerPlan.parse` and `to_notation` use it.

Layer specs after chatllm.cpp, JSON lists of slots, RYS blocks, exllamav2 ranges, and files that hold one of
them. Knows no model: only how many layers there are. mergekit's YAML is read and written by `recipe.py`.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxchat.errors import UsageError, option
from jaxchat.files import UnreadableError, read_small_text
from jaxchat.visible import shown

Entry = tuple[int, float, float]
"""A slot: (layer, attention scale, MLP scale)."""

MAX_SLOTS = 4096
"""No plan is so long: more is a mistake, and would take minutes to run a token."""

KINDS = ("spec", "json", "rys", "exllama")
"""What `write` can write."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,4000}")  # int() refuses more than 4300 digits with an error of its own
_INCLUSIVE = re.compile(r"([0-9]{1,4000})\.\.([0-9]{1,4000})")
_PAIR = re.compile(r"\(\s*([+-]?[0-9]{1,4000})\s*,\s*([+-]?[0-9]{1,4000})\s*\)")
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_ITEM = "an integer, a slice start:stop[:step] or 'all'"
_ENTRY = "an integer or [layer, attn_scale, mlp_scale]"


class PlanError(UsageError):
    """A layer plan that cannot be read, does not fit the model, or does not fit the room reserved for it."""


class _Culprit(Exception):
    """What is wrong with `text[start:end]`."""

    def __init__(self, start: int, end: int, problem: str):
        super().__init__(problem)
        self.start, self.end, self.problem = start, end, problem


def is_finite(scale: float) -> bool:
    """Whether a scale stays finite as float32, which it runs as. NaN is not."""
    return abs(scale) <= _FLOAT32_MAX


def parse(spec: str, num_layers: int) -> list[Entry]:
    """The slots that a plan in any notation says, see `LayerPlan.parse`.

    Raises:
      PlanError: one line that says what is wrong, then the text with the culprit underlined.
    """
    if spec.lstrip().startswith("@"):
        return _parse_file(spec.strip()[1:], num_layers)
    try:
        return _parse_text(spec, num_layers)
    except _Culprit as culprit:
        raise PlanError(f"{culprit.problem}\n{_underlined(spec, culprit.start, culprit.end)}") from None


def _parse_text(text: str, num_layers: int) -> list[Entry]:
    if not text.strip():
        _fail(0, 0, f"the layer plan is empty: expected {_ITEM}, or a comma-separated list of them")
    entries = list(itertools.islice(_parser_of(text)(text, num_layers), MAX_SLOTS + 1))
    if len(entries) > MAX_SLOTS:
        _fail(0, len(text), f"the layer plan has more than {MAX_SLOTS} slots: expected fewer")
    return entries


def _parser_of(text: str) -> Callable[[str, int], Iterator[Entry]]:
    """The reader of a text; how it begins tells the notations apart."""
    start = text.lstrip()
    if start.startswith("["):
        return _parse_ranges if start[1:].lstrip().startswith("(") else _parse_json
    if start.startswith("("):
        return _parse_repeat
    return _parse_blocks if start.startswith("blocks:") else _parse_items


def _parse_file(name: str, num_layers: int) -> list[Entry]:
    """The plan in a file: any notation, on any number of lines, `#` starts a comment."""
    original = _read_file(name)
    text = re.sub("#[^\n]*", lambda comment: " " * len(comment[0]), original)
    try:
        if text.lstrip().startswith("@"):
            at = text.index("@")
            _fail(at, at + 1, "a plan in a file cannot name another file: expected the plan itself")
        if re.search(r"^\s*(merge_method|slices)\s*:", text, re.MULTILINE):
            raise PlanError(
                f"{name} is a mergekit recipe, not a layer plan: give it with {option('recipe', name)}"
            )
        return _parse_text(text, num_layers)
    except _Culprit as culprit:
        line, column = position_of(text, culprit.start)
        whole = original.split("\n")[line - 1]
        end = min(culprit.end - culprit.start + column - 1, len(whole))
        raise PlanError(
            f"{name}:{line}:{column}: {culprit.problem}\n{_underlined(whole, column - 1, end)}"
        ) from None


def _read_file(name: str) -> str:
    if not name:
        raise PlanError("no file name after @: expected @FILE, a text file that holds a layer plan")
    try:
        return read_small_text(Path(name)).replace("\r\n", "\n")
    except UnreadableError as error:
        raise PlanError(f"@{name}: {error}: expected a text file that holds a layer plan") from None


def position_of(text: str, offset: int) -> tuple[int, int]:
    """Line and column of an offset, both counted from 1."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _fail(start: int, end: int, problem: str) -> NoReturn:
    raise _Culprit(start, end, problem)


def printable(text: str) -> str:
    """The text with blanks for line breaks and control characters."""
    return "".join(char if char.isprintable() else " " for char in text)


def _underlined(text: str, start: int, end: int) -> str:
    """Two lines: what is around `text[start:end]`, and a mark under that."""
    first = max(0, start - _AROUND)
    last = min(len(text), min(end, start + _AROUND) + _AROUND)
    before, after = "..." * (first > 0), "..." * (last < len(text))
    mark = "^" + "~" * (min(end, last) - start - 1)
    return f"{before}{printable(text[first:last])}{after}\n{' ' * (len(before) + start - first)}{mark}"


_AROUND = 60


# --- layer specs: items between commas. A span is (start, end) in the text, so that errors can underline it.


def _split(text: str, start: int, end: int, separator: str) -> Iterator[tuple[int, int]]:
    """Spans between separators, without the blanks around them (a blank span stays as it is)."""
    position = start
    for part in text[start:end].split(separator):
        left = position + len(part) - len(part.lstrip())
        right = position + len(part.rstrip())
        yield (left, right) if left < right else (position, position + len(part))
        position += len(part) + 1


def _parse_items(text: str, num_layers: int) -> Iterator[Entry]:
    blanks = len(text) - len(text.lstrip())
    start = blanks + len("layers:") if text[blanks:].startswith("layers:") else 0  # RYS's prefix
    for left, right in _split(text, start, len(text), ","):
        for layer in _parse_item(text, left, right, num_layers):
            yield layer, 1.0, 1.0


def _parse_item(text: str, start: int, end: int, num_layers: int) -> Sequence[int]:
    item = text[start:end]
    if not item.strip():
        _fail(start, end, f"empty item in the layer plan: expected {_ITEM} here, or no comma")
    if item == "all":
        return range(num_layers)
    if ":" in item:
        return _parse_slice(text, start, end, num_layers)
    if inclusive := _INCLUSIVE.fullmatch(item):  # llm-circuit-finder's, both ends included
        first, last = (int(end) for end in inclusive.groups())
        return _range(start, end, item, first, last + 1, num_layers, f"first..last in 0..{num_layers - 1}")
    if not _INTEGER.fullmatch(item):
        _fail(start, end, f"cannot read {shown(item)} in the layer plan: expected {_ITEM}")
    return [_wrapped(start, end, int(item), num_layers)]


def _parse_slice(text: str, start: int, end: int, num_layers: int) -> range:
    fields = list(_split(text, start, end, ":"))
    if len(fields) > 3:
        _fail(fields[3][0], end, "too many fields in the slice: expected start:stop[:step]")
    values: list[int | None] = []
    for left, right in fields:
        field = text[left:right].strip()
        if field and not _INTEGER.fullmatch(field):
            _fail(left, right, f"cannot read {shown(field)} in the slice: expected an integer or nothing")
        values.append(int(field) if field else None)
    bounds = slice(*values)
    if bounds.step == 0:
        _fail(*fields[2], "the step of a slice cannot be 0: expected a positive or negative integer")
    layers = range(num_layers)[bounds]
    if not layers:
        item = text[start:end]
        _fail(start, end, f"{shown(item)} selects no layer: expected a slice of 0..{num_layers - 1}")
    return layers


def _wrapped(start: int, end: int, layer: int, num_layers: int) -> int:
    if not -num_layers <= layer < num_layers:
        expected = f"the model has {num_layers} layers, expected {-num_layers} to {num_layers - 1}"
        _fail(start, end, f"layer {shown(layer)} is out of range: {expected}")
    return layer % num_layers


def _range(start: int, end: int, text: str, first: int, stop: int, num_layers: int, expected: str) -> range:
    """`range(first, stop)`, which must lie in the model and hold a layer; `text` is its spelling."""
    if first < 0 or stop < 0:
        _fail(start, end, f"{shown(text)} has a negative end: expected {expected}")
    if first >= stop:
        problem = "is empty" if first == stop else "is reversed"
        _fail(start, end, f"{shown(text)} {problem}: expected {expected}")
    if stop > num_layers:
        _fail(
            start,
            end,
            f"{shown(text)} is out of range: the model has {num_layers} layers, expected {expected}",
        )
    return range(first, stop)


# --- RYS: blocks of layers run once more (dnhkng, "LLM Neuroanatomy"; RYS's src/core/layer_config.py)


def _parse_repeat(text: str, num_layers: int) -> Iterator[Entry]:
    """`(i,j)`: layers 0 to j-1, then i to L-1."""
    start = text.index("(")
    found = _PAIR.match(text, start)
    if not found:
        _fail(start, len(text.rstrip()), "cannot read the RYS repeat: expected (i,j), e.g. (4,8)")
    rest = _skip_blanks(text, found.end())
    if text[rest : rest + 1] == ",":
        pairs = [f"{i},{j}" for i, j in _PAIR.findall(text)]
        ranges = ",".join(f"({pair})" for pair in pairs)
        _fail(
            rest,
            len(text.rstrip()),
            f"more than one pair: expected [{ranges}] for ranges that run one after the other, or "
            f"blocks:{';'.join(pairs)} for blocks that run twice",
        )
    _expect_end(text, rest)
    return _repeated([_block(found, num_layers)], num_layers)


def _parse_blocks(text: str, num_layers: int) -> Iterator[Entry]:
    """`blocks:i,j;k,l`: each block in turn is run once more, after the last time its last layer runs."""
    blocks = []
    for start, end in _split(text, text.index(":") + 1, len(text), ";"):
        # In parentheses it is the pair that (i,j) is; blanks around it were cut off.
        found = re.compile(r"([+-]?[0-9]{1,4000})\s*,\s*([+-]?[0-9]{1,4000})").fullmatch(text, start, end)
        if not found:
            _fail(
                start, end, f"cannot read {shown(text[start:end])} in the RYS blocks: expected i,j, e.g. 4,8"
            )
        blocks.append(_block(found, num_layers))
    return _repeated(blocks, num_layers)


def _block(found: re.Match[str], num_layers: int) -> range:
    first, stop = int(found[1]), int(found[2])
    if first == stop == 0:  # RYS's name for the model as it is
        return range(0)
    expected = f"0 <= i < j <= {num_layers}"
    return _range(found.start(), found.end(), found[0], first, stop, num_layers, expected)


def _repeated(blocks: Sequence[range], num_layers: int) -> Iterator[Entry]:
    layers = list(range(num_layers))
    for block in blocks:
        if len(layers) > MAX_SLOTS:
            break  # which `_parse_text` refuses
        if block:
            after = len(layers) - layers[::-1].index(block[-1])
            layers[after:after] = block
    return ((layer, 1.0, 1.0) for layer in layers)


# --- exllamav2: half-open ranges that run one after the other, the last one on to the end of the model
# (turboderp-org/exllamav2, pull request 275: what lies behind the last range is always run)


def _parse_ranges(text: str, num_layers: int) -> Iterator[Entry]:
    position, stop = _skip_blanks(text, text.index("[") + 1), num_layers
    while text[position : position + 1] != "]":
        found = _PAIR.match(text, position)
        if not found:
            _fail(position, position, "cannot read the list of ranges here: expected (start,stop)")
        expected = f"0 <= start < stop <= {num_layers}"
        first, stop = int(found[1]), int(found[2])
        for layer in _range(found.start(), found.end(), found[0], first, stop, num_layers, expected):
            yield layer, 1.0, 1.0
        position = _skip_blanks(text, found.end())
        if text[position : position + 1] not in (",", "]"):
            _fail(position, position, "cannot read the list of ranges here: expected ',' or ']'")
        if text[position] == ",":
            position = _skip_blanks(text, position + 1)
    _expect_end(text, _skip_blanks(text, position + 1))
    for layer in range(stop, num_layers):
        yield layer, 1.0, 1.0


# --- JSON: layers, and slots with scales


def _parse_json(text: str, num_layers: int) -> Iterator[Entry]:
    """Slots of a JSON list, entry by entry so that an error can underline its entry."""
    decoder = json.JSONDecoder()
    position = _skip_blanks(text, text.index("[") + 1)
    while True:
        try:
            entry, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
            _fail(position, position, f"cannot read the list of the layer plan here: expected {_ENTRY}")
        yield _parse_entry(text, position, end, entry, num_layers)
        position = _skip_blanks(text, end)
        if text[position : position + 1] not in (",", "]"):
            _fail(position, position, "cannot read the list of the layer plan here: expected ',' or ']'")
        if text[position] == "]":
            break
        position = _skip_blanks(text, position + 1)
    _expect_end(text, _skip_blanks(text, position + 1))


def _parse_entry(text: str, start: int, end: int, entry: Any, num_layers: int) -> Entry:
    if isinstance(entry, list) and len(entry) not in (0, 3) and type(entry[0]) is int:
        _fail(start, end, f"a slot has {len(entry)} values, {shown(text[start:end])}: expected {_ENTRY}")
    layer, *scales = entry if isinstance(entry, list) and len(entry) == 3 else (entry,)
    if type(layer) is not int or not all(type(scale) in (int, float) for scale in scales):  # bool is an int
        _fail(start, end, f"cannot read {shown(text[start:end])} in the layer plan: expected {_ENTRY}")
    layer = _wrapped(start, end, layer, num_layers)
    if not all(map(is_finite, scales)):
        _fail(start, end, "a scale is not finite: expected numbers that are finite in float32")
    attn_scale, mlp_scale = map(float, scales or (1, 1))
    return layer, attn_scale, mlp_scale


def _skip_blanks(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip())


def _expect_end(text: str, position: int) -> None:
    if position < len(text):
        closing = text[:position].rstrip()[-1]
        problem = f"text after the list of the layer plan: expected nothing after {closing!r}"
        _fail(position, len(text.rstrip()), problem)


# --- writing


def write(kind: str, entries: Sequence[Entry], num_layers: int) -> str:
    """Slots in a notation of `KINDS`, which `parse` reads back to the same slots.

    Raises:
      PlanError: the notation cannot say this plan (the message says why), or is not of `KINDS`.
    """
    writers = {"spec": to_spec, "json": _to_json, "rys": _to_rys, "exllama": _to_ranges}
    if kind not in writers:
        raise PlanError(f"no notation is called {kind!r}: expected one of {', '.join(KINDS)}")
    return writers[kind](entries, num_layers)


def to_spec(entries: Sequence[Entry], num_layers: int) -> str:
    """The shortest usual spelling; with scales that is the JSON list."""
    if not _is_plain(entries):
        return _to_json(entries, num_layers)
    layers = [layer for layer, *_ in entries]
    return "all" if layers == list(range(num_layers)) else ",".join(_runs(layers))


def _to_json(entries: Sequence[Entry], num_layers: int) -> str:
    return json.dumps([layer if scales == [1, 1] else [layer, *scales] for layer, *scales in entries])


def _to_rys(entries: Sequence[Entry], num_layers: int) -> str:
    runs = _ranges(_layers_without_scales(entries, "RYS blocks"))
    if runs[0].start != 0 or runs[-1].stop != num_layers:
        raise PlanError(
            f"not a RYS repeat: the plan runs from layer {runs[0].start} to {runs[-1].stop - 1}, a repeat "
            f"from 0 to {num_layers - 1}; write it as spec"
        )
    blocks = []
    for run, following in itertools.pairwise(runs):
        if following.start > run.stop:
            raise PlanError(
                f"not a RYS repeat: the plan goes from layer {run.stop - 1} to {following.start}, a repeat "
                "leaves no layer out; write it as spec"
            )
        blocks.append(f"{following.start},{run.stop}")
    if len(blocks) > 1:
        return "blocks:" + ";".join(blocks)
    return f"({blocks[0] if blocks else '0,0'})"


def _to_ranges(entries: Sequence[Entry], num_layers: int) -> str:
    runs = _ranges(_layers_without_scales(entries, "exllamav2 ranges"))
    if runs[-1].stop != num_layers:
        raise PlanError(
            f"exllamav2 ranges run on to the last layer, {num_layers - 1}, and the plan ends with layer "
            f"{runs[-1].stop - 1}; write it as spec"
        )
    return "[" + ",".join(f"({run.start},{run.stop})" for run in runs) + "]"


def _is_plain(entries: Sequence[Entry]) -> bool:
    return all(scales == [1, 1] for _, *scales in entries)


def _layers_without_scales(entries: Sequence[Entry], notation: str) -> list[int]:
    for slot, (layer, *scales) in enumerate(entries):
        if scales != [1, 1]:
            raise PlanError(
                f"{notation} cannot say scales, and slot {slot} (layer {layer}) has {scales[0]:g} and "
                f"{scales[1]:g}; write the plan as json or mergekit"
            )
    return [layer for layer, *_ in entries]


def _ranges(layers: Sequence[int]) -> list[range]:
    """Maximal ranges with step 1: [0, 1, 2, 1, 5] -> 0..2, 1, 5."""
    runs = [range(layers[0], layers[0] + 1)]
    for layer in layers[1:]:
        if layer == runs[-1].stop:
            runs[-1] = range(runs[-1].start, layer + 1)
        else:
            runs.append(range(layer, layer + 1))
    return runs


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
