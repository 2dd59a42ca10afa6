"""What the layers of a model do, measured on a text: which plans to evaluate, and what they amount to.

The arithmetic is `sweep.py`'s, files are `report.py`'s.
"""

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxchat.analysis import compared, contributions
from jaxchat.analysis.compared import Compared
from jaxchat.analysis.contributions import Contributions
from jaxchat.analysis.questions import Questions
from jaxchat.analysis.sweep import Sweep, Windows, windows_at_once
from jaxchat.engine.session import Engine
from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.layer_plan import LayerPlan, Slot, as_plan
from jaxchat.visible import shown

HALVES = ("attention", "mlp", "both")
"""What of a slot is skipped."""


@dataclasses.dataclass(frozen=True)
class Lens:
    """What the final norm and head read at each slot, at N positions of the first window.

    Attributes:
      positions: N positions in the window.
      inputs: the N tokens there.
      targets: the tokens that follow them; None after the window's last.
      ids: int32 [P + 1, N, k], the most probable next tokens before each slot, and after the last.
      logprobs: float32 [P + 1, N, k], their log-probabilities.
    """

    positions: list[int]
    inputs: list[int]
    targets: list[int | None]
    ids: np.ndarray
    logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What was measured. Perplexities are exp(nats per token); a plan whose logits are not finite has NaN.

    Attributes:
      plan: the base plan, executed slots only.
      predicted: how many tokens the figures are means over.
      windows: how many windows they came in.
      base: nats per token under the base plan.
      influence: Block Influence, float64 [P]: mean over tokens of 1 - cos(input, output); None if not asked.
      angular: angular distance between slots at the windows' last tokens, float64 [P + 1, P + 1].
      skip: half -> nats per token without it, float64 [P]; empty if not asked.
      rys: (i, j) -> nats per token with the slots i to j - 1 run twice.
      rys_total: how many (i, j) there are.
      lens_nats: nats per token read before each slot and after the last, float64 [P + 1].
      lens: None if not asked.
      contributions: of the halves of each slot; None if not asked.
      compared: other plans against this one, token by token.
    """

    plan: LayerPlan
    predicted: int
    windows: int
    base: float
    influence: np.ndarray | None
    angular: np.ndarray | None
    skip: dict[str, np.ndarray]
    rys: dict[tuple[int, int], float]
    rys_total: int
    lens_nats: np.ndarray | None
    lens: Lens | None
    contributions: Contributions | None = None
    compared: tuple[Compared, ...] = ()

    def ratio(self, nats: float) -> float:
        """The perplexity at `nats` per token, in units of the base plan's."""
        return perplexity(nats - self.base)

    def improves(self, nats: float) -> bool:
        """Whether `nats` per token are so much less than the base plan's that four digits show it."""
        return self.ratio(nats) < 1 - 5e-4

    def best_repeats(self) -> list[tuple[int, int]]:
        """The RYS (i, j) from the best on; those that are not finite are left out."""
        known = [(nats, pair) for pair, nats in self.rys.items() if not math.isnan(nats)]
        return [pair for _, pair in sorted(known)]

    def ranking(self) -> list[int]:
        """Slots from the most to the least important.

        By the perplexity without them if that was measured, NaN first; otherwise by their influence.
        """
        values = self.skip.get("both", self.influence)
        if values is None:
            return []
        return sorted(range(len(self.plan)), key=lambda slot: -_nan_as_most(float(values[slot])))


def perplexity(nats: float) -> float:
    """exp(nats), infinite where that is beyond a float."""
    return math.exp(nats) if nats < 709 or math.isnan(nats) else math.inf


# --- the plans


def skipped(plan: LayerPlan, slot: int, half: str) -> LayerPlan:
    """A plan without one slot's `attention` or `mlp`, or `both`."""
    slots = list(plan.slots)
    attn = slots[slot].attn_scale if half == "mlp" else 0.0
    mlp = slots[slot].mlp_scale if half == "attention" else 0.0
    slots[slot] = Slot(slots[slot].layer, attn, mlp)
    return LayerPlan(tuple(slots), plan.num_layers)


def repeated(plan: LayerPlan, i: int, j: int) -> LayerPlan:
    """A plan with its slots i to j - 1 run twice: slots 0 to j - 1, then i to the end (RYS)."""
    return LayerPlan((*plan.slots[:j], *plan.slots[i:]), plan.num_layers)


def repeats(slots: int, sample: int | None = None, seed: int = 0) -> list[tuple[int, int]]:
    """Every RYS (i, j), 0 <= i < j <= slots, or so many of them drawn at random, in order."""
    pairs = [(i, j) for i in range(slots) for j in range(i + 1, slots + 1)]
    if sample is None or sample >= len(pairs):
        return pairs
    return sorted(random.Random(seed).sample(pairs, sample))


# --- measuring


class KnownResultError(JaxchatError):
    """What is called known already is not what would be measured."""


class _Task(NamedTuple):
    """One quantity of a group of windows: its name in the results, how to get it, and its numbers' shape.

    The first so many numbers of it, or lists of them, are token ids, below `vocabulary`.
    """

    name: str
    measure: Callable[[Sweep], Any]
    shape: tuple[int, ...] = ()
    ids: int = 0
    vocabulary: int = 0


