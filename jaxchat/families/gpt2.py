"""GPT-2: learned positions, LayerNorm with bias, fused qkv, weights stored [in, out] (Conv1D)."""

import dataclasses

from jaxchat.config import GLOBAL_WINDOW, Block, Half, ModelConfig, Param
from jaxchat.errors import JaxchatError
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.tables import Family, embedding, head, linear, norm

_QKV = ("N*H", "K*H", "K*H")


def config(hf: HfConfig) -> ModelConfig:
    """Reads a GPT2Config."""
    hf.refuse("add_cross_attention")
    num_layers, num_heads = hf.layers("n_layer"), hf.integer("n_head", at_least=1)
    hidden = hf.integer("n_embd", at_least=1)
    head_dim = hidden // num_heads
    if head_dim < 1:
        raise JaxchatError(
            f"{hf.at('n_embd')} is {hidden}; expected at least {num_heads}, one a head (n_head)"
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
        max_position_embeddings=hf.length("n_positions", 1024),
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


# The original `gpt2` checkpoint has no prefix.
FAMILIES = (
    Family(
        "gpt2",
        ("gpt2",),
        config,
        params,
        (("", ""), ("transformer.", "")),
        relayer=lambda values, config: {**values, "n_layer": config.num_layers},
    ),
)
