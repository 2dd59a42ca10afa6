"""What a token costs under a plan, in units of what it costs under another: bytes of weights, or time."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import jax
import numpy as np

from jaxchat.analysis.cost import weight_bytes_read
from jaxchat.engine.session import Engine
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan, Slot
from jaxchat.typed import Finite, checked

Cost = Callable[[LayerPlan], float]

_STEPS = 16
"""Decode steps that are timed as one."""
_REPEATS = 7
_KNOWN = "decode seconds"


def relative_cost(engine: Engine, base: LayerPlan) -> Cost:
    """A decode step's weights as they lie in memory, those of the base plan being 1."""
    config = engine.config
    sizes = {
        param.name: sum(part.nbytes for part in jax.tree.leaves(engine.params[param.name]))
        // param.rows(config)
        for param in parameter_table(config)
    }
    whole = weight_bytes_read(config, base, sizes)

    @functools.cache
    def cost(plan: LayerPlan) -> float:
        return weight_bytes_read(config, plan, sizes) / whole

    return cost


@dataclasses.dataclass(frozen=True)
class DecodeTime:
    """Seconds of a decode step of one sequence: `fixed`, and for every `attention` and `mlp` that runs."""

    fixed: float
    attention: float
    mlp: float

    def seconds(self, plan: LayerPlan) -> float:
        """Of a step under a plan."""
        slots = plan.executed()
        attention, mlp = (sum(slot.scale_of(half) != 0 for slot in slots) for half in ("attention", "mlp"))
        return self.fixed + attention * self.attention + mlp * self.mlp


def measured_cost(
    engine: Engine, base: LayerPlan, results: MutableMapping[str, Any], *, context: int = 64
) -> Cost:
    """The time of a decode step here, that of the base plan being 1, by a model of three measurements.

    Args:
      engine: the model.
      base: whose layers are timed: all of them, their attention alone, and their MLPs alone, in turn.
      results: where what was measured is kept, so that a run that goes on has the same figures.
      context: tokens before the step.
    """
    if _KNOWN not in results:
        results[_KNOWN] = list(dataclasses.astuple(_measured(engine, base, context)))
    where, advice = f"the result {_KNOWN!r}", "delete the journal, or give another --out"
    times = DecodeTime(*checked(results[_KNOWN], tuple[Finite, Finite, Finite], where=where, advice=advice))
    whole = times.seconds(base)
    return lambda plan: times.seconds(plan) / whole


def _measured(engine: Engine, base: LayerPlan, context: int) -> DecodeTime:
    slots = base.executed()
    plans = [
        LayerPlan(tuple(Slot(slot.layer, attention, mlp) for slot in slots), base.num_layers)
        for attention, mlp in ((1, 1), (1, 0), (0, 1))
    ]
    timed: list[list[float]] = [[], [], []]
    steppers = [_stepper(engine, plan, min(context, engine.max_length - _STEPS - 1)) for plan in plans]
    for _ in range(_REPEATS):  # in turn, so that what else the machine does is shared
        for times, step in zip(timed, steppers, strict=True):
            times.append(step())
    both, attention, mlp = (statistics.median(times) for times in timed)
    count = len(slots)
    # both = fixed + n (a + m), attention = fixed + n a, mlp = fixed + n m.
    fixed = max(attention + mlp - both, 0.0)
    return DecodeTime(fixed, max(attention - fixed, 0.0) / count, max(mlp - fixed, 0.0) / count)


def _stepper(engine: Engine, plan: LayerPlan, context: int) -> Callable[[], float]:
    """What runs some decode steps and returns the seconds of one."""
    session = engine.session(plan, uses=())
    session.set_ids([1 % engine.config.vocab_size] * max(context, 1))
    session.prefill()
    token = np.ones(session.padded_batch, np.int32)

    def step() -> float:
        began = time.perf_counter()
        for _ in range(_STEPS):
            logits, _ = session.decode(token, {0: max(context, 1)})
            jax.block_until_ready(logits)
        return (time.perf_counter() - began) / _STEPS

    step()  # compiles
    return step
