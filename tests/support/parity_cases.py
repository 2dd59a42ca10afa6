"""The models that are compared with transformers: `config.json` contents, weights, and how they are run.

Shared by the live comparison (`test_parity.py`) and the stored one (`test_goldens.py`). Every case is small
and odd: widths that are no multiple of a vector, unequal heads, windows and trained contexts that 60 tokens
exceed.
"""

import functools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxchat import model
from jaxchat.checkpoints.load import load_params
from jaxchat.config import ModelConfig
from jaxchat.families import parameter_table, read_config, rope
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import KVCache, empty_cache
from jaxchat.layers.step import Params
from tests.support.steps import step_of

TOLERANCE = 2e-5
"""Largest |logit - reference|, as a fraction of the range of the reference's logits."""

LENGTH = 60
"""Tokens whose logits are compared."""
PROMPTS = (13, 29)
"""The prompts that are continued greedily: so many of the first tokens of each of the two sequences."""
GREEDY = 64
"""Tokens of a greedy continuation."""
ROWS = (0, 20, 41, LENGTH - 1)
"""Tokens whose logits are stored in the goldens."""

# --- the configurations

_BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _yarn(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    # Rotation bounds inside the 3 frequencies of a head of 6: with 32 and 1 no frequency would be blended.
    return {**rope, "beta_fast": 4.0, "beta_slow": 0.5, **changes}


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_LLAMA: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 6},
    "head-dim": {"head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True, "hidden_act": "gelu"},
    "rope-llama3": {"rope_parameters": _LLAMA3},
    "rope-linear": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 1000.0},
    "rope-dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "rope-dynamic-beyond": {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
    "rope-yarn": {"rope_parameters": _yarn()},
    "rope-yarn-default-betas": {"head_dim": 16, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "rope-yarn-trained-context-outside": {
        "original_max_position_embeddings": 24,
        "rope_parameters": _yarn(),
    },
    "rope-yarn-not-truncated": {"rope_parameters": _yarn(truncate=False, attention_factor=0.8)},
    # What transformers saved, and what its user has added: transformers follows the latter.
    "rope-keys-both": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "rope-yarn-mscale": {"head_dim": 12, "rope_parameters": _yarn(mscale=0.7, mscale_all_dim=1.3)},
    "everything": {
        "head_dim": 8,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_new",
        "rope_parameters": _LLAMA3,
    },
}
_MISTRAL: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 7},
    "head-dim": {"sliding_window": 50, "head_dim": 10},
    "null-window": {"sliding_window": None},
    "mixed-layers": {"head_dim": 6, "sliding_window": 7, "layer_types": [_FULL, _SLIDING, _FULL, _FULL]},
    "everything": {
        "sliding_window": 9,
        "head_dim": 10,
        "num_key_value_heads": 3,
        "rope_theta": 1e5,
        "rope_scaling": _yarn(),
        "tie_word_embeddings": True,
    },
}
_MINISTRAL: dict[str, dict[str, Any]] = {
    "mixed-layers": {"head_dim": 6, "sliding_window": 11, "layer_types": [_FULL, _SLIDING, _SLIDING, _FULL]},
    "everything": {
        "sliding_window": 5,
        "head_dim": 10,
        "num_key_value_heads": 1,
        "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
        "tie_word_embeddings": True,
        "rope_parameters": _yarn(),
    },
}
_QWEN2: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "window-switched-off": {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 2},
    "everything": {
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": [_FULL, _SLIDING, _FULL, _SLIDING],
        "rope_theta": 1e6,
        "rope_scaling": _yarn(),
    },
}
_QWEN3: dict[str, dict[str, Any]] = {
    "plain": {"head_dim": 10},
    "biases": {"head_dim": 4, "attention_bias": True},
    "everything": {
        "head_dim": 12,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "rope_parameters": _yarn(rope_theta=1e5),
    },
}
_GEMMA: dict[str, dict[str, Any]] = {
    "plain": {"head_dim": 10, "num_key_value_heads": 1},
    "legacy-gelu": {"head_dim": 8, "hidden_act": "gelu"},
    "everything": {
        "head_dim": 14,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}
_GEMMA2: dict[str, dict[str, Any]] = {
    "plain": {"head_dim": 10, "sliding_window": 8},
    # Caps near the size of what they cap: at 50 and 30 a random model would hardly notice them.
    "tight-caps": {
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 16,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5,
    },
    "no-caps": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "everything": {
        "head_dim": 14,
        "query_pre_attn_scalar": 5,
        "sliding_window": 5,
        "layer_types": [_FULL, _SLIDING, _SLIDING, _FULL],
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}
_GEMMA3: dict[str, dict[str, Any]] = {
    "plain": {"head_dim": 10, "sliding_window": 8, "query_pre_attn_scalar": 10, "sliding_window_pattern": 3},
    "two-rope-bases": {
        "head_dim": 10,
        "sliding_window": 40,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 10,
        "rope_theta": 2000.0,
        "rope_local_base_freq": 50.0,
    },
    "rope-keys-both": {
        "head_dim": 10,
        "sliding_window": 9,
        "query_pre_attn_scalar": 10,
        "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
        "rope_parameters": {
            _FULL: {"rope_type": "default", "rope_theta": 3000.0},
            _SLIDING: {"rope_type": "default", "rope_theta": 80.0},
        },
        "rope_scaling": {"rope_type": "linear", "factor": 5.0},
    },
    "everything": {
        "head_dim": 12,
        "sliding_window": 7,
        "query_pre_attn_scalar": 5,
        "layer_types": [_SLIDING, _FULL, _FULL, _SLIDING],
        "final_logit_softcapping": 3.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {
            _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0},
            _SLIDING: {"rope_type": "default", "rope_theta": 50.0},
        },
    },
}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.3, 1.7], "long_factor": [1.5, 3.0, 7.0]}
_PHI3: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 11, "num_key_value_heads": 6},
    "partial-rotary": {"hidden_size": 48, "partial_rotary_factor": 0.5, "rope_theta": 100.0},
    "longrope-short": {"original_max_position_embeddings": 100, "rope_scaling": _LONGROPE},
    "longrope-long": {"original_max_position_embeddings": 12, "rope_scaling": _LONGROPE},
    "longrope-crossing": {
        "original_max_position_embeddings": 48,
        "rope_scaling": {**_LONGROPE, "type": "yarn"},
    },
    "everything": {
        "hidden_size": 48,
        "num_key_value_heads": 3,
        "sliding_window": 17,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 48,
        "rope_parameters": {
            **_LONGROPE,
            "rope_type": "longrope",
            "rope_theta": 200.0,
            "partial_rotary_factor": 0.75,
            "attention_factor": 1.1,
        },
    },
}
_GPT2_BASE: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 36,
    "n_layer": 4,
    "n_head": 6,
    "n_positions": 128,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GPT2: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation_function": "relu", "n_head": 4},
    "unscaled": {"scale_attn_weights": False},
    "everything": {
        "n_inner": 50,
        "activation_function": "relu",
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    },
}
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama": (_BASE, _LLAMA),
    "mistral": (_BASE, _MISTRAL),
    "ministral": (_BASE, _MINISTRAL),
    "qwen2": (_BASE, _QWEN2),
    "qwen3": (_BASE, _QWEN3),
    "gemma": (_BASE, _GEMMA),
    "gemma2": (_BASE, _GEMMA2),
    "gemma3_text": (_BASE, _GEMMA3),
    "phi3": (_BASE, _PHI3),
    "gpt2": (_GPT2_BASE, _GPT2),
}

