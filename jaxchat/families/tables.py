"""What a family is, and the Llama-shaped parameter table that most of them share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxchat.config import GLOBAL_WINDOW, ModelConfig, Param
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


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture family: how its configuration and its checkpoint are read.

    Attributes:
      name: as shown to users.
      model_types: the Hugging Face `model_type`s it reads.
      config: Hugging Face configuration -> `ModelConfig`.
      params: `ModelConfig` -> parameter table.
      renames: (start, replacement) pairs, tried in order: how a checkpoint may spell the table's names.
      ignored: name parts of checkpoint tensors that are not parameters (buffers, other towers).
      relayer: the inverse of `config` for what a layer plan changes: `config.json` of a model of this family,
        and the `ModelConfig` whose layers it is to describe -> its `config.json`.
    """

    name: str
    model_types: tuple[str, ...]
    config: Callable[[HfConfig], ModelConfig]
    params: Callable[[ModelConfig], tuple[Param, ...]]
    renames: tuple[tuple[str, str], ...] = (("", ""),)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    relayer: Callable[[Mapping[str, Any], ModelConfig], dict[str, Any]] = relayer_plain

    @staticmethod
    def rename(name: str, rename: tuple[str, str]) -> str:
        """Spells a table name as a checkpoint with this rename does."""
        start, replacement = rename
        return replacement + name.removeprefix(start) if name.startswith(start) else name


def llama_params(config: ModelConfig) -> tuple[Param, ...]:
    """The parameter table of Llama and of every family that names its tensors alike."""
    layer = "model.layers.{}."
    rows = [
        Param(
            name="embed.weight",
            shape="V D",
            hf="model.embed_tokens.weight",
            axes="vocab embed",
            quantizable=True,
        )
    ]
    rows += [
        Param(name="layers.attn_norm.weight", shape="D", hf=layer + "input_layernorm.weight", axes="embed")
    ]
    for name, out, axis in (("q", "N*H", "heads"), ("k", "K*H", "kv_heads"), ("v", "K*H", "kv_heads")):
        hf = layer + f"self_attn.{name}_proj"
        rows += linear(f"layers.{name}", hf, out, "D", axis, "embed", config.qkv_bias)
    if config.qk_norm:
        for name in ("q", "k"):
            hf = layer + f"self_attn.{name}_norm.weight"
            rows.append(Param(name=f"layers.{name}_norm.weight", shape="H", hf=hf, axes="-"))
    rows += linear("layers.o", layer + "self_attn.o_proj", "D", "N*H", "embed", "heads", config.o_bias)
    norms = [("mlp_norm", "post_attention_layernorm")]
    if config.post_norms:
        norms = [
            ("attn_post_norm", "post_attention_layernorm"),
            ("mlp_norm", "pre_feedforward_layernorm"),
            ("mlp_post_norm", "post_feedforward_layernorm"),
        ]
    rows += [
        Param(name=f"layers.{n}.weight", shape="D", hf=layer + f"{hf}.weight", axes="embed")
        for n, hf in norms
    ]
    for name in ("gate", "up"):
        rows += linear(
            f"layers.{name}", layer + f"mlp.{name}_proj", "F", "D", "ffn", "embed", config.mlp_bias
        )
    rows += linear("layers.down", layer + "mlp.down_proj", "D", "F", "embed", "ffn", config.mlp_bias)
    rows += [Param(name="norm.weight", shape="D", hf="model.norm.weight", axes="embed")]
    if not config.tied_embeddings:
        rows += [
            Param(
                name="lm_head.weight", shape="V D", hf="lm_head.weight", axes="vocab embed", quantizable=True
            )
        ]
    return tuple(rows)


def linear(name: str, hf: str, out: str, inp: str, out_axis: str, in_axis: str, bias: bool) -> list[Param]:
    """The rows of one linear layer: its weight [out, in] and, where it has one, its bias [out]."""
    axes = f"{out_axis} {in_axis}"
    rows = [
        Param(name=f"{name}.weight", shape=f"{out} {inp}", hf=f"{hf}.weight", axes=axes, quantizable=True)
    ]
    if bias:
        rows.append(Param(name=f"{name}.bias", shape=out, hf=f"{hf}.bias", axes=out_axis))
    return rows
