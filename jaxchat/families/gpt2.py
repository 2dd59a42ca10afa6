"""GPT-2: learned positions, LayerNorm with bias, fused qkv, weights stored [in, out] (Conv1D)."""

from jaxchat.config import GLOBAL_WINDOW, ModelConfig, Param
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.tables import Family

_QKV = ("N*H", "K*H", "K*H")


def config(hf: HfConfig) -> ModelConfig:
    """Reads a GPT2Config."""
    hf.refuse("add_cross_attention")
    num_layers, num_heads = hf.integer("n_layer"), hf.integer("n_head")
    hidden = hf.integer("n_embd")
    head_dim = hidden // max(num_heads, 1)
    scale = head_dim**-0.5 if hf.flag("scale_attn_weights", True) else 1.0
    by_layer = hf.flag("scale_attn_by_inverse_layer_idx", False)
    bos = hf.ids("bos_token_id")
    return ModelConfig(
        model_type="gpt2",
        family="gpt2",
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=hf.integer("n_inner", 4 * hidden),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_position_embeddings=hf.integer("n_positions", 1024),
        norm="layernorm",
        norm_eps=hf.number("layer_norm_epsilon", 1e-5),
        activation=hf.activation("gelu_new", "activation_function"),
        gated_mlp=False,
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
    rows = [
        Param(
            name="embed.weight",
            shape="V D",
            hf="transformer.wte.weight",
            axes="vocab embed",
            quantizable=True,
        ),
        Param(name="positions.weight", shape="C D", hf="transformer.wpe.weight", axes="- embed"),
        *_norm("layers.attn_norm", "transformer.h.{}.ln_1"),
    ]
    for part, (name, axis) in enumerate((("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))):
        rows += _conv1d(
            f"layers.{name}", "transformer.h.{}.attn.c_attn", _QKV[part], "D", axis, "embed", part, _QKV
        )
    rows += _conv1d("layers.o", "transformer.h.{}.attn.c_proj", "D", "N*H", "embed", "heads")
    rows += _norm("layers.mlp_norm", "transformer.h.{}.ln_2")
    rows += _conv1d("layers.up", "transformer.h.{}.mlp.c_fc", "F", "D", "ffn", "embed")
    rows += _conv1d("layers.down", "transformer.h.{}.mlp.c_proj", "D", "F", "embed", "ffn")
    rows += _norm("norm", "transformer.ln_f")
    if not config.tied_embeddings:
        rows.append(
            Param(
                name="lm_head.weight", shape="V D", hf="lm_head.weight", axes="vocab embed", quantizable=True
            )
        )
    return tuple(rows)


def _norm(name: str, hf: str) -> list[Param]:
    return [
        Param(name=f"{name}.{kind}", shape="D", hf=f"{hf}.{kind}", axes="embed")
        for kind in ("weight", "bias")
    ]


def _conv1d(
    name: str,
    hf: str,
    out: str,
    inp: str,
    out_axis: str,
    in_axis: str,
    part: int = 0,
    fused: tuple[str, ...] = (),
) -> list[Param]:
    return [
        Param(
            name=f"{name}.weight",
            shape=f"{out} {inp}",
            hf=f"{hf}.weight",
            axes=f"{out_axis} {in_axis}",
            quantizable=True,
            part=part,
            fused=fused,
            transposed=True,
        ),
        Param(name=f"{name}.bias", shape=out, hf=f"{hf}.bias", axes=out_axis, part=part, fused=fused),
    ]


# The original `gpt2` checkpoint has no prefix; attn.bias and attn.masked_bias are causal-mask buffers.
FAMILIES = (
    Family(
        "gpt2",
        ("gpt2",),
        config,
        params,
        (("", ""), ("transformer.", "")),
        (".attn.bias", ".attn.masked_bias"),
        lambda values, config: {**values, "n_layer": config.num_layers},
    ),
)