CASES: dict[str, dict[str, Any]] = {
    f"{model_type}-{name}": {"model_type": model_type, **base, **changes}
    for model_type, (base, cases) in _FAMILIES.items()
    for name, changes in cases.items()
}
"""`config.json` contents by case name; old and new spellings of the same keys are mixed on purpose."""

# --- weights and tokens. RandomState: its stream is frozen by numpy (NEP 19), that of default_rng is not.


def hf_tensors(case: str) -> dict[str, np.ndarray]:
    """A case's weights under their Hugging Face names; norms and biases are as random as the rest."""
    config = read_config(CASES[case])
    rng = np.random.RandomState(zlib.crc32(case.encode()))
    tensors: dict[str, np.ndarray] = {}
    for param in parameter_table(config):
        for layer in range(config.num_layers if param.per_layer else 1):
            name = param.hf.format(layer)
            if name not in tensors:  # a fused tensor has several rows in the table
                noise = rng.standard_normal(param.hf_shape(config))
                mean = float(param.init == "ones")
                # Embeddings do not drown what the layers add, and a tied model does not only repeat itself.
                scale = 0.2 / config.embedding_scale if param.role == "embedding" else 0.2
                tensors[name] = (mean + scale * noise).astype(np.float32)
    return tensors


def tokens(case: str) -> np.ndarray:
    """Two sequences of `LENGTH` tokens."""
    rng = np.random.RandomState(zlib.crc32(case.encode()) ^ 1)
    return rng.randint(3, CASES[case]["vocab_size"], (2, LENGTH))


