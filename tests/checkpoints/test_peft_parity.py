"""Logits with adapters equal those of PEFT, live, for every family and kind; merged, in transformers."""

import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import jaxchat  # noqa: E402
from jaxchat.adapter_use import AdapterUse  # noqa: E402
from jaxchat.checkpoints.merged import merged_directory  # noqa: E402
from jaxchat.checkpoints.write import to_hf  # noqa: E402
from tests.support.adapters import logits_of  # noqa: E402
from tests.support.make_goldens import reference_logits, reference_model  # noqa: E402
from tests.support.parity_cases import CASES, TOLERANCE, error, tokens  # noqa: E402

pytestmark = pytest.mark.parity

MODELS = list({values["model_type"]: case for case, values in reversed(CASES.items())}.values())
"""A case of every model type."""
EMBEDDING = {"gpt2": "wte"}
PROJECTION = {"gpt2": "c_attn", "phi3": "qkv_proj"}
NORM = {"gpt2": "ln_f"}


def _first(model_type: str) -> str:
    return PROJECTION.get(model_type, "q_proj")


def _embedding(model_type: str) -> str:
    return EMBEDDING.get(model_type, "embed_tokens")


KINDS: dict[str, Any] = {
    "plain": lambda t: {"target_modules": "all-linear"},
    "some layers": lambda t: {"target_modules": [_first(t)], "layers_to_transform": [0, 2]},
    "ranks and alphas": lambda t: {
        "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {_first(t): 2},
        "alpha_pattern": {rf".*\.1\..*{_first(t)}": 3, _first(t): 5},
    },
    "dora": lambda t: {"target_modules": "all-linear", "use_dora": True},
    "embedding and head": lambda t: {"target_modules": [_embedding(t), "lm_head", _first(t)]},
    "dora of the embedding": lambda t: {"target_modules": [_embedding(t)], "use_dora": True},
    "saved modules": lambda t: {
        "target_modules": [_first(t)],
        "modules_to_save": [_embedding(t), "lm_head", NORM.get(t, "norm")],
    },
    "a saved embedding": lambda t: {"target_modules": [_first(t)], "modules_to_save": [_embedding(t)]},
    "a tied saved embedding": lambda t: {
        "target_modules": [_first(t)], "modules_to_save": [_embedding(t)], "ensure_weight_tying": True,
    },
    "a saved projection": lambda t: {
        "target_modules": [_first(t)], "modules_to_save": [{"gpt2": "c_fc"}.get(t, "down_proj")],
    },
    "single tokens": lambda t: {
        "target_modules": [_first(t)], "trainable_token_indices": {_embedding(t): [3, 5, 50, 96]},
    },
    "biases": lambda t: {"target_modules": [_first(t)], "bias": "all"},
    "bias of the delta": lambda t: {"target_modules": [_first(t)], "lora_bias": True},
}  # fmt: skip
WITH_BIASES = ("gpt2", "qwen2")


def _cases():
    for case in MODELS:
        for kind in KINDS:
            if "bias" not in kind or CASES[case]["model_type"] in WITH_BIASES:
                yield pytest.param(case, kind, id=f"{case}-{kind}")


def adapted(case: str, kind: str):
    """A PEFT model with a random adapter of a kind."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **KINDS[kind](CASES[case]["model_type"])}
    found = peft.get_peft_model(reference_model(case), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, values in found.named_parameters():
            if values.requires_grad and "magnitude" not in name:
                values.add_(torch.randn_like(values) * 0.1)
            elif values.requires_grad:
                values.mul_(1 + torch.rand_like(values))
    return found


@pytest.mark.parametrize(("case", "kind"), _cases())
def test_logits_with_an_adapter_and_merged_equal_those_of_peft(case, kind, tmp_path):
    reference_model(case).save_pretrained(tmp_path / "base")
    reference = adapted(case, kind)
    reference.save_pretrained(tmp_path / "adapter")
    ids = tokens(case)[:, :40]
    expected = reference_logits(reference, ids)
    loaded = jaxchat.load(tmp_path / "base", adapter=str(tmp_path / "adapter"), kernels="reference")
    base = logits_of(loaded, ids, [(), ()])
    assert error(base, expected) > 0.01  # the adapter does something
    assert error(base, reference_logits(reference_model(case), ids)) <= TOLERANCE
    assert error(logits_of(loaded, ids), expected) <= TOLERANCE

    if kind == "bias of the delta" and CASES[case]["model_type"] not in WITH_BIASES:
        return
    to_hf(merged_directory(tmp_path / "base", [AdapterUse(str(tmp_path / "adapter"))]), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    assert error(reference_logits(merged.eval(), ids), expected) <= TOLERANCE


def test_strength_is_peft_scaling(tmp_path):
    case = MODELS[0]
    reference_model(case).save_pretrained(tmp_path / "base")
    reference = adapted(case, "plain")
    reference.save_pretrained(tmp_path / "adapter")
    for module in reference.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)
    ids = tokens(case)[:, :40]
    loaded = jaxchat.load(tmp_path / "base", adapter=f"{tmp_path / 'adapter'}=0.3")
    assert error(logits_of(loaded, ids), reference_logits(reference, ids)) <= TOLERANCE


def test_a_batch_of_several_adapters_is_that_of_peft(tmp_path):
    case, ids = MODELS[0], tokens(MODELS[0])[:, :40]
    reference_model(case).save_pretrained(tmp_path / "base")
    for kind in ("plain", "ranks and alphas"):
        adapted(case, kind).save_pretrained(tmp_path / kind)
    reference = peft.PeftModel.from_pretrained(
        reference_model(case), tmp_path / "plain", adapter_name="plain"
    )
    reference.load_adapter(tmp_path / "ranks and alphas", adapter_name="other")
    reference.eval()
    expected = {"__base__": reference_logits(reference_model(case), ids[:1])}
    for name in ("plain", "other"):
        reference.set_adapter(name)
        expected[name] = reference_logits(reference, ids[:1])
    reference.base_model.set_adapter(["plain", "other"])
    expected["both"] = reference_logits(reference, ids[:1])
    loaded = jaxchat.load(
        tmp_path / "base", adapter=[str(tmp_path / kind) for kind in ("plain", "ranks and alphas")]
    )
    one, other = AdapterUse("plain"), AdapterUse("ranks and alphas")
    uses = [(), (one,), (other,), (one, other)]
    found = logits_of(loaded, [ids[0]] * 4, uses)
    for logits, wanted in zip(found, expected.values(), strict=True):
        assert error(logits[None], wanted) <= TOLERANCE


def test_what_peft_saves_is_known(tmp_path):
    reference = adapted(MODELS[0], "plain")
    reference.save_pretrained(tmp_path)
    from jaxchat.checkpoints import adapter_config

    known = {*adapter_config.LoraConfig.__dataclass_fields__, *adapter_config._WITHOUT_EFFECT}
    assert json.loads((tmp_path / "adapter_config.json").read_text()).keys() <= known | {
        *adapter_config._UNSUPPORTED
    }
    assert np.isfinite(reference_logits(reference, tokens(MODELS[0])[:, :4])).all()
