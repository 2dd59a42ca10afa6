"""Chimera in whole models and chats: the same texts as without it, wherever it is used."""

import json

import jax
import numpy as np
import pytest

import jaxchat
from jaxchat import demo
from jaxchat.checkpoints.chimera import CONFIG, TENSORS, write_chimera
from jaxchat.checkpoints.load import load_params
from jaxchat.errors import UsageError
from jaxchat.layers.chimera import ChimeraConfig, initial_params
from tests.support.adapters import lora_tensors, projections, write_adapter
from tests.support.tiny_chat import write_tiny_chat

PROMPTS = ["Once upon a time", "hello é, what", "x"]
pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_heads(directory, model_directory, **config):
    """Random heads for a model; some of what they guess is right."""
    base = load_params(model_directory)
    own = ChimeraConfig(**{"heads": 3, "rank": 8, **config})
    write_chimera(directory, own, initial_params(own, *base, jax.random.key(1)), *base)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("model"), max_position_embeddings=160, seed=4)


@pytest.fixture(scope="module")
def heads(tmp_path_factory, directory):
    return write_heads(tmp_path_factory.mktemp("heads"), directory)


@pytest.fixture(scope="module")
def pair(directory, heads):
    """The model without a draft, and with one."""
    return jaxchat.load(directory, max_slots=5), jaxchat.load(
        directory, max_slots=5, draft=f"chimera:{heads}"
    )


def same(pair, say):
    """What `say(model)` gives of both models, compared; the second's results."""
    plain, drafted = (say(model) for model in pair)
    for one, other in zip(plain, drafted, strict=True):
        assert other.token_ids == one.token_ids
        assert (other.text, other.finish_reason) == (one.text, one.finish_reason)
        np.testing.assert_allclose(other.logprobs, one.logprobs, atol=2e-3)
        assert one.timings.tokens_a_step is None
    assert drafted[0].timings.draft_steps > 0
    assert 1 <= drafted[0].timings.tokens_a_step <= 5
    return drafted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.2, "seed": 5, "top_k": 20, "presence_penalty": 0.4},
        {"stop": ["e", "zz"], "temperature": 0.9},
    ],
    ids=str,
)
def test_texts_are_those_without_a_draft(pair, options):
    settings = {"max_new_tokens": 40, "ignore_eos": True, **options}
    found = same(pair, lambda model: model.generate(PROMPTS, **settings))
    streamed = pair[1].stream(PROMPTS[0], **settings)
    assert "".join(streamed) == found[0].text


def test_some_guesses_are_right_and_more_than_one_token_comes_of_a_step(pair):
    found = same(pair, lambda model: model.generate(PROMPTS, max_new_tokens=100, ignore_eos=True))
    assert found[0].timings.tokens_a_step > 1.2


def test_under_another_plan(pair):
    same(pair, lambda model: model.with_plan("0,1,1,2").generate(PROMPTS, max_new_tokens=20, ignore_eos=True))


@pytest.mark.parametrize(
    "options",
    [
        {"quant": "int4"},
        pytest.param({"kv_dtype": "int8", "kernels": "reference"}, marks=pytest.mark.full),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.full),
        pytest.param({"quant": "q6_k"}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_over_a_base_that_is_held_otherwise(directory, heads, options):
    both = [jaxchat.load(directory, **options, **more) for more in ({}, {"draft": f"chimera:{heads}"})]
    same(both, lambda model: model.generate(PROMPTS[:1], max_new_tokens=30, ignore_eos=True))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("low_rank", "chain:3"),
        *(pytest.param(kind, "chain:1", marks=pytest.mark.full) for kind in ("full", "low_rank")),
    ],
)
def test_with_other_heads_and_shapes(tmp_path, directory, pair, kind, shape):
    drafted = jaxchat.load(
        directory, draft=f"chimera:{write_heads(tmp_path, directory, kind=kind)}", draft_tree=shape
    )
    same((pair[0], drafted), lambda model: model.generate(PROMPTS[:2], max_new_tokens=24, ignore_eos=True))


def test_beside_adapters(tmp_path, directory, heads):
    config, _ = load_params(directory)
    tensors = lora_tensors(projections(config))
    names = sorted({name.split(".")[-1] for name in projections(config)})
    adapter = write_adapter(tmp_path / "poet", tensors, target_modules=names)
    both = [jaxchat.load(directory, adapter=adapter, **more) for more in ({}, {"draft": f"chimera:{heads}"})]
    same(both, lambda model: model.generate(PROMPTS, adapters=["poet", [], None], max_new_tokens=20))


def test_in_a_chat_with_all_that_can_happen_in_one(pair, tmp_path):
    def talk(model):
        chat, results = model.chat_session("be kind"), []

        def take(stream):
            for _ in stream:
                pass
            results.append(stream.result)

        short = {"max_new_tokens": 12}
        take(chat.send("hello", **short))
        take(chat.send("and é?", prefix="Well, ", **short))
        take(chat.continue_(" then", **short))
        take(chat.retry(seed=3, temperature=1.0, **short))
        stream = chat.send("stop me", **short)
        pieces = iter(stream)
        next(pieces)
        stream.close()
        chat.undo()
        chat.set_plan("0,1,2,2")
        take(chat.send("again", **short))
        chat.save(tmp_path / f"{id(model)}.session")
        other = model.with_plan("0,1,2,2").load_session(tmp_path / f"{id(model)}.session")
        for one in (other, chat):
            take(one.send("goodbye", **short))
        assert results[-1].token_ids == results[-2].token_ids
        return results

    same(pair, talk)


