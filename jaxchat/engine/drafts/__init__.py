"""Sources of drafted tokens: one file a kind, which says what the base is to verify, and a row in `LOADERS`.

A `Draft` is loaded once for a base and holds nothing mutable; each session has a `Drafting` of its own, which
follows what the base computes. What is accepted of a draft is decided in `engine/acceptance.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.draft_use import DraftUse, TreeShape
from jaxchat.engine.drafts import chimera
from jaxchat.layers.step import Params, Step


class Drafting(Protocol):
    """What a draft knows of the sequences of a session."""

    def observe(self, step: Step, before: np.ndarray, hidden: jax.Array, capacity: int) -> None:
        """Takes what the base has computed.

        Args:
          step: the base's, with the tokens int32 [B, T] that were computed; lengths and new in numpy.
          before: int32 [B, 2], the two tokens before the first; of a position before 0 anything.
          hidden: float32 [B, T, D], after the last norm.
          capacity: of the base's cache, in tokens.
        """

    def ready(self, row: int, length: int) -> bool:
        """Whether it can draft for a sequence of which the base has computed so many tokens."""

    def propose(self, step: Step, tokens: np.ndarray) -> jax.Array:
        """int32 [B, T]: the last token of each text, and what may follow it, in the shape's order.

        Args:
          step: the base's, which is to verify them; lengths in numpy.
          tokens: int32 [B, 3], the last three of each text; the base has computed all but the last.
        """

    def forget(self, row: int) -> None:
        """A sequence holds another text now, computed elsewhere."""


class Draft(Protocol):
    """A source of drafts for one base."""

    @property
    def shape(self) -> TreeShape:
        """Of what it proposes."""

    def drafting(self, engine: Any, batch: int) -> Drafting:
        """For a session of an engine, with so many sequences, padding included."""


LOADERS: Mapping[str, Callable[[DraftUse, ModelConfig, Params], Draft]] = {"chimera": chimera.load}
"""Each kind of `draft_use.KINDS` -> what loads it for a base, given as it was loaded."""


def load_draft(use: DraftUse, config: ModelConfig, params: Params) -> Draft:
    """The draft that is asked for.

    Raises:
      UsageError, JaxchatError: its files are not there, malformed, or for another base.
    """
    return LOADERS[use.kind](use, config, params)
