"""Logits and greedy continuations equal those of transformers, live, for every family and real checkpoints.

Every model is saved by transformers' own `save_pretrained` and loaded from there, so reading `config.json`
and converting the weights are part of what is compared. `test_goldens.py` compares without torch.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from jaxchat.checkpoints.directory import ModelDirectory  # noqa: E402
from jaxchat.families import read_config  # noqa: E402
from jaxchat.layers.rope import inverse_frequencies  # noqa: E402
from tests.support.make_goldens import reference, reference_greedy, reference_logits, reference_model  # noqa: E402
from tests.support.parity_cases import (  # noqa: E402
    CASES,
    GREEDY,
    LENGTH,
    PROMPTS,
    TOLERANCE,
    Runner,
    error,
    hf_tensors,
    tokens,
)

pytestmark = pytest.mark.parity


@dataclasses.dataclass
class Pair:
    """A case as we run it, and what transformers says of it."""

    case: str
    directory: Path
    runner: Runner
    tokens: np.ndarray  # [2, LENGTH]
    logits: np.ndarray  # [2, LENGTH, V]
    greedy: list[list[int]]


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("parity")
    hf = reference_model(request.param)
    hf.save_pretrained(directory)
    logits, greedy = reference(request.param, hf)
    return Pair(request.param, directory, Runner(directory), tokens(request.param), logits, greedy)


def test_logits_of_a_one_shot_prefill_equal_the_reference(pair: Pair):
    out = pair.runner.reset().feed(pair.tokens)
    assert error(np.stack(out), pair.logits) <= TOLERANCE


def test_logits_of_a_prefill_in_uneven_chunks_equal_the_reference(pair: Pair):
    runner, out = pair.runner.reset(), []
    for start, end in ((0, 1), (1, 8), (8, 31), (31, 34), (34, LENGTH)):
        out.append(np.stack(runner.feed(pair.tokens[:, start:end], context=LENGTH)))
    assert error(np.concatenate(out, 1), pair.logits) <= TOLERANCE


def test_logits_of_one_token_at_a_time_equal_the_reference(pair: Pair):
    runner = pair.runner.reset()
    out = [np.stack(runner.feed(pair.tokens[:, t : t + 1], context=LENGTH)) for t in range(LENGTH)]
    assert error(np.concatenate(out, 1), pair.logits) <= TOLERANCE


def test_sequences_of_different_lengths_in_one_batch_equal_the_reference(pair: Pair):
    runner, (first, second) = pair.runner.reset(), pair.tokens
    out: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    # 37 and 11 tokens; then one each, then one for the second only, then three and none, then one each.
    steps = [(first[:37], second[:11]), (first[37:38], second[11:12]), ([], second[12:13])]
    steps += [(first[38:41], []), (first[41:42], second[13:14])]
    for rows in steps:
        for kept, logits in zip(out, runner.feed(rows, context=LENGTH), strict=True):
            kept.append(logits)
    for kept, expected in zip(out, pair.logits, strict=True):
        logits = np.concatenate(kept)
        assert error(logits, expected[: len(logits)]) <= TOLERANCE


def test_greedy_continuation_of_a_ragged_batch_equals_the_reference_of_each_prompt(pair: Pair):
    prompts = [row[:n] for row, n in zip(pair.tokens, PROMPTS, strict=True)]
    assert pair.runner.greedy(prompts, GREEDY) == pair.greedy


def test_config_saved_by_transformers_reads_like_the_one_it_was_made_from(pair: Pair):
    # What it reads as another type than it says, it saves as that.
    ignored: dict[str, Any] = {"model_type": "", "bos_id": None, "eos_ids": ()}
    saved = dataclasses.replace(ModelDirectory.at(pair.directory).config, **ignored)
    assert saved == dataclasses.replace(read_config(CASES[pair.case]), **ignored)


# --- rotary frequencies at the sizes of real models, where every bound of a blend falls between two of them

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 20.0, "beta_slow": 3.0},
    "yarn-not-truncated": {**YARN, "truncate": False},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.9},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
        "short_factor": [1 + i / 99 for i in range(64)], "long_factor": [1 + i for i in range(64)],
    },
}  # fmt: skip


@pytest.mark.parametrize("length", [4096, 4097, 40000])
@pytest.mark.parametrize("name", ROPES)
def test_rope_frequencies_of_real_sizes_equal_the_reference(name: str, length: int):
    hf = transformers.LlamaConfig(
        hidden_size=1024, num_attention_heads=8, head_dim=128, max_position_embeddings=8192,
        rope_parameters=dict(ROPES[name]),
    )  # fmt: skip
    if name == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(hf)
    else:
        kind = ROPES[name]["rope_type"]
        expected, factor = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"), seq_len=length)
    rope = read_config(hf.to_dict()).ropes[0]
    ours = inverse_frequencies(rope, jnp.array([length]))[0]
    np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(factor)


# --- the text half of a multimodal checkpoint


def test_text_half_of_a_multimodal_gemma3_directory_equals_the_reference(tmp_path: Path):
    case = "gemma3_text-plain"
    config = transformers.Gemma3Config(
        text_config=CASES[case],
        vision_config={
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "image_size": 16, "patch_size": 8,
        },
        mm_tokens_per_image=4, image_token_index=96, boi_token_index=95, eoi_token_index=94,
    )  # fmt: skip
    hf = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    weights = {
        k.replace("model.", "model.language_model.", 1): torch.tensor(v) for k, v in hf_tensors(case).items()
    }
    assert not hf.load_state_dict(weights, strict=False).unexpected_keys
    hf.save_pretrained(tmp_path)
    ids = tokens(case) % 90 + 3
    assert error(np.stack(Runner(tmp_path).feed(ids)), reference_logits(hf, ids)) <= TOLERANCE


# --- real checkpoints


@pytest.mark.parametrize(
    "name", ["stories260K-hf", "TinyStories-656K/bf16", "TinyStories-656K/fp32", "CraftGPT-hf"]
)
def test_logits_and_continuation_of_a_real_checkpoint_equal_the_reference(name: str, shared_data: Path):
    directory = shared_data / "models" / name
    if not directory.exists():
        pytest.skip(f"needs the model {name} in ../shared/data/models")
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    hf.generation_config.eos_token_id = None
    runner = Runner(directory, batch=1)
    # CraftGPT has 64 positions for a prompt and its continuation.
    prompt = np.random.RandomState(0).randint(3, runner.config.vocab_size, 40)
    expected = reference_logits(hf, prompt[None])[0]
    assert error(runner.feed([prompt])[0], expected) <= TOLERANCE
    assert runner.greedy([prompt[:8]], 55) == [reference_greedy(hf, prompt[:8], 55)]
