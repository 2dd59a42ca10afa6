"""Where our parameters are among the tensors of a GGUF file, and how rotated rows are put in order."""

from collections.abc import Container, Mapping
from typing import NamedTuple

import numpy as np

from jaxchat.config import EMBED, FINAL_NORM, HEAD, LAYERS, ModelConfig, Param, size_of

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
"""The tensors of the token embedding and of the output head."""

_STEMS: Mapping[str, str] = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o": "attn_output",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
"""What is in a layer, by our name and by GGUF's, which all architectures share."""
_GLOBAL: Mapping[str, str] = {
    EMBED: EMBEDDING,
    "positions.weight": "position_embd.weight",
    FINAL_NORM: "output_norm.weight",
    "norm.bias": "output_norm.bias",
    HEAD: OUTPUT,
}
_QKV, _GATE_UP = ("N*H", "K*H", "K*H"), ("F", "F")
_FUSED: Mapping[str, tuple[str, int, tuple[str, ...]]] = {
    "q": ("attn_qkv", 0, _QKV),
    "k": ("attn_qkv", 1, _QKV),
    "v": ("attn_qkv", 2, _QKV),
    "gate": ("ffn_up", 0, _GATE_UP),
    "up": ("ffn_up", 1, _GATE_UP),
}
"""Where a parameter is that has no tensor of its own: a part of another, and the sizes of all its parts."""


class Place(NamedTuple):
    """Where a parameter of one layer is.

    Attributes:
      tensor: its name in the file.
      shape: of that tensor.
      rows: those of the parameter, first and last plus one; None is all.
    """

    tensor: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None


def place_of(param: Param, index: int, config: ModelConfig, tensors: Container[str]) -> Place:
    """Where a parameter is in a file that has these tensors.

    Args:
      param: of the family's table.
      index: the layer.
      config: of the model.
      tensors: their names.
    """
    shape = param.layer_shape(config)
    if not param.per_layer:
        return Place(_GLOBAL[param.name], shape, None)
    stem, _, kind = param.layer_name.rpartition(".")
    own = f"blk.{index}.{_STEMS[stem]}.{kind}"
    gated = any(block.mlp == "gated" for block in config.blocks)
    if stem in ("gate", "up"):
        is_fused = gated and f"blk.{index}.ffn_gate.{kind}" not in tensors
    else:
        is_fused = stem in _FUSED and own not in tensors
    if not is_fused:
        return Place(own, shape, None)
    fused, part, parts = _FUSED[stem]
    name, sizes = f"blk.{index}.{fused}.{kind}", [size_of(term, config) for term in parts]
    if name not in tensors:
        return Place(own, shape, None)
    return Place(name, (sum(sizes), *shape[1:]), (sum(sizes[:part]), sum(sizes[: part + 1])))


def scale_of(tensor: str) -> str:
    """The tensor with the number by which another one's are multiplied, if the file has it (NVFP4)."""
    return f"{tensor.removesuffix('.weight')}.scale"


def input_scale_of(tensor: str) -> str:
    """The same of what the tensor is multiplied with, of which only kernels of few bits make use."""
    return f"{tensor.removesuffix('.weight')}.input_scale"


def rotated_heads(param: Param, config: ModelConfig) -> int:
    """How many heads are in a parameter that is rotated; 0 of any other."""
    heads = {f"{LAYERS}q": config.num_heads, f"{LAYERS}k": config.num_kv_heads}
    return heads.get(param.name.rpartition(".")[0], 0)


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, ...] in halves: row 2 i + half of each head becomes row half * H/2 + i of it."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
