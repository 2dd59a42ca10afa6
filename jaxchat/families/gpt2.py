"""GPT-2: learned positions, LayerNorm with bias, fused qkv, weights stored [in, out] (Conv1D)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxchat.config import GLOBAL_WINDOW, Block, Half, ModelConfig, Param
from jaxchat.errors import JaxchatError
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.tables import Family, embedding, head, linear, norm

_QKV = ("N*H", "K*H", "K*H")


_ALIASES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
}
"""transformers' `GPT2Config.attribute_map`: what else a key may be called; of both the alias counts."""


def _key(hf: HfConfig, key: str) -> str:
    """What the file calls a key."""
    return _ALIASES[key] if hf.values.get(_ALIASES[key]) is not None else key


def config(hf: HfConfig) -> ModelConfig:
    """Reads a GPT2Config."""
    hf.refuse("add_cross_attention")
    num_layers, num_heads = hf.layers(_key(hf, "n_layer")), hf.integer(_key(hf, "n_head"), at_least=1)
    hidden = hf.integer(_key(hf, "n_embd"), at_least=1)
    positions = _key(hf, "n_positions")
    if hf.values.get(positions) is None:
        positions = "n_ctx"  # OpenAI's own name
    head_dim = hidden // num_heads
    if head_dim < 1:
        raise JaxchatError(
            f"{hf.at(_key(hf, 'n_embd'))} is {hidden} and {_key(hf, 'n_head')} is {num_heads}; expected at "
            "least one dimension a head"
        )
    scale = head_dim**-0.5 if hf.flag("scale_attn_weights", True) else 1.0
    by_layer = hf.flag("scale_attn_by_inverse_layer_idx", False)
    bos = hf.ids("bos_token_id")
    return ModelConfig(
        model_type="gpt2",
        family="gpt2",
        vocab_size=hf.integer("vocab_size", at_least=1),
        hidden_size=hidden,
        intermediate_size=hf.integer("n_inner", 4 * hidden, at_least=1),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_position_embeddings=hf.length(positions, 1024),
        norm="layernorm",
        norm_eps=hf.nonnegative("layer_norm_epsilon", 1e-5),
        blocks=(Block(mlp="plain", activation=hf.activation("gelu_new", "activation_function")),),
        learned_positions=True,
        layer_windows=(GLOBAL_WINDOW,) * num_layers,
        layer_attn_scales=tuple(scale / (i + 1) if by_layer else scale for i in range(num_layers)),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tied_embeddings=hf.flag("tie_word_embeddings", True),
        bos_id=bos[0] if bos else None,
        eos_ids=hf.ids("eos_token_id"),
    )


def params(config: ModelConfig) -> tuple[Param, ...]:
    """The GPT2LMHeadModel table."""
    attention, mlp = "transformer.h.{}.attn.", "transformer.h.{}.mlp."
    rows = [
        embedding("transformer.wte.weight"),
        Param(
            name="positions.weight",
            shape="C D",
            hf="transformer.wpe.weight",
            axes="- embed",
            role="positions",
        ),
        *_norm("layers.attn_norm", "transformer.h.{}.ln_1", config, "attention"),
    ]
    for part, (name, axis) in enumerate((("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))):
        fused = linear(
            f"layers.{name}", attention + "c_attn", _QKV[part], "D", f"{axis} embed", "attention", bias=True
        )
        rows += [dataclasses.replace(row, part=part, fused=_QKV) for row in fused]
    hf = attention + "c_proj"
    rows += linear("layers.o", hf, "D", "N*H", "embed heads", "attention", bias=True, is_output=True)
    rows += _norm("layers.mlp_norm", "transformer.h.{}.ln_2", config, "mlp")
    rows += linear("layers.up", mlp + "c_fc", "F", "D", "ffn embed", "mlp", bias=True)
    rows += linear("layers.down", mlp + "c_proj", "D", "F", "embed ffn", "mlp", bias=True, is_output=True)
    rows += _norm("norm", "transformer.ln_f", config, None)
    turned = (
        dataclasses.replace(row, transposed=row.role == "weight") for row in rows
    )  # Conv1D is [in, out]
    return (*turned, *head(config))


def _norm(name: str, hf: str, config: ModelConfig, half: Half | None) -> list[Param]:
    weight = norm(name, hf, config, half)
    bias = dataclasses.replace(weight, name=f"{name}.bias", hf=f"{hf}.bias", role="bias", init="zeros")
    return [weight, bias]


def _relayer(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """See `Family`."""
    own = {name: value for name, value in values.items() if name != _ALIASES["n_layer"]}
    return {**own, "n_layer": config.num_layers}


# The original `gpt2` checkpoint has no prefix.
FAMILIES = (
    Family(
        "gpt2",
        ("gpt2",),
        config,
        params,
        (("", ""), ("transformer.", "")),
        relayer=_relayer,
    ),
)
