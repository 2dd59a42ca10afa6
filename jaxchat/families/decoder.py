"""What most decoders share with Llama: configuration keys, and the names of their tensors."""

from typing import Any

from jaxchat.config import GLOBAL_WINDOW, Block, Half, ModelConfig, Param
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.rope import read_rope, rope_section
from jaxchat.families.tables import embedding, head, linear, norm


def llama_config(hf: HfConfig, *, family: str, block: Block | None = None, **changes: Any) -> ModelConfig:
    """The configuration keys that most decoders share; a family passes what differs.

    Defaults for absent keys are those of transformers' LlamaConfig.
    """
    num_layers = hf.layers("num_hidden_layers")
    num_heads = hf.integer("num_attention_heads", at_least=1)
    hidden = hf.integer("hidden_size", at_least=1)
    head_dim = changes.pop("head_dim", None) or head_dim_of(hf)
    max_position = hf.length("max_position_embeddings", changes.pop("default_max_position", 2048))
    rope = changes.pop("rope", None) or read_rope(
        hf,
        rope_section(hf),
        theta=hf.positive("rope_theta", changes.pop("default_theta", 10000.0)),
        head_dim=head_dim,
        max_position=max_position,
        original_max_position=hf.integer("original_max_position_embeddings", 0) or None,
    )
    default_kv_heads = changes.pop("default_kv_heads", num_heads)
    if hf.has("num_key_value_heads"):  # an explicit null is not an absent key
        default_kv_heads = num_heads
    bos = hf.ids("bos_token_id")
    values: dict[str, Any] = {
        "model_type": hf.values["model_type"],
        "family": family,
        "vocab_size": hf.integer("vocab_size", at_least=1),
        "hidden_size": hidden,
        "intermediate_size": hf.integer("intermediate_size", at_least=1),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": hf.integer("num_key_value_heads", default_kv_heads, at_least=1),
        "head_dim": head_dim,
        "max_position_embeddings": max_position,
        "norm_eps": hf.nonnegative("rms_norm_eps", 1e-6),
        "blocks": (block or Block(activation=hf.activation("silu", "hidden_act")),),
        "ropes": (rope,),
        "layer_ropes": (0,) * num_layers,
        "layer_windows": (GLOBAL_WINDOW,) * num_layers,
        "layer_attn_scales": (head_dim**-0.5,) * num_layers,
        "tied_embeddings": hf.flag("tie_word_embeddings", False),
        "bos_id": bos[0] if bos else None,
        "eos_ids": hf.ids("eos_token_id"),
    }
    values.update(changes)
    return ModelConfig(**values)


def head_dim_of(hf: HfConfig, default: int | None = None) -> int:
    """H: `head_dim`, or else its default, or else an even share of the hidden size for each head."""
    shared = hf.integer("hidden_size") // hf.integer("num_attention_heads", at_least=1)
    return hf.integer("head_dim", default or shared, at_least=1, at_most=_MAX_HEAD)


_MAX_HEAD = 1 << 16


def windows_of(layer_types: tuple[str, ...], window: int | None) -> tuple[int, ...]:
    """`layer_windows` from layer types and the one window of the sliding layers."""
    return tuple(window or GLOBAL_WINDOW if t == "sliding_attention" else GLOBAL_WINDOW for t in layer_types)


def llama_params(config: ModelConfig) -> tuple[Param, ...]:
    """The parameter table of Llama and of every family that names its tensors alike."""
    layer = "model.layers.{}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    rows = [
        embedding("model.embed_tokens.weight"),
        norm("layers.attn_norm", layer + "input_layernorm", config, "attention"),
    ]
    for name, out, axis in (("q", "N*H", "heads"), ("k", "K*H", "kv_heads"), ("v", "K*H", "kv_heads")):
        hf = f"{attention}{name}_proj"
        rows += linear(f"layers.{name}", hf, out, "D", f"{axis} embed", "attention", bias=config.qkv_bias)
    if config.block.qk_norm:
        for name in ("q", "k"):
            hf = f"{attention}{name}_norm"
            rows.append(norm(f"layers.{name}_norm", hf, config, "attention", shape="H", axes="-"))
    hf = attention + "o_proj"
    rows += linear("layers.o", hf, "D", "N*H", "embed heads", "attention", bias=config.o_bias, is_output=True)
    norms: list[tuple[str, str, Half]] = [("mlp_norm", "post_attention_layernorm", "mlp")]
    if "mlp_post_norm" in config.block.norms:
        norms = [
            ("attn_post_norm", "post_attention_layernorm", "attention"),
            ("mlp_norm", "pre_feedforward_layernorm", "mlp"),
            ("mlp_post_norm", "post_feedforward_layernorm", "mlp"),
        ]
    rows += [norm(f"layers.{name}", layer + hf, config, half) for name, hf, half in norms]
    for name in ("gate", "up"):
        hf = f"{mlp}{name}_proj"
        rows += linear(f"layers.{name}", hf, "F", "D", "ffn embed", "mlp", bias=config.mlp_bias)
    hf = mlp + "down_proj"
    rows += linear("layers.down", hf, "D", "F", "embed ffn", "mlp", bias=config.mlp_bias, is_output=True)
    rows.append(norm("norm", "model.norm", config, None))
    return (*rows, *head(config))
