"""What a part of a model is trained at: text, or the whole model's own distributions."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxchat import model
from jaxchat.config import ModelConfig
from jaxchat.layers.step import Params
from jaxchat.training import forward, losses
from jaxchat.training.forward import Kept
from jaxchat.training.losses import Loss
from jaxchat.training.parts import Part

if TYPE_CHECKING:
    from jaxchat.training.trainer import Arrays


@dataclasses.dataclass(frozen=True)
class Text:
    """Predicting a text's tokens with a part that is trained; embedding, norm and head are frozen.

    Attributes:
      config: the model, its layers those that run.
      dtype: of the activations.
      part: what is trained.
      kept: see `forward.Kept`.
    """

    config: ModelConfig
    dtype: jnp.dtype
    part: Part
    kept: Kept = "products"

    def loss(self, trained: Any, frozen: Params, batch: "Arrays", key: jax.Array | None) -> Loss:
        """See `trainer.Task`."""
        step = forward.whole_sequences(
            self.config, frozen, batch.tokens, dtype=self.dtype, starts=batch.starts
        )
        hidden = self.part.hidden_states(step, trained, key, self.kept)
        return losses.next_token(step, hidden, batch.tokens, batch.weights)


@dataclasses.dataclass(frozen=True)
class Healing:
    """Learning a whole model's distributions with some of its layers (Hinton et al. 2015).

    Attributes:
      config, dtype, part, kept: as in `Text`, of the model with the layers that are left.
      whole: the configuration of the model with all of them, over the same weights.
      temperature: what the logits are divided by.
      label_weight: how much of the loss is that of the text's own tokens, 0 to 1.
    """

    config: ModelConfig
    dtype: jnp.dtype
    part: Part
    whole: ModelConfig
    temperature: float = 1.0
    label_weight: float = 0.0
    kept: Kept = "products"

    def loss(self, trained: Any, frozen: Params, batch: "Arrays", key: jax.Array | None) -> Loss:
        """See `trainer.Task`."""
        if key is None:  # what counts in the end
            return self._text(trained, frozen, batch, key)
        options: dict[str, Any] = {"dtype": self.dtype, "starts": batch.starts}
        step = forward.whole_sequences(self.config, frozen, batch.tokens, **options)
        whole = forward.whole_sequences(self.whole, frozen, batch.tokens, **options)
        hidden = self.part.hidden_states(step, trained, key, self.kept)
        runs = [forward.Run(tuple(range(self.whole.num_layers)), {})]
        teacher = jax.lax.stop_gradient(forward.hidden_states(whole, runs=runs))
        after = jnp.pad(batch.weights[:, 1:], ((0, 0), (0, 1)))  # of the distribution after each token
        found = losses.distilled(step, hidden, teacher, after, temperature=self.temperature)
        if not self.label_weight:
            return found
        labels = losses.next_token(step, hidden, batch.tokens, batch.weights)
        share = self.label_weight
        return Loss((1 - share) * found.total + share * labels.total, found.weight)

    def _text(self, trained: Any, frozen: Params, batch: "Arrays", key: jax.Array | None) -> Loss:
        return Text(self.config, self.dtype, self.part, self.kept).loss(trained, frozen, batch, key)


@dataclasses.dataclass(frozen=True)
class Everything:
    """Predicting a text's tokens with all parameters trained, embedding and head among them.

    Attributes:
      config, dtype: as in `Text`.
      dropout: see `forward.hidden_states`.
      kept: see `forward.Kept`.
    """

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float = 0.0
    kept: Kept = "inputs"

    def loss(self, trained: Params, frozen: Any, batch: "Arrays", key: jax.Array | None) -> Loss:
        """See `trainer.Task`."""
        tokens = batch.tokens[:, :-1]
        step = forward.whole_sequences(
            self.config, trained, tokens, dtype=self.dtype, starts=batch.starts[:, :-1]
        )
        hidden = forward.hidden_states(step, kept=self.kept, dropout=self.dropout, key=key)
        found = losses.cross_entropy(model.logits(step, hidden), batch.tokens[:, 1:])
        weights = batch.weights[:, 1:]
        return Loss(jnp.sum(found * weights), jnp.sum(weights))
