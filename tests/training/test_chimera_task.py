"""What Chimera's heads learn: the right tokens of the right rows, and only of texts that are learnt."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxchat
from jaxchat import model
from jaxchat.checkpoints.adapter_write import Strength
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import load_params
from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.chimera import ChimeraConfig, initial_params, teacher_forced
from jaxchat.training import forward
from jaxchat.training.chimera import ChimeraTask, losses_of
from jaxchat.training.setups import SETUPS, Base, Choices
from jaxchat.training.trainer import LOSS, Arrays
from tests.training.support import batch_of, random_texts, run_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = jnp.dtype(jnp.float32)
HEADS = ChimeraConfig(kind="shared", heads=3)


@pytest.fixture
def base(tiny_directory):
    directory = ModelDirectory.at(tiny_directory("llama"))
    config, params = load_params(directory)
    plan = LayerPlan.identity(config.num_layers)
    return Base(directory=directory, name="tiny", config=config, params=params, plan=plan, dtype=FLOAT32)


def arrays(batch):
    return Arrays(*(jnp.asarray(part) for part in (batch.tokens, batch.weights, batch.starts)))


def by_definition(base, params, batch, name):
    """The loss row by row, in numpy, from the network's own outputs; and how often each head is right."""
    step = forward.whole_sequences(base.config, base.params, jnp.asarray(batch.tokens), dtype=FLOAT32)
    hidden = forward.hidden_states(step)
    depths = teacher_forced(HEADS, params, step, jnp.asarray(batch.tokens), hidden)
    h, logits = np.asarray(hidden, np.float64), np.asarray(model.logits(step, hidden), np.float64)
    total, weight, right = 0.0, 0.0, []
    for k, depth in enumerate(depths):
        f, head = np.asarray(depth.hidden, np.float64), np.asarray(depth.logits, np.float64)
        hits = []
        for b, row in np.ndindex(batch.tokens.shape):
            if row + k + 2 >= batch.tokens.shape[1]:
                continue
            own = batch.weights[b, row + k + 2]
            said, wanted = head[b, row], logits[b, row + k + 1]
            chosen = {"tokens": wanted.argmax(), "labels": batch.tokens[b, row + k + 2]}.get(name)
            if chosen is not None:
                loss = np.log(np.exp(said).sum()) - said[chosen]
            elif name == "hidden":
                loss = np.mean((f[b, row] - h[b, row + k + 1]) ** 2)
            elif name == "logits":
                loss = np.mean((said - wanted) ** 2)
            else:
                p = np.exp(wanted) / np.exp(wanted).sum()
                loss = np.sum(p * (np.log(p) - said + np.log(np.exp(said).sum())))
            total, weight = total + own * loss, weight + own
            hits.append((own, own * (said.argmax() == wanted.argmax())))
        right.append(sum(hit for _, hit in hits) / sum(own for own, _ in hits))
    return total / weight, right


@pytest.mark.parametrize(
    "name",
    ["kl", *(pytest.param(n, marks=pytest.mark.full) for n in ("tokens", "hidden", "logits", "labels"))],
)
def test_losses_and_figures_are_those_of_their_definitions(base, rng, name):
    params = initial_params(HEADS, base.config, base.params, jax.random.key(0))
    batch = batch_of(rng.integers(0, 67, (2, 9)), rng.integers(0, 3, (2, 9)))
    task = ChimeraTask(base.config, FLOAT32, HEADS, (name,))
    loss = jax.jit(lambda p: task.loss(p, base.params, arrays(batch), None))(params)
    expected, right = by_definition(base, params, batch, name)
    assert float(loss.total / loss.weight) == pytest.approx(expected, rel=1e-4)
    figures = jax.jit(lambda p: task.figures(p, base.params, arrays(batch)))(params)
    for k, share in enumerate(right):
        one, five = (figures[f"head{k + 1}_top{n}"] for n in (1, 5))
        assert float(one.total / one.weight) == pytest.approx(share, abs=1e-6)
        assert float(five.total) >= float(one.total)


