"""Training Chimera's heads: what they learn of a frozen base, by name, and how often they are right.

The network is in `layers/chimera.py`: head k, at row r, predicts the token x_{r+k+2}, and f^{k+1}_r stands
for the base's hidden state at r + k + 1.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.engine.drafts.chimera import ChimeraDraft
from jaxchat.engine.session import Engine
from jaxchat.errors import UsageError
from jaxchat.layers.chimera import ChimeraConfig, drafted_states, head_logits
from jaxchat.layers.ends import logits
from jaxchat.layers.step import Params, Step
from jaxchat.pallas.storage import widen
from jaxchat.training import forward
from jaxchat.training.losses import Loss, cross_entropy, in_blocks, mean_of, summed

if TYPE_CHECKING:
    from jaxchat.training.trainer import Arrays


class Said(NamedTuple):
    """What a head and the base say of the same tokens, n of them."""

    drafted: jax.Array  # float32 [n, D], f
    hidden: jax.Array  # float32 [n, D], the base's state that f stands for
    head: jax.Array  # float32 [n, V], logits
    base: jax.Array  # float32 [n, V], logits
    token: jax.Array  # int32 [n], of the text


def _divergence(said: Said) -> jax.Array:
    head, base = jax.nn.log_softmax(said.head), jax.nn.log_softmax(said.base)
    return jnp.sum(jnp.exp(base) * (base - head), axis=-1)


LOSSES: Mapping[str, Callable[[Said], jax.Array]] = {
    "tokens": lambda said: cross_entropy(said.head, said.base.argmax(-1)),
    "hidden": lambda said: jnp.mean((said.drafted - said.hidden) ** 2, axis=-1),
    "logits": lambda said: jnp.mean((said.head - said.base) ** 2, axis=-1),
    "kl": _divergence,
    "labels": lambda said: cross_entropy(said.head, said.token),
}
"""By name, float32 [n]: the base's most probable tokens, its hidden states, its logits (those three are the
authors' self-distillation), its distributions, and the text's own tokens (the authors' later loss)."""

DEFAULT_LOSSES = ("tokens", "hidden", "logits")


def losses_of(words: str) -> tuple[str, ...]:
    """Names of losses with commas between.

    Raises:
      UsageError: one that there is not.
    """
    names = tuple(word.strip() for word in words.split(","))
    for name in names:
        if name not in LOSSES:
            raise UsageError(
                f"--chimera_losses {words}: {name!r} is none of {', '.join(LOSSES)}; expected some of these, "
                "with commas between"
            )
    return tuple(dict.fromkeys(names))


class _Wanted(NamedTuple):
    """What all heads are to learn about N places: head k says it of what stands k + 1 before."""

    hidden: jax.Array  # float32 [N, D], h_p
    token: jax.Array  # int32 [N], x_{p+1}
    before: tuple[jax.Array, ...]  # float32 [N, D] by head, h_{p-k-1}
    weights: tuple[jax.Array, ...]  # float32 [N] by head


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The losses of some places, all heads together: what `losses.summed` takes, a static argument.

    The base's logits are made once for all heads, which is most of the work of small ones.
    """

    chimera: ChimeraConfig
    losses: tuple[str, ...]

    def said(
        self, step: Step, params: Params, drafted: Sequence[jax.Array], wanted: _Wanted
    ) -> Iterator[tuple[Said, jax.Array]]:
        """What each head says, and its weights."""
        base = jax.lax.stop_gradient(logits(step, wanted.hidden))
        for k, (f, before, weights) in enumerate(zip(drafted, wanted.before, wanted.weights, strict=True)):
            head = head_logits(self.chimera, params, step, k, before, f)
            yield Said(f, wanted.hidden, head, base, wanted.token), weights

    def __call__(
        self, step: Step, params: Params, drafted: Sequence[jax.Array], wanted: _Wanted
    ) -> jax.Array:
        found = [
            weights * LOSSES[name](said)
            for said, weights in self.said(step, params, drafted, wanted)
            for name in self.losses
        ]
        return jnp.stack(found).sum(0)


@dataclasses.dataclass(frozen=True)
class ChimeraTask:
    """Drafting what a frozen base says.

    Attributes:
      config: of the base.
      dtype: of the activations.
      chimera: what is trained.
      losses: of `LOSSES`; they add up.
    """

    config: ModelConfig
    dtype: jnp.dtype
    chimera: ChimeraConfig
    losses: tuple[str, ...] = DEFAULT_LOSSES

    def loss(self, trained: Params, frozen: Params, batch: "Arrays", key: jax.Array | None) -> Loss:
        """See `trainer.Task`; a mean over all heads."""
        step, drafted, wanted = self._places(trained, frozen, batch)
        heads = {name: value for name, value in trained.items() if name.startswith("heads.")}
        of_rows = _Rows(self.chimera, self.losses)
        total = summed(of_rows, step, heads, drafted, wanted, _used(wanted))
        return Loss(total, jnp.stack(wanted.weights).sum())

    def figures(self, trained: Params, frozen: Params, batch: "Arrays") -> dict[str, Loss]:
        """How often each head's most probable token, and one of its five, is the base's own: 0 to 1.

        Given the text up to the token before; head 1 is the first, of "the next-next token".
        """
        step, drafted, wanted = self._places(trained, frozen, batch)
        of_rows = _Rows(self.chimera, ())

        def add(right: jax.Array, places: jax.Array, own: jax.Array, there: jax.Array) -> jax.Array:
            block = jax.tree.map(lambda array: array[places], (drafted, wanted))
            found = []
            for said, weights in of_rows.said(step, trained, *block):
                chosen = jnp.take_along_axis(said.head, said.base.argmax(-1)[:, None], 1)
                better = jnp.sum(said.head > chosen, axis=1)
                found.append(jnp.stack([jnp.sum(own * weights * (better < n)) for n in (1, 5)]))
            return right + jnp.stack(found)

        right = in_blocks(add, jnp.zeros((len(drafted), 2)), _used(wanted))
        return {
            f"head{k + 1}_top{n}": Loss(right[k, column], weights.sum())
            for k, weights in enumerate(wanted.weights)
            for column, n in enumerate((1, 5))
        }

    def _places(
        self, trained: Params, frozen: Params, batch: "Arrays"
    ) -> tuple[Step, tuple[jax.Array, ...], _Wanted]:
        """The base's step, what stands for h_p by head, float32 [N, D] each, and what they are to learn."""
        step = forward.whole_sequences(
            self.config, frozen, batch.tokens, dtype=self.dtype, starts=batch.starts
        )
        whole = [forward.Run(tuple(range(self.config.num_layers)), {})]
        hidden = jax.lax.stop_gradient(forward.hidden_states(step, runs=whole))
        states = drafted_states(self.chimera, trained, step, batch.tokens, hidden)
        # Marks from 1 on: beyond the ends of a row is no text.
        after, marks = _moved(batch.weights, -1), batch.starts + 1
        weights = tuple(
            after * (_moved(marks, -1) == _moved(marks, k + 1)) for k in range(self.chimera.heads)
        )
        before = tuple(_moved(hidden, k + 1) for k in range(self.chimera.heads))
        drafted = tuple(_moved(f, k + 1) for k, f in enumerate(states))
        wanted = _Wanted(hidden, _moved(batch.tokens, -1), before, weights)
        flat: tuple[tuple[jax.Array, ...], _Wanted] = jax.tree.map(
            lambda array: array.reshape(-1, *array.shape[2:]), (drafted, wanted)
        )
        # What the heads need of the base is its embedding and its head.
        return dataclasses.replace(step, starts=None), *flat


def _used(wanted: _Wanted) -> jax.Array:
    """1 of places from which some head learns: the weights themselves are in the losses."""
    return (jnp.stack(wanted.weights) != 0).any(0).astype(jnp.float32)


def _moved(values: jax.Array, count: int) -> jax.Array:
    """Each row [B, T, ...] moved so many places on, or back; zeros where nothing came from."""
    most = min(abs(count), values.shape[1])
    kept = values[:, : values.shape[1] - most] if count > 0 else values[:, most:]
    ends = (most, 0) if count > 0 else (0, most)
    return jnp.pad(kept, [(0, 0), ends, *[(0, 0)] * (values.ndim - 2)])


class _Texts(NamedTuple):
    tokens: jax.Array
    weights: jax.Array
    starts: jax.Array


def accuracy(engine: Engine, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """How often the heads that an engine drafts with are right on texts: `ChimeraTask.figures`.

    Args:
      engine: with a Chimera.
      texts: token ids of each.

    >>> model = jaxchat.load("box", draft="chimera:box")  # doctest: +SKIP
    >>> accuracy(model.engine, [model.encode("Once upon a time")])["head1_top1"]  # doctest: +SKIP
    """
    draft = engine.draft
    if not isinstance(draft, ChimeraDraft):
        raise UsageError("this model has no Chimera; load it with draft='chimera:DIR'")
    length = max(map(len, texts))
    tokens, weights = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), np.float32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)], weights[row, : len(ids)] = ids, 1
    batch = _Texts(*(jnp.asarray(part) for part in (tokens, weights, np.zeros_like(tokens))))
    task = ChimeraTask(engine.config, engine.dtype, draft.config)
    params = {name: jnp.asarray(widen(value), jnp.float32) for name, value in draft.params.items()}
    figures = jax.jit(task.figures)(params, engine.params, batch)
    return {name: mean_of([found]) for name, found in figures.items()}
