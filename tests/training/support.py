"""Small data and runs for the tests of training."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.training.batches import Batch
from jaxchat.training.trainer import Settings, Trainer


def batch_of(tokens, weights=None, starts=None, place="data:1"):
    tokens = np.asarray(tokens, np.int32)
    weights = np.ones(tokens.shape, np.float32) if weights is None else np.asarray(weights, np.float32)
    starts = np.zeros(tokens.shape, np.int32) if starts is None else np.asarray(starts, np.int32)
    return Batch(tokens, weights, starts, (place,))


class Listed:
    """Batches that are there; the same in every epoch."""

    def __init__(self, batches):
        self._batches = list(batches)

    def epoch(self, number):
        return self._batches


def random_texts(vocabulary, *, batches=4, rows=2, length=20, seed=0):
    """Texts that repeat themselves, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(batches):
        tokens = rng.integers(0, min(vocabulary, 12), (rows, length // 2))
        found.append(batch_of(np.concatenate([tokens, tokens], 1), place=f"texts:{number + 1}"))
    return Listed(found)


def run_of(directory, task, *, frozen, initial, data, held_out=None, resume=False, mesh=None, **settings):
    """A trainer with few steps; `initial` stays as it is."""
    directory.mkdir(exist_ok=True)
    defaults = {"max_steps": 6, "learning_rate": 1e-2, "schedule": "constant", "logging_steps": 1}
    return Trainer(
        task,
        frozen=frozen,
        initial=jax.tree.map(jnp.array, initial),
        decayed=jax.tree.map(lambda _: True, initial),
        data=data,
        held_out=held_out,
        settings=Settings(**{**defaults, **settings, "evaluates": held_out is not None}),
        directory=directory,
        identity={"task": "of a test"},
        resume=resume,
        mesh=mesh,
    )
