"""A plan computes what a physically unrolled checkpoint does, in one executable, without copying the model.

An unrolled checkpoint is an ordinary Hugging Face directory whose layers are copies of the source layers in
the plan's order, with every per-layer configuration field copied alike.
"""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxchat.layer_plan import LayerPlan, Slot
from tests.support.parity_cases import Runner, error, run
from tests.support.tiny import write_tiny_hf

S, F = "sliding_attention", "full_attention"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 4, "attention_bias": True, "mlp_bias": True}),
    "qwen2": (
        "qwen2",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": [F, S, F, S],
        },
    ),
    "gemma2": ("gemma2", {"num_hidden_layers": 4, "layer_types": [S, F, S, F]}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 4, "layer_types": [S, F, F, S]}),
    "phi3": ("phi3", {"num_hidden_layers": 4}),
    "gpt2": ("gpt2", {"n_layer": 4}),
    "gpt2-scaled-by-layer": ("gpt2", {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True}),
}
SLOTS = 8
PLANS = {
    "duplicates": "0,1,1,2,2,2,3",
    "pruned": "0,3",
    "reversed": "::-1",
    "single-layer": "2",
    "self-merge-with-more-slots-than-layers": "0:3,1:4,2:",
}
SCALED_PLANS = {
    "scaled": "[[0, 1.0, 0.5], [1, 0.25, 1.5], 1, [3, -0.5, 2.0]]",
    "halves-skipped": "[0, [1, 0.0, 1.0], [2, 0.75, 0.0], 3, [2, 0.0, 0.5]]",
    "identity-slots": "[[3, 0, 0], 0, [1, 0, 0], 2, [3, 0, 0]]",
}
TOKENS = np.random.RandomState(0).randint(3, 67, 24)

MIXED = ("qwen2", "gemma2", "gemma3")
"""Models whose layers differ: every unrolled checkpoint is a configuration of its own, and compiled."""
SAMPLED = ("self-merge-with-more-slots-than-layers", "reversed", "halves-skipped")


def products(plans):
    """Every model under every plan; of mixed models some are left to `make test-full`."""
    return [
        pytest.param(
            model,
            spec,
            id=f"{model}-{name}",
            marks=pytest.mark.full if model in MIXED and name not in SAMPLED else (),
        )
        for model in MODELS
        for name, spec in plans.items()
    ]


_ATTN_OUTPUT = (".self_attn.o_proj.", ".attn.c_proj.")
_MLP_OUTPUT = (".mlp.down_proj.", ".mlp.c_proj.")


def unroll(source: Path, target: Path, plan: LayerPlan) -> Path:
    """Writes the unrolled checkpoint; scales are multiplied into the output projections and their biases.

    The last slot's layer is repeated up to `SLOTS` layers, none of which the caller runs: checkpoints of
    different lengths are one configuration.
    """
    plan = LayerPlan((*plan, *[plan.slots[-1]] * (SLOTS - len(plan))), plan.num_layers)
    config = json.loads((source / "config.json").read_text())
    for key in ("num_hidden_layers", "n_layer"):
        if key in config:
            config[key] = len(plan)
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][slot.layer] for slot in plan]
    by_layer = config.pop("scale_attn_by_inverse_layer_idx", False)
    tensors: dict[str, np.ndarray] = {}
    for name, value in load_file(source / "model.safetensors").items():
        layered = re.fullmatch(r"(.*\.(?:layers|h)\.)(\d+)(\..*)", name)
        if not layered:
            tensors[name] = value
            continue
        before, layer, after = layered.groups()
        if by_layer and ".attn.c_attn." in after:  # the queries come first among the outputs, the last axis
            width = value.shape[-1] // 3
            value[..., :width] /= int(layer) + 1
        for position, slot in enumerate(plan):
            if slot.layer == int(layer):
                tensors[f"{before}{position}{after}"] = value * _scale(after, slot)
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    return target


def _scale(name: str, slot: Slot) -> np.float32:
    if name.startswith(_ATTN_OUTPUT):
        return np.float32(slot.attn_scale)
    return np.float32(slot.mlp_scale if name.startswith(_MLP_OUTPUT) else 1)


@pytest.fixture(scope="module")
def source(tiny_directory):
    """`source(model)`: its directory and a runner of it, loaded once."""

    @functools.cache
    def load(model: str) -> tuple[Path, Runner]:
        model_type, changes = MODELS[model]
        directory = tiny_directory(model_type, **changes)
        return directory, Runner(directory, batch=1, slots=SLOTS)

    return load


def unrolled(directory: Path, target: Path, plan: LayerPlan) -> Runner:
    """A runner of the first layers of the unrolled checkpoint: one for each slot."""
    runner = Runner(unroll(directory, target, plan), batch=1, slots=SLOTS)
    return runner.reset(LayerPlan.parse(f"0:{len(plan)}", SLOTS))


