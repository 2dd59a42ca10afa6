"""Computes the reference logits of every parity case with transformers and writes them to `families/goldens`.

    python -m tests.support.make_goldens [case ...]

Needs the `parity` extra (torch, transformers). Run it when a case is added or changed, and commit the result;
a golden that moves although its case did not is a finding, not a refresh. One compressed file per model type:

    <case>/logits  float32 [2, rows, V]  of the two sequences of `parity_cases.tokens`, at `ROWS`
    <case>/greedy  uint8 [2, GREEDY]     greedy continuations of their first `PROMPTS` tokens

`test_parity.py` takes its reference from here too, so that both tests mean the same thing by it.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.support.parity_cases import CASES, GREEDY, PROMPTS, ROWS, hf_tensors, tokens

GOLDENS = Path(__file__).parents[1] / "families" / "goldens"


def reference_model(case: str) -> transformers.PreTrainedModel:
    """The case's model in transformers, float32, with its plain ("eager") attention."""
    with tempfile.TemporaryDirectory() as directory:  # what a file says is not always what its class says
        (Path(directory) / "config.json").write_text(json.dumps(CASES[case]))
        config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    result = model.load_state_dict({k: torch.tensor(v) for k, v in hf_tensors(case).items()}, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not result.unexpected_keys, result.unexpected_keys
    assert set(result.missing_keys) <= tied, result.missing_keys
    model.generation_config.eos_token_id = None
    return model


def reference_logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] for tokens [B, T], in one forward pass."""
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False).logits.float().numpy()


def reference_greedy(model: transformers.PreTrainedModel, prompt: np.ndarray, count: int) -> list[int]:
    """`count` greedy tokens, by `generate` with its cache wherever that cache is consistent.

    With dynamic NTK and LongRoPE the rotation of *all* keys depends on the context's length. The keys in
    transformers' cache keep the rotation of the step that wrote them (except at LongRoPE's one switch), which
    is not the model that a full forward pass computes. The full forward pass is the definition here.
    """
    ids = torch.tensor(prompt)[None]
    with torch.no_grad():
        if not _depends_on_length(model.config):
            mask = torch.ones_like(ids)
            ids = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count)
        else:
            for _ in range(count):
                ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :].tolist()


def reference(case: str, model: transformers.PreTrainedModel) -> tuple[np.ndarray, list[list[int]]]:
    """Logits [2, LENGTH, V] of the case's tokens and the greedy continuations of its prompts.

    A dynamic NTK module in transformers keeps the frequencies of the longest context it has seen until it
    meets one below the trained length: hence the short prompts first, and the one token in between.
    """
    ids = tokens(case)
    greedy = [reference_greedy(model, row[:n], GREEDY) for row, n in zip(ids, PROMPTS, strict=True)]
    reference_logits(model, ids[:, :1])
    return reference_logits(model, ids), greedy


def _depends_on_length(config: transformers.PretrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type") in ("dynamic", "longrope")


def main(names: list[str]) -> None:
    GOLDENS.mkdir(exist_ok=True)
    for model_type in sorted({values["model_type"] for values in CASES.values()}):
        path = GOLDENS / f"{model_type}.npz"
        cases = [case for case, values in CASES.items() if values["model_type"] == model_type]
        kept = dict(np.load(path)) if path.exists() else {}
        arrays = {key: value for key, value in kept.items() if key.split("/")[0] in cases}
        for case in cases:
            if names and case not in names:
                continue
            logits, greedy = reference(case, reference_model(case))
            arrays[f"{case}/logits"] = logits[:, ROWS]
            arrays[f"{case}/greedy"] = np.array(greedy, np.uint8)
            print(f"{case}: logits in [{logits.min():.2f}, {logits.max():.2f}], continues {greedy[0][:8]}")
        np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
