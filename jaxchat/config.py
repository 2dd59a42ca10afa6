"""What a model is: `ModelConfig` and its parts, plus the parameter table type every other room derives from.

No I/O, no arrays on devices. The dimension alphabet is in `jaxchat/model.py`.
"""

import dataclasses
import math
from typing import Literal

EMBED, FINAL_NORM, HEAD = "embed.weight", "norm.weight", "lm_head.weight"
"""The parameters of the token embedding, the last norm, and an output head that is not tied to the former."""

LAYERS = "layers."
"""What the names of stacked parameters begin with."""

Role = Literal["weight", "bias", "norm", "embedding", "positions", "head"]
Half = Literal["attention", "mlp"]
Init = Literal["normal", "zeros", "ones"]

MAX_LAYERS = 4096
"""No model has so many: more is a mistake, which would take minutes to find out."""

GLOBAL_WINDOW = 0
"""The `layer_windows` entry of a layer whose attention sees the whole context."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary position embedding, as Hugging Face `rope_parameters` describe it.

    Attributes:
      kind: its name in `families/rope.py`.
      theta: the base of the frequencies.
      dim: how many of a head's H dimensions are rotated (even; the rest pass through).
      factor: context extension factor of the scaled kinds.
      original_max_position: the context the model was first trained for (scaled kinds).
      attention_factor: multiplies cos and sin.
      low_freq_factor, high_freq_factor: `llama3` only.
      beta_fast, beta_slow, truncate: `yarn` only.
      short_factor, long_factor: `longrope` only, `dim / 2` entries each.
    """

    kind: str = "default"
    theta: float = 10000.0
    dim: int
    factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