def test_nothing_is_learnt_across_texts_of_a_row(base, rng):
    """Packed, they cost what they cost alone, and their gradients add up."""
    params = initial_params(HEADS, base.config, base.params, jax.random.key(0))
    texts = [rng.integers(0, 67, n) for n in (9, 3, 7)]  # the second is too short for the last head
    lengths = np.array([len(text) for text in texts])
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    packed = batch_of([np.concatenate(texts)], None, [np.repeat(begins, lengths)])
    task = ChimeraTask(base.config, FLOAT32, HEADS)

    @jax.jit
    def of(params, batch):
        return jax.value_and_grad(lambda p: task.loss(p, base.params, batch, None).total)(params)

    found = of(params, arrays(packed))
    apart = [of(params, arrays(batch_of([text]))) for text in texts]
    assert float(found[0]) == pytest.approx(sum(float(loss) for loss, _ in apart), rel=1e-5)
    for name in params:
        total = sum(np.asarray(gradient[name]) for _, gradient in apart)
        np.testing.assert_allclose(found[1][name], total, rtol=1e-3, atol=1e-4, err_msg=name)


def test_gradients_are_those_of_the_plain_formula(base, rng):
    params = initial_params(HEADS, base.config, base.params, jax.random.key(0))
    batch = batch_of(rng.integers(0, 67, (2, 9)))
    task = ChimeraTask(base.config, FLOAT32, HEADS, ("labels", "hidden"))
    tokens = jnp.asarray(batch.tokens)

    def plain(params):
        step = forward.whole_sequences(base.config, base.params, tokens, dtype=FLOAT32)
        hidden = jax.lax.stop_gradient(forward.hidden_states(step))
        total = 0.0
        for k, depth in enumerate(teacher_forced(HEADS, params, step, tokens, hidden)):
            logprobs = jax.nn.log_softmax(depth.logits[:, : -k - 2])
            total -= jnp.take_along_axis(logprobs, tokens[:, k + 2 :, None], -1).sum()
            total += jnp.mean((depth.hidden[:, : -k - 2] - hidden[:, k + 1 : -1]) ** 2, -1).sum()
        return total

    found = jax.jit(jax.grad(lambda p: task.loss(p, base.params, arrays(batch), None).total))(params)
    expected = jax.jit(jax.grad(plain))(params)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_trained_heads_are_written_and_draft_the_same_text(base, tmp_path):
    choices = Choices(strength=Strength(4, 8.0), chimera=HEADS, chimera_losses="kl,hidden")
    setup, data = SETUPS["chimera"](base, choices), random_texts(67)
    trainer = run_of(
        tmp_path, setup.task, frozen=setup.frozen, initial=setup.initial, data=data, held_out=data,
        max_steps=40, eval_steps=100,
    )  # fmt: skip
    before = trainer.begin()
    outcome = trainer.run()
    after = trainer.evaluate()
    place = setup.export(outcome.state.trained, tmp_path)
    assert after[LOSS] < 0.8 * before[LOSS]
    assert after["head1_top1"] > before["head1_top1"] + 0.2
    said = json.loads((place / "chimera_config.json").read_text())
    assert (said["kind"], said["heads"], said["training"]["losses"]) == ("shared", 3, ["kl", "hidden"])
    plain = jaxchat.load(base.directory)
    drafting = jaxchat.load(base.directory, draft=f"chimera:{place}")
    prompt = data.epoch(0)[0].tokens[0].tolist()
    options = {"token_ids": [prompt], "max_new_tokens": 24}
    assert drafting.generate(**options)[0].token_ids == plain.generate(**options)[0].token_ids


def test_unknown_losses_and_plans_are_refused(base):
    with pytest.raises(UsageError, match="'mse' is none of tokens, hidden, logits, kl, labels"):
        losses_of("kl,mse")
    shorter = dataclasses.replace(base, plan=base.plan.select("0,1"))
    with pytest.raises(UsageError, match="trains heads for the model's own layers"):
        SETUPS["chimera"](shorter, Choices(strength=Strength(4, 8.0)))