def write_hf(directory: Path, case: str) -> None:
    """Writes a case as a Hugging Face model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CASES[case]))
    save_file(hf_tensors(case), directory / "model.safetensors")


# --- running a model

CAPACITY = 128
"""Tokens of context a Runner holds."""
BUCKET = 96
"""Tokens a Runner takes in one call: there are two compiled shapes, this and 1."""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def run(
    config: ModelConfig, params: Params, cache: KVCache, plan, tokens, lengths, new, context
) -> tuple[jax.Array, KVCache]:
    """`model.forward` and `model.logits` in float32: logits [B, T, V] and the cache."""
    step = step_of(config, params, plan, tokens, lengths, new, context)
    hidden, cache = model.forward(step, cache)
    return model.logits(step, hidden), cache


class Runner:
    """A loaded model and the cache of `batch` sequences."""

    def __init__(
        self, directory: str | Path, *, batch: int = 2, slots: int | None = None, capacity: int = CAPACITY
    ):
        self.config, params = load_params(directory)
        self.params = jax.tree.map(jnp.asarray, params)
        self.batch, self.slots, self.capacity = batch, slots or self.config.num_layers, capacity
        self.reset()

    def reset(self, plan: LayerPlan | None = None) -> "Runner":
        """Empties the cache and sets the plan (every layer once, if None)."""
        plan = plan or LayerPlan.identity(self.config.num_layers)
        self.plan = plan.arrays(self.slots)
        self.cache = empty_cache(
            self.config, slots=self.slots, batch=self.batch, capacity=self.capacity, dtype=jnp.float32
        )
        self.lengths = np.zeros(self.batch, np.int32)
        return self

    def feed(
        self, rows: Sequence[Sequence[int]], context: Sequence[int] | int | None = None
    ) -> list[np.ndarray]:
        """Appends tokens, not equally many, to each sequence; returns the logits [new, V] of each.

        `context` is the length of the whole contexts, if more tokens of them are to follow.
        """
        new = np.array([len(row) for row in rows], np.int32)
        padded = np.full((self.batch, 1 if new.max() <= 1 else BUCKET), 5, np.int32)
        for b, row in enumerate(rows):
            padded[b, : len(row)] = row
        context = self.lengths + new if context is None else np.broadcast_to(context, new.shape)
        out, self.cache = run(
            self.config, self.params, self.cache, self.plan, padded, self.lengths.copy(), new,
            context.astype(np.int32),
        )  # fmt: skip
        self.lengths += new
        return [np.asarray(out[b, :n]) for b, n in enumerate(new)]

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The `count` most likely tokens after each prompt, all prompts in one batch.

        Where the rotations of the cached keys do not fit the grown context (`rope.regime`), the sequence is
        computed anew, as transformers' `generate` does for LongRoPE.
        """
        self.reset()
        texts = [list(map(int, prompt)) for prompt in prompts]
        for _ in range(count):
            for b, text in enumerate(texts):
                if rope.regime(self.config, len(text)) != rope.regime(self.config, int(self.lengths[b])):
                    self.lengths[b] = 0
            rows = self.feed([text[have:] for text, have in zip(texts, self.lengths, strict=True)])
            for text, row in zip(texts, rows, strict=True):
                text.append(int(row[-1].argmax()))
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def error(logits: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference, as a fraction of the reference's range."""
    assert logits.shape == reference.shape
    return float(np.abs(logits - reference).max() / np.ptp(reference))
