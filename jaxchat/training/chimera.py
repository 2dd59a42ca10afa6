"""Training Chimera's heads: what they learn of a frozen base, by name, and how often they are right.

The network is in `layers/chimera.py`: head k, at row r, predicts the token x_{r+k+2}, and f^{k+1}_r stands
for the base's hidden state at r + k + 1.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The losses of rows of one head: what `losses.summed` takes, a static argument."""

    chimera: ChimeraConfig
    head: int
    losses: tuple[str, ...]

    def said(self, step: Step, params: Params, drafted: jax.Array, wanted: "_Wanted") -> Said:
        head = head_logits(self.chimera, params, step, self.head, wanted.before, drafted)
        base = jax.lax.stop_gradient(logits(step, wanted.hidden))
        return Said(drafted, wanted.hidden, head, base, wanted.token)

    def __call__(self, step: Step, params: Params, drafted: jax.Array, wanted: "_Wanted") -> jax.Array:
        said = self.said(step, params, drafted, wanted)
        found = [LOSSES[name](said) for name in self.losses]
        return jnp.stack(found).sum(0)


class _Wanted(NamedTuple):
    """What rows of a head are to learn."""

    before: jax.Array  # float32 [N, D], h_r
    hidden: jax.Array  # float32 [N, D], h_{r+k+1}
    token: jax.Array  # int32 [N], x_{r+k+2}


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
        step, rows = self._rows(trained, frozen, batch)
        heads = {name: value for name, value in trained.items() if name.startswith("heads.")}
        total, weight = jnp.float32(0), jnp.float32(0)
        for k, (drafted, wanted, weights) in enumerate(rows):
            of_rows = _Rows(self.chimera, k, self.losses)
            total += summed(of_rows, step, heads, drafted, wanted, weights)
            weight += weights.sum()
        return Loss(total, weight)

    def figures(self, trained: Params, frozen: Params, batch: "Arrays") -> dict[str, Loss]:
        """How often each head's most probable token, and one of its five, is the base's own: 0 to 1.

        Given the text up to the token before; head 1 is the first, of "the next-next token".
        """
        step, rows = self._rows(trained, frozen, batch)
        found = {}
        for k, (drafted, wanted, weights) in enumerate(rows):
            of_rows = _Rows(self.chimera, k, ())

            def add(
                right: jax.Array, places: jax.Array, own: jax.Array, there: jax.Array,
                of_rows: _Rows = of_rows, drafted: jax.Array = drafted, wanted: _Wanted = wanted,
            ) -> jax.Array:  # fmt: skip
                block = jax.tree.map(lambda array: array[places], wanted)
                said = of_rows.said(step, trained, drafted[places], block)
                chosen = jnp.take_along_axis(said.head, said.base.argmax(-1)[:, None], 1)
                better = jnp.sum(said.head > chosen, axis=1)
                return right + jnp.stack([jnp.sum(own * (better < n)) for n in (1, 5)])

            one, five = in_blocks(add, jnp.zeros(2), weights)
            found[f"head{k + 1}_top1"] = Loss(one, weights.sum())
            found[f"head{k + 1}_top5"] = Loss(five, weights.sum())
        return found

    def _rows(
        self, trained: Params, frozen: Params, batch: "Arrays"
    ) -> tuple[Step, list[tuple[jax.Array, _Wanted, jax.Array]]]:
        """The base's step, and of every head f [N, D], what it is to learn, and the weights [N]."""
        step = forward.whole_sequences(
            self.config, frozen, batch.tokens, dtype=self.dtype, starts=batch.starts
        )
        whole = [forward.Run(tuple(range(self.config.num_layers)), {})]
        hidden = jax.lax.stop_gradient(forward.hidden_states(step, runs=whole))
        states = drafted_states(self.chimera, trained, step, batch.tokens, hidden, starts=batch.starts)
        rows = []
        for k, drafted in enumerate(states):
            same = _ahead(batch.starts + 1, k + 2) == batch.starts + 1  # of the same text, and there
            weights = _ahead(batch.weights, k + 2) * same
            wanted = _Wanted(hidden, _ahead(hidden, k + 1), _ahead(batch.tokens, k + 2))
            flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (drafted, wanted, weights))
            rows.append(flat)
        # The head's rows need nothing of the base but its embedding and head.
        return dataclasses.replace(step, starts=None), rows


def _ahead(values: jax.Array, count: int) -> jax.Array:
    """What stands so many places further on in each row [B, T, ...]; zeros beyond the end."""
    missing = min(count, values.shape[1])
    return jnp.pad(values[:, count:], [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)])


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
