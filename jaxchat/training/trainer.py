"""The trainer: steps of AdamW on whatever a task trains, with evaluation, checkpoints and a journal.

It knows no model and no text. What it writes into its directory: `checkpoints/` and `best/` (Orbax),
`metrics.jsonl` (a line each logging step and evaluation), and `loss.png`.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxchat.errors import JaxchatError
from jaxchat.training.batches import Batch, Epoch
from jaxchat.training.held_signals import HeldSignals
from jaxchat.training.journal import Journal, Sink
from jaxchat.training.losses import Loss, mean_of
from jaxchat.training.saved import Saved

Schedule = Literal["cosine", "linear", "constant", "warmup_stable_decay"]

LOSS = "eval_loss"
"""What the held-out loss is called in the journal."""

_DECAY = 0.3
"""The part of all steps in which `warmup_stable_decay` falls."""

_FINE = 1 << 20
"""Steps that a run is taken for whose end is a time."""


class Arrays(NamedTuple):
    """A batch as a task reads it, all of it [B, T]; see `Batch`."""

    tokens: jax.Array
    weights: jax.Array
    starts: jax.Array


class Task(Hashable, Protocol):
    """What is trained, and at what; hashable, for it is a static argument of the compiled step."""

    def loss(self, trained: Any, frozen: Any, batch: Arrays, key: jax.Array | None) -> Loss:
        """The loss of a batch, to be differentiated by `trained`; without a key nothing is dropped.

        A task may have `figures(trained, frozen, batch)`, too: more to be measured on held-out data, by name.
        """


class Data(Protocol):
    """Batches by number, as `training.batches` makes them."""

    def epoch(self, number: int) -> Epoch:
        """The batches of one time through the data, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
      epochs: times through the data, if `max_steps` does not say when to end.
      max_steps: steps in all, or None.
      max_minutes: instead of either, minutes in all, interruptions not counted.
      learning_rate: the highest.
      schedule: how it falls after the warm-up: by a cosine to 0, linearly to 0, not, or linearly to 0 in the
        last 30 % (Hu et al. 2024).
      warmup_ratio: part of all steps in which it rises from 0.
      weight_decay, max_grad_norm: of AdamW (Loshchilov & Hutter 2019), and what gradients are clipped to.
      beta1, beta2, epsilon: Adam's.
      accumulation: batches a step.
      logging_steps, eval_steps, save_steps: how often, in steps; 0 is once an epoch.
      evaluates: whether to evaluate at all (there is data for it).
      keep: how many of the last checkpoints stay.
      patience: evaluations without a new best after which training ends; 0 is never.
      seed: of the random numbers for dropout.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    max_minutes: float | None = None
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    accumulation: int = 1
    logging_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 0
    evaluates: bool = False
    keep: int = 2
    patience: int = 0
    seed: int = 0

    def rate(self, total: int) -> optax.Schedule:
        """Step (from 0) -> learning rate, as transformers has these schedules: from 0 on in the warm-up."""
        warmup = math.ceil(total * self.warmup_ratio)
        peak, rest = self.learning_rate, max(total - warmup, 1)
        after = {
            "cosine": optax.cosine_decay_schedule(peak, rest),
            "linear": optax.linear_schedule(peak, 0.0, rest),
            "constant": optax.constant_schedule(peak),
            "warmup_stable_decay": optax.linear_schedule(
                peak, 0.0, math.ceil(total * _DECAY), max(rest - math.ceil(total * _DECAY), 0)
            ),
        }[self.schedule]
        return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


class State(NamedTuple):
    """What a step changes, all of it arrays."""

    trained: Any
    moments: optax.OptState
    step: jax.Array  # int32 [], steps done


class Totals(NamedTuple):
    """What the batches of a step add up to."""

    gradients: Any
    loss: Loss