def outputs(runner: Runner, *, stepwise: bool = False) -> np.ndarray:
    """Logits of a prompt and of more tokens that find its keys and values in the cache."""
    cuts = [0, 17, *range(18, 25)] if stepwise else [0, 17, 24]
    return np.concatenate([runner.feed([TOKENS[a:b]])[0] for a, b in itertools.pairwise(cuts)])


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("model", "spec"), products(PLANS))
def test_plan_equals_the_unrolled_checkpoint(source, model: str, spec: str, tmp_path: Path):
    directory, runner = source(model)
    plan = LayerPlan.parse(spec, 4)
    expected = unrolled(directory, tmp_path, plan)
    stepwise = len(plan) == SLOTS
    assert error(outputs(runner.reset(plan), stepwise=stepwise), outputs(expected, stepwise=stepwise)) <= 1e-6


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("model", "spec"), products(SCALED_PLANS))
def test_scales_equal_those_multiplied_into_the_output_projections(
    source, model: str, spec: str, tmp_path: Path
):
    directory, runner = source(model)
    plan = LayerPlan.parse(spec, 4)
    assert error(outputs(runner.reset(plan)), outputs(unrolled(directory, tmp_path, plan))) <= 2e-6


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("model", MODELS)
def test_identity_slots_are_skipped_and_change_not_one_bit(source, model: str):
    _, runner = source(model)
    with_identities = LayerPlan.parse(SCALED_PLANS["identity-slots"], 4)
    assert (len(with_identities), with_identities.arrays(SLOTS).length) == (5, 2)
    skipped = outputs(runner.reset(with_identities))
    assert np.array_equal(skipped, outputs(runner.reset(LayerPlan.parse("0,2", 4))))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("model", MODELS)
def test_order_of_heterogeneous_layers_matters(source, model: str):
    _, runner = source(model)
    forward, backward = (outputs(runner.reset(LayerPlan.parse(s, 4))) for s in ("all", "::-1"))
    assert error(backward, forward) > 1e-3


# --- one executable


def random_plan(rng: np.random.RandomState, num_layers: int) -> LayerPlan:
    def scale() -> float:
        return rng.choice([1.0, 1.0, 0.0, rng.uniform(-2, 2)])

    count = rng.randint(1, SLOTS + 1)
    slots = [Slot(rng.randint(num_layers), scale(), scale()) for _ in range(count)]
    return LayerPlan(tuple(slots), num_layers)


def test_one_executable_serves_every_plan(tmp_path: Path):
    write_tiny_hf(tmp_path, "gemma3_text", num_hidden_layers=4)
    runner = Runner(tmp_path, batch=1, slots=SLOTS)
    # A function of its own: jax.jit shares its cache among wrappers of one function.
    step = jax.jit(functools.partial(run.__wrapped__, runner.config), donate_argnums=1)
    rng = np.random.RandomState(1)
    plans = [random_plan(rng, 4) for _ in range(50)]
    assert len({len(plan) for plan in plans}) == SLOTS
    one, none = np.array([1], np.int32), np.array([0], np.int32)
    seen = []
    for plan in [*plans, plans[0]]:
        runner.reset(plan)
        logits, _ = step(runner.params, runner.cache, runner.plan, one[:, None], none, one, one)
        seen.append(np.asarray(logits))
    assert step._cache_size() == 1
    assert all(np.isfinite(logits).all() for logits in seen)
    assert len({logits.tobytes() for logits in seen[:-1]}) > 40
    assert np.array_equal(seen[0], seen[-1])


# --- nothing of the size of the stack or of the cache is copied in a decode step


@pytest.fixture(scope="module")
def decode_step(tiny_directory):
    """A 24-layer model's decode step for plans of up to 32 slots: the runner and the executable."""

    @functools.cache
    def compiled(model_type: str, batch: int, capacity: int):
        sizes = {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 192}
        if model_type == "gpt2":
            sizes = {"n_layer": 24, "n_embd": 64, "n_inner": 192}
        runner = Runner(tiny_directory(model_type, **sizes), batch=batch, slots=32, capacity=capacity)
        ones = np.ones(batch, np.int32)
        lowered = run.lower(
            runner.config, runner.params, runner.cache, runner.plan, ones[:, None], ones, ones, ones
        )
        return runner, lowered.compile()

    return compiled


def instructions_making(hlo: str, shape: str) -> dict[str, str]:
    """Instruction name -> operation, for instructions outside fusions whose result has the shape.

    A fusion counts as the operation at its root.
    """
    computations = {}
    for text in hlo.split("\n\n"):
        if header := re.match(r"\s*(?:ENTRY )?(%[\w.\-]+) \(", text):
            computations[header[1]] = text
    fused = set(re.findall(r" fusion\(.*?calls=(%[\w.\-]+)", hlo))
    found = {}
    for name, text in computations.items():
        if name in fused:
            continue
        pattern = rf"(%[\w.\-]+) = {re.escape(shape)}(?:{{[\d,]*}})? ([\w\-]+)\((.*)"
        for instruction, operation, rest in re.findall(pattern, text):
            if operation == "fusion":
                body = computations[re.search(r"calls=(%[\w.\-]+)", rest)[1]]
                operation = re.search(r"ROOT \S+ = \S+ ([\w\-]+)\(", body)[1]
            found[instruction] = operation
    return found


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(("batch", "capacity"), [(1, 1024), (2, 1024), (2, 64), (1, 64)])
def test_a_decode_step_updates_the_cache_in_place(decode_step, model_type: str, batch: int, capacity: int):
    runner, compiled = decode_step(model_type, batch, capacity)
    shape = f"f32[{','.join(map(str, runner.cache.k.shape))}]"
    hlo = compiled.as_text()
    made = set(instructions_making(hlo, shape).values())
    assert "dynamic-update-slice" in made or "scatter" in made
    assert made <= {"parameter", "get-tuple-element", "bitcast", "dynamic-update-slice", "scatter"}
    # Both halves of the donated cache are outputs 1 and 2 of the executable.
    aliases = re.search(r"input_output_alias={(.*?)}, entry", hlo)[1]
    assert "{1}:" in aliases
    assert "{2}:" in aliases
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in runner.cache)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_temporaries_of_a_decode_step_are_small_beside_one_stacked_weight(
    decode_step, model_type: str, batch: int
):
    runner, compiled = decode_step(model_type, batch, 1024)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < runner.params["layers.up.weight"].nbytes / 4
    assert temporaries < runner.cache.k.nbytes / 4
