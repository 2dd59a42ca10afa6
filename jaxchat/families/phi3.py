"""Phi-3, Phi-3.5 and Phi-4: fused qkv and gate/up projections, LongRoPE, partly rotated heads."""

import dataclasses

from jaxchat.config import ModelConfig, Param
from jaxchat.families.decoder import head_dim_of, llama_config, llama_params, windows_of
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.rope import read_rope, rope_section
from jaxchat.families.tables import Family


def config(hf: HfConfig) -> ModelConfig:
    """Reads a Phi3Config. The old rope names `su` and `yarn` mean LongRoPE, as in transformers."""
    num_layers = hf.layers("num_hidden_layers")
    return llama_config(
        hf,
        family="phi3",
        default_max_position=4096,
        layer_windows=windows_of(("sliding_attention",) * num_layers, hf.window(None)),
        rope=read_rope(
            hf,
            rope_section(hf),
            theta=hf.positive("rope_theta", 10000.0),
            head_dim=head_dim_of(hf),
            max_position=hf.length("max_position_embeddings", 4096),
            partial=hf.positive("partial_rotary_factor", 1.0),
            original_max_position=hf.length("original_max_position_embeddings", 4096),
            names={"su": "longrope", "yarn": "longrope"},
        ),
        norm_eps=hf.nonnegative("rms_norm_eps", 1e-5),
    )


_FUSED = {
    "q.weight": ("self_attn.qkv_proj", 0, ("N*H", "K*H", "K*H")),
    "k.weight": ("self_attn.qkv_proj", 1, ("N*H", "K*H", "K*H")),
    "v.weight": ("self_attn.qkv_proj", 2, ("N*H", "K*H", "K*H")),
    "gate.weight": ("mlp.gate_up_proj", 0, ("F", "F")),
    "up.weight": ("mlp.gate_up_proj", 1, ("F", "F")),
}


def params(config: ModelConfig) -> tuple[Param, ...]:
    """Llama's table with q, k, v and gate, up cut out of Phi-3's fused tensors."""

    def fuse(row: Param) -> Param:
        if row.layer_name not in _FUSED:
            return row
        hf, part, fused = _FUSED[row.layer_name]
        return dataclasses.replace(row, hf=f"model.layers.{{}}.{hf}.weight", part=part, fused=fused)

    return tuple(fuse(row) for row in llama_params(config))


FAMILIES = (Family("phi3", ("phi3",), config, params),)