PRE_NORMS = ("attn_norm", "mlp_norm")
POST_NORMS = ("attn_post_norm", "mlp_post_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A kind of layers: which halves it is made of, and how they are put together.

    Attributes:
      arrangement: how the halves read the residual stream and add to it, by its name in `layers/block.py`.
      norms: the norms there are, of `PRE_NORMS` (of what a half reads) and `POST_NORMS` (of what it adds).
      qk_norm: each query and key head is normed before its rotation.
      softcap: tanh soft-cap of the attention scores; 0 is none.
      mlp: by its name in `layers/mlp.py`: `gated`, down(act(gate(x)) * up(x)), or `plain`, down(act(up(x))).
      activation: of the MLP: `silu`, `gelu`, `gelu_tanh`, `relu`, `quick_gelu`.
    """

    arrangement: str = "sequential"
    norms: tuple[str, ...] = PRE_NORMS
    qk_norm: bool = False
    softcap: float = 0.0
    mlp: str = "gated"
    activation: str = "silu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the decoder needs to know of a model. Hashable, so it can be a static jit argument.

    Attributes:
      model_type: Hugging Face `model_type`.
      family: the entry of `jaxchat.families` that reads this model.
      vocab_size, hidden_size, intermediate_size: V, D, F.
      num_layers, num_heads, num_kv_heads, head_dim: L, N, K, H.
      max_position_embeddings: the longest context the model was made for, in tokens.
      norm: `rmsnorm` or `layernorm` (with bias).
      norm_eps: added to the variance.
      norm_offset: added to a norm's weight (Gemma: 1).
      blocks: the kinds of layers there are.
      layer_blocks: [L] index into `blocks`, by source layer; empty if there is one.
      learned_positions: whether a table of absolute positions is added to the embedding (GPT-2).
      ropes: the rotary embeddings in use (none with learned positions).
      layer_ropes: [L] index into `ropes`, by source layer.
      layer_windows: [L] sliding window in tokens, by source layer; 0 is global attention.
      layer_attn_scales: [L] factor of the attention scores, by source layer.
      layer_rows: parameter -> [L] the row of its stack that each layer uses, of the parameters where that is
        not the layer itself: in an assembled stack, layers that differ in one tensor share the others.
      embedding_scale: multiplies the token embedding.
      final_softcap: tanh soft-cap of the logits; 0 is none.
      qkv_bias, o_bias, mlp_bias: which projections have a bias.
      tied_embeddings: the output head is the token embedding.
      bos_id, eos_ids: from the configuration files; eos_ids end a generation.
    """

    model_type: str
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    blocks: tuple[Block, ...] = (Block(),)
    layer_blocks: tuple[int, ...] = ()
    learned_positions: bool = False
    ropes: tuple[RopeConfig, ...] = ()
    layer_ropes: tuple[int, ...] = ()
    layer_windows: tuple[int, ...] = ()
    layer_attn_scales: tuple[float, ...] = ()
    layer_rows: tuple[tuple[str, tuple[int, ...]], ...] = ()
    embedding_scale: float = 1.0
    final_softcap: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def block(self) -> Block:
        """The kind of the layers, of a model that has one."""
        (block,) = self.blocks
        return block

    @property
    def dims(self) -> dict[str, int]:
        """Size of each dimension letter used in parameter shapes (C: learned positions)."""
        return {
            "L": self.num_layers,
            "D": self.hidden_size,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
            "F": self.intermediate_size,
            "V": self.vocab_size,
            "C": self.max_position_embeddings,
        }

    def rows_of(self, parameter: str) -> tuple[int, ...]:
        """[L] the row of a per-layer parameter's stack that each stacked layer uses."""
        return dict(self.layer_rows).get(parameter, tuple(range(self.num_layers)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Param:
    """One row of a family's parameter table.

    Conversion, initialisation, sharding, quantization, counting and the checkpoint layout derive from it.

    Attributes:
      name: the key in the parameter pytree and in native checkpoints; `layers.*` are stacked.
      shape: dimension letters, `*` for products, without the leading L of a stacked one: `"N*H D"`.
        Linear weights are [out, in], Hugging Face's order.
      hf: the Hugging Face tensor name below the checkpoint's prefix; `{}` stands for the layer.
      axes: logical sharding axes, one a dimension: `"heads embed"`; `-` is never sharded.
      role: what its numbers are: `weight` (of a projection), `bias`, `norm`, `embedding`, `positions` or
        `head`.
      half: which half of a layer it is in, `attention` or `mlp`; None outside the layers.
      is_output: it makes what the half adds to the residual stream: what a slot's scale multiplies.
      init: what training begins with: `normal` (random), `zeros` or `ones`.
      part: which part of a tensor fused along its output axis it is, from 0.
      fused: the output sizes of the fused tensor's parts, in order, in dimension letters.
      transposed: the Hugging Face tensor is [in, out] (GPT-2's Conv1D).
    """

    name: str
    shape: str
    hf: str
    axes: str
    role: Role
    half: Half | None = None
    is_output: bool = False
    init: Init = "normal"
    part: int = 0
    fused: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor in every layer (stacked along L)."""
        return self.half is not None

    @property
    def quantizable(self) -> bool:
        """Whether it is multiplied with or looked up in, as opposed to norms, biases and positions."""
        return self.role in ("weight", "embedding", "head")

    @property
    def layer_name(self) -> str:
        """The name within a layer: `q.weight`; of what is not per layer, the name."""
        return self.name.removeprefix(LAYERS)

    @property
    def hf_layer_name(self) -> str:
        """The Hugging Face name within a layer: `self_attn.q_proj.weight`."""
        return self.hf.split("{}.")[-1]

    def layer_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The sizes of one layer's tensor (or of the whole, if it is not per layer)."""
        return tuple(size_of(term, config) for term in self.shape.split())

    def stacked_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The sizes of the array in the pytree: [L, ...] for per-layer parameters, [rows, ...] if shared."""
        return ((self.rows(config),) if self.per_layer else ()) + self.layer_shape(config)

    def rows(self, config: ModelConfig) -> int:
        """How many tensors there are: one a row of the stack, which is one a layer; or 1 for the model."""
        return max(config.rows_of(self.name)) + 1 if self.per_layer else 1

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The sizes of the Hugging Face tensor this parameter is (a part of)."""
        shape = self.layer_shape(config)
        if self.fused:
            shape = (self.fused_outputs(config), *shape[1:])
        return shape[::-1] if self.transposed else shape

    def fused_outputs(self, config: ModelConfig) -> int:
        """The outputs of the fused tensor, all parts together."""
        return sum(size_of(term, config) for term in self.fused)

    def fused_range(self, config: ModelConfig) -> tuple[int, int]:
        """Start and stop of this part along the fused tensor's output axis."""
        sizes = [size_of(term, config) for term in self.fused]
        start = sum(sizes[: self.part])
        return start, start + sizes[self.part]


def size_of(term: str, config: ModelConfig) -> int:
    """The number a product of dimension letters stands for: `"N*H"` -> num_heads * head_dim."""
    return math.prod(config.dims[letter] for letter in term.split("*"))