def analyze(
    engine: Engine,
    plan: LayerPlan,
    windows: Windows,
    questions: Questions | None = None,
    *,
    compare: Sequence[LayerPlan] = (),
    batch: int | None = None,
    results: MutableMapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Measures what the slots of a plan do on a text.

    Args:
      engine: the model.
      plan: the base plan; slots that compute nothing are left out.
      windows: the text.
      questions: what to measure; default everything.
      compare: plans to compare with the base plan token by token, of any length.
      batch: windows read together; default as many as `windows_at_once` says.
      results: what is known already, by name; filled as the measuring goes on. JSON values.
      progress: called with how many of how many quantities are known.

    Raises:
      UsageError: a question or a window does not fit the model.
      KnownResultError: `results` holds something else than results.
      JaxchatError: the base plan's logits are not finite.
    """
    questions = questions or Questions()
    results = {} if results is None else results
    if not plan.executed():
        raise UsageError("the layer plan executes no slot; there is nothing to analyze")
    if not 1 <= questions.top_k <= engine.config.vocab_size:
        raise UsageError(f"{option('top_k')} is {questions.top_k}; expected 1 to {engine.config.vocab_size}")
    for other in compare:
        as_plan(other, plan)
    base = LayerPlan(plan.executed(), plan.num_layers)
    pairs = repeats(len(base), questions.rys_sample, questions.seed)
    pairs = pairs if "rys" in questions.parts else []
    positions = _positions(windows, questions) if "lens" in questions.parts else []
    at_once = min(batch, len(windows.lengths)) if batch else windows_at_once(engine, base, windows)
    groups = _groups(windows, at_once)
    tasks = _tasks(base, questions, pairs)
    lens = _lens_task(engine, base, questions, positions)
    todo = [
        [
            *tasks,
            *([lens] if positions and not number else []),
            *(_comparison(other, group, questions.top_k, engine.config.vocab_size) for other in compare),
        ]
        for number, group in enumerate(groups)
    ]
    # Twice the slots: the longest repeat is the whole model repeated.
    room = max(2 * len(base), *(len(other.executed()) for other in compare), 0)
    _measure(engine, base, groups, todo, results, progress, room)
    known = [_of_group(results, number) for number in range(len(groups))]
    return _summary(base, windows, questions, pairs, positions, compare, known)


def _of_group(results: Mapping[str, Any], number: int) -> Callable[[str], Any]:
    """The results of one group of windows, by name."""
    return lambda name: results[f"{number} {name}"]


def _groups(windows: Windows, batch: int) -> list[Windows]:
    """Windows in groups of one size, the last padded with empty ones."""
    padding = -len(windows.lengths) % batch
    tokens = np.pad(windows.tokens, ((0, padding), (0, 0)))
    lengths = np.pad(windows.lengths, (0, padding))
    starts = range(0, len(lengths), batch)
    return [Windows(tokens[start : start + batch], lengths[start : start + batch]) for start in starts]


def _positions(windows: Windows, questions: Questions) -> list[int]:
    positions = list(range(int(windows.lengths[0]))[slice(*questions.lens_positions)])
    if not positions:
        raise UsageError(
            f"{option('lens_positions')} selects none of the first window's {windows.lengths[0]} tokens; "
            "give a slice START:STOP, e.g. -12:"
        )
    return positions


def _tasks(base: LayerPlan, questions: Questions, pairs: Sequence[tuple[int, int]]) -> list[_Task]:
    """What to measure on every group of windows; first the base plan."""

    def nats(name: str, plan: LayerPlan) -> _Task:
        return _Task(name, lambda sweep: float(sweep.nats(plan).sum()))

    def lens_nats(slots: int) -> _Task:
        return _Task(f"lens {slots}", lambda sweep: float(sweep.lens_nats(slots).sum()))

    tasks = [nats("base", base)]
    if "influence" in questions.parts:
        tasks.append(_Task("influence", lambda sweep: sweep.influence().sum(1).tolist(), (len(base),)))
    if "angular" in questions.parts:
        tasks.append(_Task("angular", _angular, (len(base) + 1, len(base) + 1)))
    if "lens" in questions.parts:
        tasks += [lens_nats(slots) for slots in range(len(base) + 1)]
    if "skip" in questions.parts:
        tasks += [
            nats(f"skip {half} {slot}", skipped(base, slot, half))
            for slot in range(len(base))
            for half in HALVES
        ]
    if "halves" in questions.parts:
        tasks.append(_Task("halves", contributions.sums, contributions.shape(len(base))))
    return tasks + [nats(f"rys {i} {j}", repeated(base, i, j)) for i, j in pairs]


def _comparison(plan: LayerPlan, windows: Windows, k: int, vocabulary: int) -> _Task:
    measure = functools.partial(compared.numbers, plan=plan, k=k)
    return _Task(_comparison_name(plan, k), measure, compared.shape(windows, k), 2 * k, vocabulary)


def _comparison_name(plan: LayerPlan, k: int) -> str:
    return f"compare {plan} top {k}"


def _angular(sweep: Sweep) -> list[list[float]]:
    return sweep.angular()[sweep.windows.lengths > 0].sum(0).tolist()


def _lens_task(engine: Engine, base: LayerPlan, questions: Questions, positions: Sequence[int]) -> _Task:
    def measure(sweep: Sweep) -> list[Any]:
        return [part.tolist() for part in sweep.lens(0, positions, questions.top_k)]

    shape = (2, len(base) + 1, len(positions), questions.top_k)
    return _Task(_lens_name(questions, positions), measure, shape, 1, engine.config.vocab_size)


def _lens_name(questions: Questions, positions: Sequence[int]) -> str:
    return f"lens top {questions.top_k} at {list(positions)}"


def _measure(
    engine: Engine,
    base: LayerPlan,
    groups: Sequence[Windows],
    todo: Sequence[Sequence[_Task]],
    results: MutableMapping[str, Any],
    progress: Callable[[int, int], None] | None,
    room: int,
) -> None:
    """Fills in what is missing from the results, group by group."""
    total = sum(map(len, todo))
    done = sum(key in results for key in _keys(todo))
    for number, (windows, tasks) in enumerate(zip(groups, todo, strict=True)):
        sweep = None
        for task in tasks:
            key = f"{number} {task.name}"
            if key in results:
                _check_known(key, results[key], task)
                continue
            if progress:
                progress(done, total)
            sweep = sweep or Sweep(engine, base, windows, max_slots=room)
            results[key] = task.measure(sweep)
            if task.name == "base" and not math.isfinite(results[key]):
                raise JaxchatError(
                    "the model's logits are not finite (NaN or infinity): the checkpoint is broken "
                    "or the dtype too narrow; try " + option("dtype", "float32")
                )
            done += 1
    if progress:
        progress(done, total)


def _check_known(name: str, value: Any, task: _Task) -> None:
    expected = f"numbers of the shape {list(task.shape)}"
    try:
        found = np.asarray(value, np.float64)
    except (ValueError, TypeError, OverflowError):
        raise KnownResultError(f"the result {name!r} is {shown(value)}; expected {expected}") from None
    if found.shape != task.shape:
        raise KnownResultError(f"the result {name!r} has the shape {list(found.shape)}; expected {expected}")
    if task.ids:
        ids = found[: task.ids]
        wrong = ids[~((ids >= 0) & (ids < task.vocabulary) & (ids == np.floor(ids)))]
        if wrong.size:
            raise KnownResultError(
                f"the result {name!r} has the token id {wrong[0]:g}; expected some of 0 to "
                f"{task.vocabulary - 1}"
            )


def _keys(todo: Sequence[Sequence[_Task]]) -> Iterator[str]:
    return (f"{number} {task.name}" for number, tasks in enumerate(todo) for task in tasks)


def _summary(
    base: LayerPlan,
    windows: Windows,
    questions: Questions,
    pairs: Sequence[tuple[int, int]],
    positions: list[int],
    compare: Sequence[LayerPlan],
    groups: Sequence[Callable[[str], Any]],
) -> Analysis:
    def total(name: str) -> np.ndarray:
        values = np.array([known(name) for known in groups], np.float64)
        return np.asarray(np.sum(values, axis=0))

    def against_base(plan: LayerPlan) -> Compared:
        name = _comparison_name(plan, questions.top_k)
        return compared.read(plan, windows, [known(name) for known in groups], questions.top_k)

    def nats(name: str) -> float:
        return float(total(name)) / windows.predicted

    slots, parts = range(len(base)), questions.parts
    return Analysis(
        plan=base,
        predicted=windows.predicted,
        windows=len(windows.lengths),
        base=nats("base"),
        influence=total("influence") / windows.lengths.sum() if "influence" in parts else None,
        angular=total("angular") / len(windows.lengths) if "angular" in parts else None,
        skip={half: np.array([nats(f"skip {half} {slot}") for slot in slots]) for half in HALVES}
        if "skip" in parts
        else {},
        rys={(i, j): nats(f"rys {i} {j}") for i, j in pairs},
        rys_total=len(repeats(len(base))),
        lens_nats=np.array([nats(f"lens {slot}") for slot in range(len(base) + 1)])
        if "lens" in parts
        else None,
        lens=_read_lens(windows, positions, groups[0](_lens_name(questions, positions)))
        if positions
        else None,
        contributions=contributions.means(total("halves"), int(windows.lengths.sum()), windows.predicted)
        if "halves" in parts
        else None,
        compared=tuple(map(against_base, compare)),
    )


def _read_lens(windows: Windows, positions: list[int], value: Any) -> Lens:
    row, length = windows.tokens[0].tolist(), int(windows.lengths[0])
    return Lens(
        positions=positions,
        inputs=[row[position] for position in positions],
        targets=[row[position + 1] if position + 1 < length else None for position in positions],
        ids=np.array(value[0], np.int32),
        logprobs=np.array(value[1], np.float32),
    )


def _nan_as_most(value: float) -> float:
    return math.inf if math.isnan(value) else value