@dataclasses.dataclass
class Position:
    """Where a run is, beside its arrays: what a checkpoint's JSON holds.

    Attributes:
      batch: batches done, of all epochs.
      tokens: tokens read, those with weight.
      seconds: time spent, interruptions not counted.
      recent_loss, recent_weight: sums since the last line of the journal.
      best_loss, best_step: of the best evaluation, None before the first.
      misses: evaluations since.
    """

    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent_loss: float = 0.0
    recent_weight: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    misses: int = 0


class Report(NamedTuple):
    """How far a run is, for a progress bar."""

    step: int
    done: float  # of the whole run, 0 to 1
    loss: float
    tokens_per_second: float


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      state: the last one, or the best if there were evaluations.
      step: whose it is.
      loss: of the last logging interval.
      best_loss: of the best evaluation, None without any.
      stopped_early: `patience` ran out.
    """

    state: State
    step: int
    loss: float
    best_loss: float | None
    stopped_early: bool


def optimizer(settings: Settings, decayed: Any) -> optax.GradientTransformation:
    """AdamW without its learning rate, which `apply` takes; `decayed`: a tree of which leaves decay."""
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm) if settings.max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2, eps=settings.epsilon),
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _add(
    task: Task, trained: Any, frozen: Any, batch: Arrays, key: jax.Array, totals: Totals | None
) -> Totals:
    """The sums of a step's losses and gradients, with those of one batch more."""

    def total(trained: Any) -> tuple[jax.Array, Loss]:
        loss = task.loss(trained, frozen, batch, key)
        return loss.total, loss

    (_, loss), gradients = jax.value_and_grad(total, has_aux=True)(trained)
    found = Totals(gradients, loss)
    return found if totals is None else jax.tree.map(jnp.add, totals, found)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _apply(
    optimize: "_Optimizer", state: State, totals: Totals, rate: jax.Array
) -> tuple[State, jax.Array, jax.Array]:
    """The next state, the mean loss, and the norm of its gradient; the same state where that is no number."""
    weight = jnp.maximum(totals.loss.weight, 1e-6)
    loss = totals.loss.total / weight
    gradients = jax.tree.map(lambda g: g / weight, totals.gradients)
    norm = optax.tree.norm(gradients)
    updates, moments = optimize.transformation.update(gradients, state.moments, state.trained)
    trained = optax.apply_updates(state.trained, jax.tree.map(lambda u: -rate * u, updates))
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    after = State(trained, moments, state.step + 1)
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state), loss, norm


@functools.partial(jax.jit, static_argnums=0)
def _figures(task: Task, trained: Any, frozen: Any, batch: Arrays) -> dict[str, Loss]:
    own = getattr(task, "figures", None)
    found = {} if own is None else own(trained, frozen, batch)
    return {LOSS: task.loss(trained, frozen, batch, None), **found}


@dataclasses.dataclass(frozen=True)
class _Optimizer:
    """An optimizer as a static argument: it is what its settings are."""

    settings: Settings
    decayed: tuple[bool, ...]
    structure: Any = dataclasses.field(compare=False)

    @property
    def transformation(self) -> optax.GradientTransformation:
        return optimizer(self.settings, jax.tree.unflatten(self.structure, self.decayed))