def test_a_full_context_drops_the_oldest_turns_as_without(pair):
    same(
        pair,
        lambda model: model.generate(
            ["z" * 140], max_new_tokens=60, overflow="truncate_oldest", ignore_eos=True
        ),
    )
    found = same(pair, lambda model: model.generate(["z" * 120], ignore_eos=True))
    assert found[0].finish_reason == "context"


def test_lossy_rules_say_other_things_in_fewer_steps(directory, heads, pair):
    settings = {"max_new_tokens": 60, "ignore_eos": True, "temperature": 1.0}
    lossless = pair[1].generate(PROMPTS[0], **settings)[0]
    for rule in ("typical", "top_k"):
        model = jaxchat.load(directory, draft=f"chimera:{heads}", draft_accept=rule)
        found = model.generate(PROMPTS[0], **settings)[0]
        assert len(found.token_ids) == 60
        assert found.token_ids == model.generate(PROMPTS[0], **settings)[0].token_ids
        assert found.timings.draft_steps <= lossless.timings.draft_steps


@pytest.mark.parametrize("count", [4, pytest.param(24, marks=pytest.mark.full)])
def test_the_model_in_the_box_says_the_same(tmp_path, count):
    heads = write_heads(tmp_path, demo.path(), heads=4)
    both = jaxchat.load("box"), jaxchat.load("box", draft=f"chimera:{heads}")
    openings = ["Once upon a time", "The dog", "Tom and Ann", "It was dark", "A big red ball", "Why"]
    prompts = [f"{opening}{' and' * (number // 6)}" for number, opening in enumerate(openings * 4)][:count]
    for settings in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 9})[: count // 4]:
        same(both, lambda model, own=settings: model.generate(prompts, max_new_tokens=60, **own))
    if both[0].engine.kernels.name == "native":
        plain, drafted = (model.generate(prompts, max_new_tokens=60, temperature=0.0) for model in both)
        assert [one.logprobs for one in drafted] == [one.logprobs for one in plain]  # to the last bit


# --- on the command line


def test_the_command_line_takes_a_draft_and_says_what_it_gave(commands, directory, heads):
    line = ["generate", "-m", directory, "-p", "hello", "--max_new_tokens", "20", "--ignore_eos"]
    plain = commands.output(*line)
    done = commands(*line, "--draft", f"chimera:{heads}", "--verbose")
    assert (done.code, done.out) == (0, plain)
    assert "tokens a step in " in done.err
    assert "(lossless)" in done.err
    lossy = commands(*line, "--draft", f"chimera:{heads}", "--draft_accept", "top_k", "--verbose")
    assert "(top_k, LOSSY)" in lossy.err
    timings = json.loads(commands.output(*line, "--draft", f"chimera:{heads}", "--json"))["timings"]
    assert timings["draft_tokens_per_step"] == timings["draft_tokens"] / timings["draft_steps"]
    assert "draft:" not in commands(*line, "--verbose").err


def test_a_chat_tells_of_its_draft(commands, directory, heads):
    done = commands(
        "chat", "-m", directory, "--draft", f"chimera:{heads}", "--max_new_tokens", "6",
        stdin="hello\n/set temperature=0.5\nhow\n/stats\n",
    )  # fmt: skip
    assert done.code == 0
    assert "tokens a step in " in done.err


WRONG = {
    "no heads": (
        ["--draft", "chimera:{none}"],
        2,
        "none: there is no such directory; expected the directory",
    ),
    "no kind": (["--draft", "{heads}"], 2, "expected chimera:DIR"),
    "shape": (["--draft", "chimera:{heads}", "--draft_tree", "9"], 2, "--draft_tree is '9'; expected 25"),
    "deep": (
        ["--draft", "chimera:{heads}", "--draft_tree", "chain:4"],
        2,
        "asks for 4 tokens one after the other; {heads} has 3 heads: choose chain:3",
    ),
    "rule": (["--draft", "chimera:{heads}", "--draft_accept", "all"], 2, "--draft_accept is 'all'"),
    "shape alone": (["--draft_tree", "25"], 2, "--draft_tree needs --draft"),
    "rule alone": (["--draft_accept", "typical"], 2, "--draft_accept needs --draft"),
    "with show": (["--draft", "chimera:{heads}", "--show"], 2, "--draft cannot be combined with --show"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_draft_is_told_in_one_line(commands, tmp_path, directory, heads, case):
    flags, code, message = WRONG[case]
    names = {"heads": str(heads), "none": str(tmp_path / "none")}
    told = commands.error(
        "generate", "-m", directory, "-p", "x", *[flag.format(**names) for flag in flags], code=code
    )
    assert message.format(**names) in told


def test_load_refuses_a_draft_for_another_model(tmp_path, heads):
    other = write_tiny_chat(tmp_path, max_position_embeddings=160, seed=5)
    with pytest.raises(UsageError, match="trained for another llama of the same sizes"):
        jaxchat.load(other, draft=f"chimera:{heads}")
    for name in ("draft_tree", "draft_accept"):
        with pytest.raises(UsageError, match=f"{name} is given without draft"):
            jaxchat.load(other, **{name: "25" if name == "draft_tree" else "typical"})
    assert sorted(path.name for path in heads.iterdir()) == sorted([CONFIG, TENSORS])
    with pytest.raises(UsageError, match="draft is 3; expected chimera:DIR"):
        jaxchat.load(other, draft=3)
