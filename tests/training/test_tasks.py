"""What is trained changes what it says it changes, counts right, and what is written says the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxchat
from jaxchat.checkpoints.adapter_write import Strength, runs_of
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import load_params
from jaxchat.errors import UsageError
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.mixed import MixedTensor
from jaxchat.quant import QuantFormat, quantize
from jaxchat.training import forward, lora, losses
from jaxchat.training.parts import LowRank, plain
from jaxchat.training.setups import SETUPS, Base, Choices, new_slots
from jaxchat.training.tasks import Text
from jaxchat.training.trainer import LOSS, Arrays
from tests.training.support import batch_of, random_texts, run_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = jnp.dtype(jnp.float32)
in_full = pytest.mark.full


def some(mark, *values):
    return [pytest.param(value, marks=mark) for value in values]


CHOICES = Choices(strength=Strength(4, 8.0))


@pytest.fixture
def base_of(tiny_directory):
    def make(model_type="llama", plan="all", **options):
        directory = ModelDirectory.at(tiny_directory(model_type))
        config, params = load_params(directory, **options)
        chosen = LayerPlan.identity(config.num_layers).select(plan)
        return Base(
            directory=directory, name="tiny", config=config, params=params, plan=chosen, dtype=FLOAT32
        )

    return make


def arrays(batch):
    return Arrays(*(jnp.asarray(part) for part in (batch.tokens, batch.weights, batch.starts)))


def loss_of(task, trained, frozen, batch):
    found = jax.jit(task.loss, static_argnums=())(trained, frozen, arrays(batch), None)
    return float(found.total) / float(found.weight)


def scored(model, data):
    """The same loss by the path that serves requests."""
    batches = data.epoch(0)
    scores = model.score(token_ids=[row.tolist() for batch in batches for row in batch.tokens])
    return -np.mean([score.logprobs[1:] if len(score.logprobs) == len(score.token_ids) else score.logprobs
                     for score in scores])  # fmt: skip


def trained_run(directory, setup, data, **settings):
    """A short run of a setup: what comes out, the losses, and what is written."""
    trainer = run_of(
        directory, setup.task, frozen=setup.frozen, initial=setup.initial, data=data, held_out=data,
        **{"max_steps": 8, "eval_steps": 100, **settings},
    )  # fmt: skip
    before = trainer.begin().get(LOSS)
    outcome = trainer.run()
    trainer.close()
    return before, outcome, setup.export(outcome.state.trained, directory)


# --- each task


@pytest.mark.parametrize("model_type", ["llama", *some(in_full, "gpt2", "gemma2", "phi3")])
def test_lora_lowers_the_loss_and_the_adapter_says_the_same(base_of, tmp_path, model_type):
    base, data = base_of(model_type), random_texts(67)
    before, outcome, place = trained_run(tmp_path, SETUPS["lora"](base, CHOICES), data)
    assert before == pytest.approx(scored(jaxchat.load(base.directory), data), rel=1e-4)
    assert outcome.best_loss < before - 0.1
    model = jaxchat.load(base.directory, adapter=place)
    assert scored(model, data) == pytest.approx(outcome.best_loss, rel=1e-4)
    values = json.loads((place / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"], values["peft_type"]) == (4, 8.0, "LORA")


@pytest.mark.parametrize("plan", [*some(in_full, "0,1,2,2"), "0,0,1,1,2"])
def test_new_blocks_change_nothing_at_first_and_only_they_are_trained(base_of, tmp_path, plan):
    base, data = base_of(plan=plan), random_texts(67)
    before, outcome, place = trained_run(tmp_path, SETUPS["blocks"](base, CHOICES), data)
    assert before == pytest.approx(scored(jaxchat.load(base.directory), data), rel=1e-5)
    assert outcome.best_loss < before - 0.1
    model = jaxchat.load(place)
    assert model.config.num_layers == len(base.plan)
    assert scored(model, data) == pytest.approx(outcome.best_loss, rel=1e-4)
    old, new = (load_file(path / "model.safetensors") for path in (base.directory.path, place))
    for slot, (layer, own) in enumerate(zip(base.layers, new_slots(base.plan), strict=True)):
        same = all(
            np.array_equal(old[f"model.layers.{layer}.{name}"], new[f"model.layers.{slot}.{name}"])
            for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
        )
        assert same != own
    np.testing.assert_array_equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])


@pytest.mark.parametrize("heal_with", [*some(in_full, "lora"), "layers"])
def test_healing_learns_what_the_whole_model_says(base_of, tmp_path, heal_with):
    base, data = base_of(plan="0,2"), random_texts(67)
    choices = dataclasses.replace(CHOICES, heal_with=heal_with)
    setup = SETUPS["heal"](base, choices)
    batch = data.epoch(0)[0]
    key = jax.random.key(0)
    apart = setup.task.loss(setup.initial, setup.frozen, arrays(batch), key)
    _, outcome, place = trained_run(tmp_path, setup, data, max_steps=30)
    near = setup.task.loss(outcome.state.trained, setup.frozen, arrays(batch), key)
    assert float(near.total) < 0.6 * float(apart.total)
    model = jaxchat.load(base.directory, adapter=place) if heal_with == "lora" else jaxchat.load(place)
    assert model.config.num_layers == 2
    assert scored(model, data) == pytest.approx(outcome.best_loss, rel=1e-4)


def test_a_healed_student_that_is_the_teacher_has_no_loss(base_of):
    """The divergence is 0 where both are the same: a plan of all layers, in order, by another name."""
    base, data = base_of(plan="0,1"), random_texts(67)
    setup = SETUPS["heal"](base, CHOICES)
    same = dataclasses.replace(setup.task, whole=base.running)
    found = same.loss(setup.initial, setup.frozen, arrays(data.epoch(0)[0]), jax.random.key(0))
    assert abs(float(found.total)) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # the latter ties its head
def test_full_training_trains_everything(base_of, tmp_path, model_type):
    base, data = base_of(model_type), random_texts(67)
    before, outcome, place = trained_run(tmp_path, SETUPS["full"](base, CHOICES), data)
    assert outcome.best_loss < before - 0.5
    model = jaxchat.load(place)
    assert model.config == base.config
    assert scored(model, data) == pytest.approx(outcome.best_loss, rel=1e-4)


@pytest.mark.parametrize(
    ("task", "plan", "complaint"),
    [
        ("blocks", "all", "there is no new layer in this plan"),
        ("blocks", "0,0,2", "is not the model's own, each layer once and in order"),
        ("heal", "all", "there is nothing to heal"),
        ("full", "0,1", "trains the model's own layers"),
        ("lora", "[0, [1, 0.5, 1.0], 2]", "slot 1 is scaled by 0.5 and 1"),
    ],
)
def test_plans_that_a_task_cannot_take_are_refused(base_of, task, plan, complaint):
    with pytest.raises(UsageError, match=complaint):
        SETUPS[task](base_of(plan=plan), CHOICES)


def test_unknown_targets_are_refused(base_of):
    choices = dataclasses.replace(CHOICES, targets="q,query")
    with pytest.raises(UsageError, match="'query' is none of all, attention, mlp, q, k, v, o"):
        SETUPS["lora"](base_of(), choices)


@pytest.mark.parametrize(
    ("plan", "new"),
    [
        ("0,1,1,2", (False, False, True, False)),
        ("[0, [0, 0, 0], 1, 2]", (False, True, False, False)),
        ("[0, 1, 2, 2, [2, 0, 0]]", (False, False, False, False, True)),
    ],
)
def test_new_layers_are_those_scaled_to_nothing_or_else_repetitions(plan, new):
    assert new_slots(LayerPlan.identity(3).select(plan)) == new


def test_runs_of_layers_are_peft_s_replication():
    assert runs_of([0, 1, 2, 2, 5, 6, 0]) == [[0, 3], [2, 3], [5, 7], [0, 1]]


# --- frozen weights, in any form


def halves(values, name):
    """A stack held in two formats, layer by layer."""
    formats = [QuantFormat.parse("int8"), QuantFormat.parse("q6_k")]
    count = values.shape[0]
    parts = [
        jax.tree.map(jnp.asarray, quantize(np.asarray(values[start::2]), fmt, name=name))
        for start, fmt in enumerate(formats)
    ]
    return MixedTensor(
        parts=tuple(parts), part=tuple(i % 2 for i in range(count)), row=tuple(i // 2 for i in range(count))
    )


@pytest.mark.parametrize("form", [*some(in_full, "int8", "int4:64:affine", "q5_k"), "bfloat16", "mixed"])
def test_gradients_pass_through_frozen_weights_in_any_form(base_of, form, rng):
    """They are those of the numbers that these stand for."""
    options = {} if form == "mixed" else {"dtype": form} if form == "bfloat16" else {"quant": form}
    if "quant" in options:
        options["quant"] = QuantFormat.parse(form)
    base = base_of(**options)
    if form == "mixed":
        table = {param.name: param for param in parameter_table(base.config)}
        params = {
            name: halves(value, name) if table[name].role == "weight" else value
            for name, value in base.params.items()
        }
        base = dataclasses.replace(base, params=params)
    setup = SETUPS["lora"](base, CHOICES)
    trained = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.1, x.dtype), setup.initial)
    batch = arrays(batch_of(rng.integers(0, 67, (2, 9))))

    @jax.jit
    def gradient(trained, params):
        return jax.grad(lambda t: setup.task.loss(t, params, batch, None).total)(trained)

    found, expected = gradient(trained, base.params), gradient(trained, plain(base.params))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_dropout_is_of_the_deltas_and_off_without_a_key(base_of, rng):
    base = base_of()
    setup = SETUPS["lora"](base, dataclasses.replace(CHOICES, dropout=0.5))
    trained = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.1, x.dtype), setup.initial)
    batch = arrays(batch_of(rng.integers(0, 67, (2, 9))))
    loss = jax.jit(lambda trained, key: setup.task.loss(trained, base.params, batch, key).total)
    first, again, other = (loss(trained, jax.random.key(seed)) for seed in (1, 1, 2))
    assert first == again != other
    without = loss(trained, None)
    assert without not in (first, other)
    silent = jax.tree.map(jnp.zeros_like, trained)
    assert loss(silent, jax.random.key(1)) == loss(silent, None)


# --- batches


def test_packed_texts_count_as_they_do_alone(base_of, rng):
    """Neither attention nor positions nor the loss crosses from one to the other."""
    base = base_of("gemma3_text")  # windows, and RoPE of two kinds
    task = Text(base.config, FLOAT32, LowRank(1.0))
    trained = lora.initial(base.config, lora.targets_of(base.config, "all"), 2, jax.random.key(0))
    texts = [rng.integers(0, 67, n) for n in (11, 5, 8)]
    lengths = np.array([len(text) for text in texts])
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    weights = np.ones(lengths.sum())
    weights[begins] = 0
    packed = batch_of([np.concatenate(texts)], [weights], [np.repeat(begins, lengths)])
    alone = [batch_of([text], [[0.0, *[1.0] * (len(text) - 1)]]) for text in texts]
    found = task.loss(trained, base.params, arrays(packed), None)
    apart = [task.loss(trained, base.params, arrays(batch), None) for batch in alone]
    assert float(found.weight) == sum(float(loss.weight) for loss in apart)
    assert float(found.total) == pytest.approx(sum(float(loss.total) for loss in apart), rel=1e-5)


def test_what_is_kept_of_a_layer_changes_no_gradient(base_of, rng):
    base = base_of()
    trained = lora.initial(base.config, lora.targets_of(base.config, "all"), 2, jax.random.key(0))
    batch = arrays(batch_of(rng.integers(0, 67, (2, 9))))
    gradients = [
        jax.grad(lambda t, kept=kept: Text(base.config, FLOAT32, LowRank(1.0), kept)
                 .loss(t, base.params, batch, None).total)(trained)
        for kept in ("inputs", "products")
    ]  # fmt: skip
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 255, 256, 700])
def test_losses_in_blocks_are_those_in_one_piece(base_of, rng, count):
    """Rows of weight 0 cost nothing and change nothing."""
    base = base_of()
    tokens = jnp.asarray(rng.integers(0, 67, (1, count + 1)))
    step = forward.whole_sequences(base.config, base.params, tokens, dtype=FLOAT32)
    hidden = jnp.asarray(rng.standard_normal((1, count + 1, base.config.hidden_size)), jnp.float32)
    weights = jnp.asarray(rng.random((1, count + 1)) * rng.integers(0, 2, (1, count + 1)), jnp.float32)

    def whole(hidden):
        chosen = jax.nn.log_softmax(jaxchat.model.logits(step, hidden[:, :-1]))
        picked = jnp.take_along_axis(chosen, tokens[:, 1:, None], -1)[..., 0]
        return -2 * jnp.sum(picked * weights[:, 1:])

    def blocks(hidden):
        return 2 * losses.next_token(step, hidden, tokens, weights).total

    found, expected = (jax.jit(jax.value_and_grad(f))(hidden) for f in (blocks, whole))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
