"""Training beside torch, live: gradients of every family, LoRA beside PEFT, and what is written."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import jaxchat  # noqa: E402
from jaxchat.checkpoints.adapter_write import Strength  # noqa: E402
from jaxchat.checkpoints.directory import ModelDirectory  # noqa: E402
from jaxchat.checkpoints.load import load_params  # noqa: E402
from jaxchat.families import parameter_table  # noqa: E402
from jaxchat.layer_plan import LayerPlan  # noqa: E402
from jaxchat.training.setups import SETUPS, Base, Choices  # noqa: E402
from jaxchat.training.tasks import Everything  # noqa: E402
from jaxchat.training.trainer import LOSS, Arrays  # noqa: E402
from tests.support.make_goldens import reference_model  # noqa: E402
from tests.support.parity_cases import CASES, hf_tensors, tokens  # noqa: E402
from tests.training.support import Listed, batch_of, run_of  # noqa: E402

pytestmark = pytest.mark.parity

MODELS = list({values["model_type"]: case for case, values in reversed(CASES.items())}.values())
FLOAT32 = jnp.dtype(jnp.float32)


def directory_of(case: str, path) -> ModelDirectory:
    (path / "config.json").write_text(json.dumps(CASES[case]))
    save_file(hf_tensors(case), path / "model.safetensors")
    return ModelDirectory.at(path)


def base_of(case: str, path, plan: str = "all") -> Base:
    directory = directory_of(case, path)
    config, params = load_params(directory)
    chosen = LayerPlan.identity(config.num_layers).select(plan)
    return Base(directory=directory, name=str(path), config=config, params=params, plan=chosen, dtype=FLOAT32)


def batches(case: str, count: int = 5) -> list[Any]:
    rng = np.random.default_rng(0)
    return [batch_of(rng.permutation(tokens(case)[:, :24], axis=1)) for _ in range(count)]


def torch_loss(model, batch):
    ids = torch.tensor(np.asarray(batch.tokens, np.int64))
    logits = model(ids, use_cache=False).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("case", MODELS)
def test_gradients_of_every_parameter_are_those_of_torch(case, tmp_path):
    """Torch's in float64, ours in float32."""
    base, batch = base_of(case, tmp_path), batches(case, 1)[0]
    reference = reference_model(case).double()
    torch_loss(reference, batch).backward()
    expected = {name: values.grad.numpy() for name, values in reference.named_parameters()}
    arrays = Arrays(*(jnp.asarray(part) for part in (batch.tokens, batch.weights, batch.starts)))
    task = Everything(base.config, FLOAT32)

    @jax.jit
    def gradient(params):
        def mean(params):
            loss = task.loss(params, (), arrays, None)
            return loss.total / loss.weight

        return jax.grad(mean)(params)

    found = gradient(base.params)
    for param in parameter_table(base.config):
        for layer in range(base.config.num_layers if param.per_layer else 1):
            wanted = expected[param.hf.format(layer)]
            wanted = wanted.T if param.transposed else wanted
            if param.fused:
                start, stop = param.fused_range(base.config)
                wanted = wanted[start:stop]
            got = np.asarray(found[param.name][layer] if param.per_layer else found[param.name])
            scale = np.abs(wanted).max()
            assert np.abs(got - wanted).max() <= 2e-4 * scale + 1e-7, (param.name, layer)


@pytest.mark.parametrize("case", MODELS)
def test_lora_trains_as_in_peft_and_peft_loads_what_comes_of_it(case, tmp_path):
    """Step for step where modules are not fused; then logits, with the adapter as PEFT reads it."""
    (tmp_path / "model").mkdir()
    base = base_of(case, tmp_path / "model")
    setup = SETUPS["lora"](base, Choices(strength=Strength(4, 8.0)))
    data = batches(case)
    run = run_of(
        tmp_path / "run", setup.task, frozen=setup.frozen, initial=setup.initial, data=Listed(data),
        max_steps=5, learning_rate=1e-2,
    )  # fmt: skip
    outcome = run.run()
    place = setup.export(outcome.state.trained, tmp_path / "run")
    run.close()
    losses = [line["loss"] for line in run._journal.lines]

    loaded = peft.PeftModel.from_pretrained(reference_model(case), place).eval()
    ids = tokens(case)
    with torch.no_grad():
        logits = loaded(torch.tensor(ids), use_cache=False).logits.numpy()
    model = jaxchat.load(tmp_path / "model", adapter=place)
    scores = model.score(token_ids=[row.tolist() for row in ids])
    wanted = torch.log_softmax(torch.tensor(logits), -1).numpy()
    for row, score in zip(range(len(ids)), scores, strict=True):
        picked = wanted[row, np.arange(ids.shape[1] - 1), ids[row, 1:]]
        np.testing.assert_allclose(score.logprobs[-len(picked) :], picked, atol=2e-3)

    if any(param.fused for param in parameter_table(base.config)):
        return
    table = {param.name: param for param in parameter_table(base.config)}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = peft.get_peft_model(reference_model(case), config)
    with torch.no_grad():
        own = dict(trained.named_parameters())
        for name in setup.initial:
            for layer in range(base.config.num_layers):
                module = table[name].hf.format(layer).removesuffix(".weight")
                key = f"base_model.model.{module}.lora_A.default.weight"
                own[key].copy_(torch.tensor(np.asarray(setup.initial[name].a[layer])))
    chosen = [values for values in trained.parameters() if values.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0)
    expected = []
    for batch in data:
        loss = torch_loss(trained, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        expected.append(float(loss.detach()))
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


@pytest.mark.parametrize("plan", ["0,1,2,3,3", "0,0,1,2,2,3"])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_transformers_loads_an_expanded_model_with_equal_logits(case, plan, tmp_path):
    (tmp_path / "model").mkdir()
    case = next(name for name in MODELS if CASES[name]["model_type"] == case)
    base = base_of(case, tmp_path / "model", plan)
    setup = SETUPS["blocks"](base, Choices(strength=Strength(4, 8.0)))
    run = run_of(
        tmp_path / "run", setup.task, frozen=setup.frozen, initial=setup.initial,
        data=Listed(batches(case)), max_steps=5,
    )  # fmt: skip
    outcome = run.run()
    place = setup.export(outcome.state.trained, tmp_path / "run")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
    assert loaded.config.num_hidden_layers == len(base.plan)
    run._held_out = Listed(batches(case, 2))
    run.state = outcome.state
    with torch.no_grad():
        expected = np.mean([float(torch_loss(loaded, batch)) for batch in batches(case, 2)])
    assert run.evaluate()[LOSS] == pytest.approx(expected, rel=1e-4)