class Trainer:
    """A run in a directory.

    Args:
      task: what is trained.
      frozen: what is not, on the devices.
      initial: what training begins with; it is taken over.
      decayed: a tree like `initial` of which leaves weight decay is for.
      data: to train on.
      held_out: to evaluate on, or None.
      settings: how.
      directory: where everything is written; it is there.
      identity: what a run that is continued must be the same in: name -> value.
      sinks: others that are told what the journal says.
      mesh: batches are split over its `data` axis.

    Raises:
      UsageError: with `resume`, the run in the directory is another one.
      JaxchatError: its checkpoint is broken.
    """

    def __init__(
        self,
        task: Task,
        *,
        frozen: Any,
        initial: Any,
        decayed: Any,
        data: Data,
        held_out: Data | None,
        settings: Settings,
        directory: Path,
        identity: Mapping[str, Any],
        resume: bool = False,
        sinks: Sequence[Sink] = (),
        mesh: Mesh | None = None,
    ):
        self._task, self._frozen, self._data, self._held_out = task, frozen, data, held_out
        self._settings, self._mesh = settings, mesh
        leaves, structure = jax.tree.flatten(decayed)
        self._optimizer = _Optimizer(settings, tuple(leaves), structure)
        moments = self._optimizer.transformation.init(initial)
        self.state = State(initial, moments, jnp.int32(0))
        if mesh is not None:  # whole on every device: gradients of all parts of a batch meet there
            self.state = jax.device_put(self.state, NamedSharding(mesh, PartitionSpec()))
        self.position = Position()
        self._saved = Saved(directory, identity, keep=settings.keep, resume=resume)
        found = self._saved.last(self.state._asdict())
        if found is not None:
            self.state, self.position = State(**found[0]), Position(**found[1])
        self._journal = Journal(directory, self.step, sinks)
        self._epochs: dict[int, Epoch] = {}
        self._per_epoch = len(self._epoch(0))
        if self._per_epoch == 0:
            raise JaxchatError("the training data has nothing to learn from; give more of it")
        self.total = settings.max_steps or math.ceil(
            settings.epochs * self._per_epoch / settings.accumulation
        )
        self._schedule = settings.rate(_FINE if settings.max_minutes else self.total)
        self._key = jax.random.key(settings.seed, impl="rbg")

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state.step)

    def begin(self) -> dict[str, float]:
        """The figures of held-out data before the first step, measured once; {} without such data."""
        for line in self._journal.lines:
            if line["step"] == 0:
                return {name: value for name, value in line.items() if name != "step"}
        if self._held_out is None or not self._settings.evaluates or self.step:
            return {}
        figures = self.evaluate()
        self._journal.write(step=0, **figures)
        return figures

    def run(self, report: Callable[[Report], None] = lambda report: None) -> Outcome:
        """Trains to the end; where it is interrupted, the step is finished and a checkpoint written first.

        Raises:
          JaxchatError: the loss is no number; the last good state is saved.
        """
        loss = self._journal.last("loss")
        started, before = time.monotonic() - self.position.seconds, self.position.tokens
        begun = time.monotonic()
        try:
            with HeldSignals() as held:
                while self.done < 1 and not self._is_out_of_patience:
                    learning_rate = self._rate()
                    loss = self._train_step(learning_rate)
                    self.position.seconds = time.monotonic() - started
                    rate = (self.position.tokens - before) / max(time.monotonic() - begun, 1e-9)
                    report(Report(self.step, self.done, loss, rate))
                    self._after_step(rate, learning_rate)
                    held.release()
        except BaseException:
            # Before the first step there is nothing to go on from, and another try may begin otherwise.
            whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
            if whole and self.step:
                self._save()
            raise
        self._save()
        self._journal.plot()
        return self._outcome(loss)

    def close(self) -> None:
        """Ends what Orbax and the sinks keep running."""
        self._saved.close()
        self._journal.close()

    def evaluate(self) -> dict[str, float]:
        """Means over the held-out data, by name: `LOSS`, in nats a token, and what else the task measures."""
        assert self._held_out is not None
        found = [
            _figures(self._task, self.state.trained, self._frozen, self._placed(batch))
            for batch in self._held_out.epoch(0)
        ]
        return {name: mean_of([figures[name] for figures in found]) for name in found[0]}

    @property
    def done(self) -> float:
        """How much of the run is done, 0 to 1."""
        minutes = self._settings.max_minutes
        return self.position.seconds / 60 / minutes if minutes else self.step / self.total

    def _rate(self) -> float:
        """The learning rate of the next step."""
        at = min(self.done, 1) * _FINE if self._settings.max_minutes else self.step
        return float(self._schedule(at))

    # --- a step

    def _train_step(self, rate: float) -> float:
        totals: Totals | None = None
        places: list[str] = []
        for number in range(self._settings.accumulation):
            batch = self._batch(self.position.batch + number)
            places += batch.places
            key = jax.random.fold_in(self._key, self.position.batch + number)
            totals = _add(self._task, self.state.trained, self._frozen, self._placed(batch), key, totals)
            self.position.tokens += int(np.count_nonzero(batch.weights))
        assert totals is not None
        weight = float(totals.loss.weight)
        before = self.step
        self.state, loss, norm = _apply(self._optimizer, self.state, totals, jnp.float32(rate))
        value, self._norm = float(loss), float(norm)
        if not (math.isfinite(value) and math.isfinite(self._norm)):
            raise JaxchatError(
                f"the loss is {value} and its gradient {self._norm} at step {before + 1}, of "
                f"{_listed(places)}; the state before it is saved: look at these, or lower --learning_rate"
            )
        self.position.batch += self._settings.accumulation
        self.position.recent_loss += value * weight
        self.position.recent_weight += weight
        return value

    def _after_step(self, rate: float, learning_rate: float) -> None:
        settings, position = self._settings, self.position
        if self._is_due(settings.logging_steps):
            mean = position.recent_loss / max(position.recent_weight, 1e-6)
            self._journal.write(
                step=self.step,
                epoch=round(position.batch / self._per_epoch, 4),
                loss=mean,
                learning_rate=learning_rate,
                grad_norm=self._norm,
                tokens=position.tokens,
                tokens_per_second=round(rate, 1),
                seconds=round(position.seconds, 2),
            )
            position.recent_loss = position.recent_weight = 0.0
        if settings.evaluates and self._is_due(settings.eval_steps):
            self._judge(self.evaluate())
        if self._is_due(settings.save_steps):
            self._save()

    def _judge(self, figures: dict[str, float]) -> None:
        self._journal.write(step=self.step, **figures)
        loss, position = figures[LOSS], self.position
        if position.best_loss is None or loss < position.best_loss:
            position.best_loss, position.best_step, position.misses = loss, self.step, 0
            self._saved.put_best(self.step, self.state._asdict())
        else:
            position.misses += 1

    def _is_due(self, every: int) -> bool:
        """Whether something happens after this step; in any case after the last."""
        per_epoch = max(self._per_epoch // self._settings.accumulation, 1)
        return self.step % (every or per_epoch) == 0 or self.done >= 1

    @property
    def _is_out_of_patience(self) -> bool:
        return 0 < self._settings.patience <= self.position.misses

    def _save(self) -> None:
        self._saved.put(self.step, self.state._asdict(), dataclasses.asdict(self.position))

    def take_best(self) -> int:
        """Goes back to the best state, where there were evaluations, and returns its step."""
        position = self.position
        if position.best_loss is not None and position.best_step != self.step:
            self.state = State(**self._saved.best(self.state._asdict()))
        return self.step

    def _outcome(self, loss: float) -> Outcome:
        step = self.take_best()
        return Outcome(self.state, step, loss, self.position.best_loss, self._is_out_of_patience)

    # --- data

    def _batch(self, number: int) -> Batch:
        epoch, place = divmod(number, self._per_epoch)
        return self._epoch(epoch)[place]

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            self._epochs = {number: self._data.epoch(number)}
        return self._epochs[number]

    def _placed(self, batch: Batch) -> Arrays:
        arrays = Arrays(*(jnp.asarray(part) for part in (batch.tokens, batch.weights, batch.starts)))
        if self._mesh is None:
            return arrays
        split = len(batch.tokens) % self._mesh.shape["data"] == 0
        spec = PartitionSpec("data") if split else PartitionSpec()
        return jax.device_put(arrays, NamedSharding(self._mesh, spec))


def _listed(places: Sequence[str]) -> str:
    shown = [*dict.fromkeys(places)]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
