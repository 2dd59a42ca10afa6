"""What a family is, and the Llama-shaped parameter table that most of them share."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxchat.config import EMBED, GLOBAL_WINDOW, HEAD, Half, ModelConfig, Param
from jaxchat.families.hf_config import HfConfig


def relayer_plain(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """`config.json` with another number of layers, for families whose layers are all of one kind."""
    # Llama and Mistral have no layer types: transformers reads past such a list, but may count it.
    return {**_without(values, "layer_types"), "num_hidden_layers": config.num_layers}


def relayer_types(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """`config.json` with other layers, for families that list which of them have the sliding window."""
    sliding = [window != GLOBAL_WINDOW for window in config.layer_windows]
    result = {
        **values,
        "num_hidden_layers": config.num_layers,
        "layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in sliding],
    }
    if any(sliding):
        result["sliding_window"] = max(config.layer_windows)
    return result


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


BARE = ("model.", "")
"""How a checkpoint spells the names that was saved from the model without its head (`LlamaModel`)."""

_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.\w+|inv_freq|\w*(cos|sin)_cached|(attn|attention)\.(bias|masked_bias)"
    r"|(causal_|attention_)mask|position_ids)$"
)
"""What versions of transformers have saved beside the parameters: tables of positions, and masks."""


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture family: how its configuration and its checkpoint are read.

    Attributes:
      name: as shown to users.
      model_types: the Hugging Face `model_type`s it reads.
      config: Hugging Face configuration -> `ModelConfig`.
      params: `ModelConfig` -> parameter table.
      renames: (start, replacement) pairs, tried in order: how a checkpoint may spell the table's names.
      ignored: name parts of checkpoint tensors that are not parameters (other towers, buffers of its own).
      relayer: the inverse of `config` for what a layer plan changes: `config.json` of a model of this family,
        and the `ModelConfig` whose layers it is to describe -> its `config.json`.
    """

    name: str
    model_types: tuple[str, ...]
    config: Callable[[HfConfig], ModelConfig]
    params: Callable[[ModelConfig], tuple[Param, ...]]
    renames: tuple[tuple[str, str], ...] = (("", ""), BARE)
    ignored: tuple[str, ...] = ()
    relayer: Callable[[Mapping[str, Any], ModelConfig], dict[str, Any]] = relayer_plain

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint's tensor is a buffer or another tower's, which nobody needs to hear of."""
        return _BUFFER.search(name) is not None or any(part in name for part in self.ignored)

    @staticmethod
    def rename(name: str, rename: tuple[str, str]) -> str:
        """Spells a table name as a checkpoint with this rename does."""
        start, replacement = rename
        return replacement + name.removeprefix(start) if name.startswith(start) else name


def embedding(hf: str) -> Param:
    """The token embedding [V, D]."""
    return Param(name=EMBED, shape="V D", hf=hf, axes="vocab embed", role="embedding")


OUTPUT_HEAD = Param(name=HEAD, shape="V D", hf=HEAD, axes="vocab embed", role="head")
"""The output head [V, D]. Where it is the embedding no table has it, but an adapter may have its delta."""


def head(config: ModelConfig) -> tuple[Param, ...]:
    """The output head, where it is not the embedding."""
    return () if config.tied_embeddings else (OUTPUT_HEAD,)


def norm(
    name: str, hf: str, config: ModelConfig, half: Half | None, *, shape: str = "D", axes: str = "embed"
) -> Param:
    """The weight of a norm; where it is stored as an offset from 1, it begins at 0."""
    return Param(
        name=f"{name}.weight",
        shape=shape,
        hf=f"{hf}.weight",
        axes=axes,
        role="norm",
        half=half,
        init="zeros" if config.norm_offset else "ones",
    )


def linear(
    name: str, hf: str, out: str, inp: str, axes: str, half: Half, *, bias: bool, is_output: bool = False
) -> list[Param]:
    """The rows of one linear layer: its weight [out, in] and, where it has one, its bias [out]."""
    weight = Param(
        name=f"{name}.weight",
        shape=f"{out} {inp}",
        hf=f"{hf}.weight",
        axes=axes,
        role="weight",
        half=half,
        is_output=is_output,
    )
    if not bias:
        return [weight]
    return [
        weight,
        dataclasses.replace(
            weight,
            name=f"{name}.bias",
            shape=out,
            hf=f"{hf}.bias",
            axes=axes.split()[0],
            role="bias",
            init="zeros",
        ),
    ]
