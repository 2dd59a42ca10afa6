"""Training the decoder: the weighted next-token loss and one optimizer step. Knows no files and no text."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxchat import model
from jaxchat.config import ModelConfig
from jaxchat.families import parameter_table
from jaxchat.layers.step import Params
from jaxchat.training import forward


class Batch(NamedTuple):
    """Token sequences of one length. The weight of a token is that of predicting it from those before."""

    tokens: jax.Array | np.ndarray  # int32 [B, T]
    weights: jax.Array | np.ndarray  # float32 [B, T]; 0 for padding and for what is not learnt


class State(NamedTuple):
    """What a step changes, all of it arrays."""

    params: Params
    moments: optax.OptState
    step: jax.Array  # int32 []


def initial_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, float32: normal with deviation 0.02, less for what adds to the residual stream.

    The latter as in GPT-2 (Radford et al. 2019, 2.3): divided by the square root of 2 L.
    """
    params = {}
    table = parameter_table(config)
    for param, own in zip(table, jax.random.split(key, len(table)), strict=True):
        shape = param.stacked_shape(config)
        if param.init == "normal":
            deviation = 0.02 / np.sqrt(2 * config.num_layers) if param.is_output else 0.02
            params[param.name] = deviation * jax.random.normal(own, shape, jnp.float32)
        else:
            params[param.name] = jnp.full(shape, float(param.init == "ones"), jnp.float32)
    return params


def token_losses(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Minus the log-probability, in nats, of each token after those before it: float32 [B, T - 1]."""
    step = forward.whole_sequences(config, params, tokens[:, :-1], dtype=dtype)
    logits = model.logits(step, forward.hidden_states(step, dropout=dropout, key=key))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def optimizer(
    config: ModelConfig, *, weight_decay: float = 0.1, clip: float = 1.0
) -> optax.GradientTransformation:
    """AdamW without its learning rate, which `train_step` takes; only matrices decay, not norms or biases."""
    decayed = {param.name: param.role not in ("norm", "bias") for param in parameter_table(config)}
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-8),
        optax.add_decayed_weights(weight_decay, mask=decayed),
    )


def initial_state(config: ModelConfig, seed: int) -> State:
    """Random parameters and empty moments."""
    params = initial_params(config, jax.random.key(seed))
    return State(params, optimizer(config).init(params), jnp.int32(0))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("dtype", "dropout"), donate_argnums=1)
def train_step(
    config: ModelConfig,
    state: State,
    batch: Batch,
    learning_rate: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
    dropout: float = 0.0,
) -> tuple[State, jax.Array]:
    """One step of AdamW on the weighted mean of a batch's losses.

    Args:
      config: static.
      state: donated.
      batch: see `Batch`.
      learning_rate: traced, so that a schedule compiles nothing.
      dtype: of the activations; parameters, moments and sums are float32.
      dropout: see `forward.hidden_states`; its random numbers follow from the step's number.

    Returns:
      The next state, and the loss in nats per weighted token.
    """
    key = jax.random.fold_in(jax.random.key(0, impl="rbg"), state.step)
    tokens = jnp.asarray(batch.tokens)

    def loss(params: Params) -> jax.Array:
        losses = token_losses(config, params, tokens, dtype=dtype, dropout=dropout, key=key)
        weights = batch.weights[:, 1:]
        return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1e-6)

    value, gradients = jax.value_and_grad(loss)(state.params)
    updates, moments = optimizer(config).update(gradients, state.moments, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: -learning_rate * u, updates))
    return State(params, moments, state.step + 1), value


@functools.partial(jax.jit, static_argnums=0)
def total_loss(config: ModelConfig, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The sum of a batch's weighted losses, in nats, and the sum of the weights."""
    losses = token_losses(config, params, jnp.asarray(batch.tokens))
    return jnp.sum(losses * batch.weights[:, 1:]), jnp.sum(batch.weights[:, 1:])


def warmup_stable_decay(step: int, done: float, *, peak: float, warmup: int, decay: float) -> float:
    """A learning rate: up in `warmup` steps, constant, and to 0 in the last `decay` (0 to 1) of the work.

    Hu et al. 2024 (MiniCPM). `done`, from 0 to 1, may count steps or time: the end needs no known step.
    """
    return peak * min(1.0, (step + 1) / warmup, max(0.0, 1.0 - done) / decay)
