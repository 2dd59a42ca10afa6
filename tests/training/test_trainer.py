"""The trainer, at a task that costs nothing: a linear model of numbers that are called tokens."""

import dataclasses
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.training import trainer
from jaxchat.training.losses import Loss
from jaxchat.training.trainer import LOSS, Settings
from tests.training.support import Listed, batch_of, run_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

TRUE = np.array([0.5, -1.0, 2.0], np.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Fits `tokens @ w` to `tokens @ TRUE`; noise is added with a key, as dropout would be."""

    noise: float = 0.0

    def loss(self, trained, frozen, batch, key):
        x = batch.tokens.astype(jnp.float32)
        y = x @ trained["w"] + trained["bias"]
        if key is not None and self.noise:
            y = y + self.noise * jax.random.normal(key, y.shape)
        errors = (y - x @ frozen) ** 2 * batch.weights[:, 0]
        return Loss(errors.sum(), batch.weights[:, 0].sum())


INITIAL = {"w": jnp.zeros(3), "bias": jnp.float32(0)}


def numbers(count=5, rows=4, seed=0, bad=None):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        tokens = rng.integers(-3, 4, (rows, 3))
        weights = np.full((rows, 3), np.nan if number == bad else 1.0)
        found.append(batch_of(tokens, weights, place=f"numbers:{number + 1}"))
    return Listed(found)


def run(directory, task=None, **options):
    options = {"data": numbers(), "max_steps": 12} | options
    return run_of(directory, task or Linear(0.1), frozen=jnp.asarray(TRUE), initial=INITIAL, **options)


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory):
    return [line["loss"] for line in lines(directory) if "loss" in line]


def stopping(at):
    def report(now):
        if now.step == at:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("save_steps", [4, 3, 1000])
def test_a_run_that_is_gone_on_with_gives_the_same_losses_bit_for_bit(tmp_path, save_steps):
    options = {"accumulation": 2, "schedule": "cosine", "warmup_ratio": 0.2, "logging_steps": 5}
    whole = run(tmp_path / "whole", **options)
    expected = whole.run()
    first = run(tmp_path / "parts", save_steps=save_steps, **options)
    with pytest.raises(KeyboardInterrupt):
        first.run(stopping(7))
    first.close()
    second = run(tmp_path / "parts", resume=True, save_steps=save_steps, **options)
    assert second.step == 7
    found = second.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name in INITIAL:
        np.testing.assert_array_equal(found.state.trained[name], expected.state.trained[name])


def test_ctrl_c_waits_for_the_end_of_the_step_and_a_second_one_does_not(tmp_path):
    seen = []

    def report(now):
        seen.append(now.step)
        if now.step == 3:
            signal.raise_signal(signal.SIGINT)
            seen.append("goes on")
        if now.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            seen.append("not reached")

    first = run(tmp_path, save_steps=3)
    with pytest.raises(KeyboardInterrupt):
        first.run(report)
    first.close()
    assert seen == [1, 2, 3, "goes on"]
    assert len(losses(tmp_path)) == 3  # the step's line and checkpoint were written
    second = run(tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        second.run(report)
    assert seen[4:] == [4, 5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_lines_after_the_checkpoint_are_written_anew(tmp_path):
    run(tmp_path, max_steps=4, save_steps=4).run()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "loss": 99}\n{"step": 6, "lo')
    run(tmp_path, max_steps=6, resume=True).run()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert 99 not in losses(tmp_path)


def test_batches_of_a_step_count_like_one_of_them_all(tmp_path):
    """Also where they have different weights."""
    rng = np.random.default_rng(1)
    tokens, weights = rng.integers(-3, 4, (8, 3)), rng.random((8, 1)).repeat(3, 1)
    apart = Listed([batch_of(tokens[i : i + 2], weights[i : i + 2]) for i in range(0, 8, 2)])
    together = run(tmp_path / "one", Linear(), data=Listed([batch_of(tokens, weights)]), max_steps=3)
    parts = run(tmp_path / "four", Linear(), data=apart, accumulation=4, max_steps=3)
    a, b = together.run(), parts.run()
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "four"), rtol=1e-5)
    np.testing.assert_allclose(a.state.trained["w"], b.state.trained["w"], rtol=1e-5)


def test_a_loss_that_is_no_number_ends_the_run_and_the_state_before_it_is_saved(tmp_path):
    bad = run(tmp_path, data=numbers(bad=3))
    with pytest.raises(JaxchatError, match=r"loss is nan .* at step 4, of numbers:4; .*--learning_rate"):
        bad.run()
    bad.close()
    again = run(tmp_path, data=numbers(), resume=True)
    assert again.step == 3
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(again.state.trained))


def test_the_best_state_comes_out_and_patience_ends_the_run(tmp_path):
    held_out = numbers(2, seed=9)
    found = run(
        tmp_path, data=numbers(seed=3), held_out=held_out, learning_rate=0.6, eval_steps=1, patience=3,
        max_steps=300,
    ).run()  # fmt: skip
    seen = {line["step"]: line["eval_loss"] for line in lines(tmp_path) if "eval_loss" in line}
    assert found.stopped_early
    assert max(seen) < 300
    assert found.best_loss == min(seen.values()) == seen[found.step]
    assert found.step == max(seen) - 3
    again = run(tmp_path / "other", held_out=held_out, data=numbers(seed=3))
    again.state = found.state
    assert again.evaluate()[LOSS] == pytest.approx(found.best_loss, rel=1e-6)


def test_a_run_is_not_begun_over_another_one(tmp_path):
    run(tmp_path, max_steps=1).run()
    with pytest.raises(UsageError, match="a run is there already; go on with it with --resume"):
        run(tmp_path, max_steps=1)
    (tmp_path / "run.json").write_text('{"task": "another"}')
    with pytest.raises(UsageError, match="task was 'another' and is 'of a test' now"):
        run(tmp_path, max_steps=1, resume=True)


def test_a_run_that_failed_before_its_first_step_can_be_begun_otherwise(tmp_path):
    failed = run(tmp_path, data=numbers(bad=0))
    with pytest.raises(JaxchatError, match="at step 1"):
        failed.run()
    failed.close()
    (tmp_path / "run.json").write_text('{"task": "another"}')
    assert run(tmp_path, max_steps=1).run().step == 1


def test_a_broken_checkpoint_is_one_line(tmp_path):
    first = run(tmp_path, max_steps=2)
    first.run()
    first.close()
    for path in (tmp_path / "checkpoints/2").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(JaxchatError, match=r"checkpoints/2: the checkpoint cannot be read .*remove"):
        run(tmp_path, max_steps=3, resume=True)


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    first = run(tmp_path, max_steps=4, save_steps=2)
    save = first._saved._last.save

    def full(step, **more):
        if step > 2:
            raise OSError(28, "No space left on device")
        return save(step, **more)

    monkeypatch.setattr(first._saved._last, "save", full)
    with pytest.raises(JaxchatError, match=r"step 4 cannot be written .*No space left"):
        first.run()
    first.close()
    assert run(tmp_path, resume=True).step == 2


def test_only_the_last_checkpoints_stay(tmp_path):
    done = run(tmp_path, max_steps=6, save_steps=1, keep=2)
    done.run()
    done.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"5", "6"}
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_time_budget_ends_the_run(tmp_path):
    found = run(tmp_path, max_steps=None, max_minutes=0.5 / 60, schedule="warmup_stable_decay")
    found.run()
    assert 0.5 <= found.position.seconds < 30
    assert [line["learning_rate"] for line in lines(tmp_path)][-1] < 1e-2


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(schedule):
    """`get_scheduler` of transformers 5: multipliers of the learning rate, by the step from 0 on."""
    total, warmup = 40, 4
    rate = Settings(learning_rate=2.0, schedule=schedule, warmup_ratio=0.1).rate(total)

    def multiplier(step):
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / (total - warmup)
        return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[
            schedule
        ]

    found = [float(rate(step)) for step in range(total)]
    np.testing.assert_allclose(found, [2.0 * multiplier(step) for step in range(total)], atol=1e-6)


def test_weight_decay_is_for_what_decays():
    settings = Settings(weight_decay=0.5, max_grad_norm=0)
    optimizer = trainer.optimizer(settings, {"w": True, "bias": False})
    params = {"w": jnp.ones(2), "bias": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0.5)
    np.testing.assert_array_equal(updates["bias"], 0.0)


@pytest.mark.parity
def test_steps_are_those_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    settings = {"learning_rate": 0.05, "weight_decay": 0.1, "max_grad_norm": 1.0, "schedule": "constant"}
    run(tmp_path, Linear(), max_steps=10, **settings).run()
    w, bias = (torch.zeros(3, requires_grad=True), torch.zeros((), requires_grad=True))
    optimizer = torch.optim.AdamW([w, bias], lr=0.05, weight_decay=0.1)
    expected = []
    for step in range(10):
        batch = numbers().epoch(0)[step % 5]
        x = torch.tensor(batch.tokens, dtype=torch.float32)
        loss = ((x @ w + bias - x @ torch.tensor(TRUE)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w, bias], 1.0)
        optimizer.step()
        expected.append(float(loss.detach()))
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=1e-4)


def test_batches_split_over_devices_give_the_same(tmp_path):
    """What is trained is whole on each; so is a batch that does not divide."""
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(4, 1), ("data", "model"))
    frozen = jax.device_put(jnp.asarray(TRUE), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    data = Listed([*numbers(2, rows=8).epoch(0), *numbers(1, rows=3, seed=4).epoch(0)])
    options = {"task": Linear(), "initial": INITIAL, "data": data, "held_out": data, "max_steps": 7}
    one = run_of(tmp_path / "one", frozen=jnp.asarray(TRUE), **options).run()
    several = run_of(tmp_path / "four", frozen=frozen, mesh=mesh, save_steps=3, **options)
    many = several.run()
    assert len(many.state.trained["w"].sharding.device_set) == 4
    np.testing.assert_allclose(many.state.trained["w"], one.state.trained["w"], rtol=1e-5)
    several.close()
    again = run_of(tmp_path / "four", frozen=frozen, mesh=mesh, resume=True, **options | {"max_steps": 9})
    assert again.step == 7
    again.run()
