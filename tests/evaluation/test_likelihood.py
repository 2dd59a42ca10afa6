"""Likelihoods and replies of tiny models against scores of whole texts, one at a time."""

import math

import numpy as np
import pytest

import jaxchat
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.evaluation.checks import Match
from jaxchat.evaluation.items import Choice, Completion, Document, Generation, Request, Turn
from jaxchat.evaluation.likelihood import ModelProbe, encode_pair
from jaxchat.evaluation.run import asked, evaluate, groups
from jaxchat.evaluation.tasks import Prepared
from tests.support.tiny_chat import write_parrot, write_tiny_chat

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return jaxchat.load(write_tiny_chat(tmp_path_factory.mktemp("chat"), max_position_embeddings=64))


@pytest.fixture(scope="module")
def with_bos(tiny_directory):
    """A SentencePiece model whose texts begin with BOS, if the tests' reference data is there."""
    from pathlib import Path

    path = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K-hf"
    if not path.is_dir():
        pytest.skip("needs the reference data in ../shared/data beside the repository")
    return jaxchat.load(path)


def nats(model, context, continuation):
    """Minus the log-likelihood of ids after others, from a score of all of them."""
    (score,) = model.score(token_ids=[[*context, *continuation]])
    return -float(np.sum(score.logprobs[len(context) - 1 :]))


# --- ids


def test_blanks_at_the_end_of_a_context_go_to_the_continuation(model):
    context, continuation = encode_pair(model, "a b \n", "c")
    assert (model.decode(context), model.decode(continuation)) == ("a b", " \nc")


def test_an_empty_context_is_what_begins_a_text(model, with_bos):
    assert encode_pair(model, "", "ab") == ([model.tokenizer.bos_id], model.encode("ab"))
    whole = with_bos.encode("Once upon")
    assert encode_pair(with_bos, "", "Once upon") == (whole[:1], whole[1:])
    assert whole[0] == with_bos.tokenizer.bos_id


def test_ids_are_those_of_the_whole_text(with_bos):
    context, continuation = encode_pair(with_bos, "Once upon", " a time")
    assert context + continuation == with_bos.encode("Once upon a time")
    assert context == with_bos.encode("Once upon")


def test_messages_go_through_the_chat_template(model):
    turns = (Turn("user", "<s>hi"), Turn("assistant", "yo"), Turn("user", "so?"))
    context, continuation = encode_pair(model, turns, " fine")
    special = model.tokenizer.special_tokens
    text = "<s>hi"  # of a user, that is text
    expected = [
        special["<s>"], special["<|user|>"], *model.encode(text, parse_special=False), special["</s>"],
        special["<|assistant|>"], *model.encode("yo"), special["</s>"],
        special["<|user|>"], *model.encode("so?"), special["</s>"], special["<|assistant|>"],
    ]  # fmt: skip
    assert context == expected
    assert continuation == model.encode("fine")


# --- likelihoods


def test_likelihoods_are_those_of_whole_texts(model):
    requests = [Request("one two", " three"), Request("one", " four five"), Request("", "x")]
    found = ModelProbe(model, 2).likelihoods([*requests, requests[0]])
    for request, one in zip([*requests, requests[0]], found, strict=True):
        context, continuation = encode_pair(model, *request)
        assert one.nats == pytest.approx(nats(model, context, continuation), abs=1e-4)
        assert (one.tokens, one.cut) == (len(continuation), 0)
    assert found[3] == found[0]


def test_a_long_context_is_cut_on_the_left(model):
    text = "abcdefghij" * 9
    (found,) = ModelProbe(model).likelihoods([Request(text, "xyz")])
    assert found.cut == 90 + 3 - 64
    assert found.nats == pytest.approx(nats(model, model.encode(text)[-61:], model.encode("xyz")), abs=1e-4)


def test_a_continuation_longer_than_the_context_is_read_in_windows(model):
    text = "abcdefghij" * 9
    (found,) = ModelProbe(model).likelihoods([Request("", text)])
    ids = model.encode(text)
    parts = [([1], ids[:63]), (ids[31:63], ids[63:90])]
    assert found.nats == pytest.approx(sum(nats(model, *part) for part in parts), abs=1e-3)
    assert (found.tokens, found.cut) == (90, 0)


def test_a_continuation_without_tokens_is_refused(model):
    with pytest.raises(JaxchatError, match="the continuation '' adds no token to its context 'a'"):
        ModelProbe(model).likelihoods([Request("a", "")])


@pytest.mark.parametrize(("window", "stride"), [(20, 5), (20, 19), (64, 32), (2, 1)])
def test_a_text_is_read_in_windows_that_overlap(model, window, stride):
    text, before = "the text that is read, in windows of some tokens", "what stands before it."
    found = ModelProbe(model, 4, window, stride).passages([("", text), (before, text)])
    ids, overlap = model.encode(text), window - stride
    for given, one in zip(([model.tokenizer.bos_id], model.encode(before)), found, strict=True):
        expected, done = 0.0, 0
        while done < len(ids):
            seen = (given + ids[:done])[-overlap:]
            expected += nats(model, seen, ids[done : done + window - len(seen)])
            done += window - len(seen)
        assert one.nats == pytest.approx(expected, abs=1e-3)
        assert one.tokens == len(ids)


def test_every_window_begins_with_bos_where_texts_do(with_bos):
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    (found,) = ModelProbe(with_bos, 4, 12, 6).passages([("", text)])
    bos, *ids = with_bos.encode(text)
    expected, done = nats(with_bos, [bos], ids[:11]), 11
    while done < len(ids):
        expected += nats(with_bos, [bos, *ids[done - 6 : done]], ids[done : done + 5])
        done += 5
    assert found.nats == pytest.approx(expected, abs=1e-3)


def test_windows_must_fit_the_context(model):
    for window, stride, message in (
        (65, None, "window is 65; expected 2 to 64"),
        (1, None, "window is 1"),
        (8, 8, "stride is 8, and window 8; expected 1 to 7"),
    ):
        with pytest.raises(UsageError, match=message):
            ModelProbe(model, 8, window, stride)


# --- replies


def test_replies_end_where_the_template_and_the_task_say(tmp_path):
    model = jaxchat.load(write_parrot(tmp_path, "the quick</s>"))
    check = Match(("the quick",))
    prompts = ((Turn("user", "hi"),), "yo", "yo")
    items = [
        Generation(str(number), prompt, check, stop=stop, max_new_tokens=20)
        for number, (prompt, stop) in enumerate(zip(prompts, ((), (), ("quick",)), strict=True))
    ]
    replies = ModelProbe(model, 3).replies(items)
    assert [reply.text for reply in replies] == ["the quick", "the quick", "the "]
    assert [outcome.figures["exact"].value for outcome in Generation.measure(items, ModelProbe(model))] == [
        1,
        1,
        0,
    ]


def test_a_long_prompt_leaves_room_for_the_reply(model):
    prompt = "abcdefghij" * 9
    text = Generation("a", prompt, Match(("x",)), max_new_tokens=10)
    chat = Generation("b", (Turn("user", prompt),), Match(("x",)), max_new_tokens=200)
    one, other = ModelProbe(model).replies([text, chat])
    (result,) = model.generate(token_ids=[model.encode(prompt)[-54:]], max_new_tokens=10)
    assert (one.text, one.cut) == (result.text, 90 - 54)
    assert other.cut == 90 + 4 - 32


# --- items of all kinds together

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def prepared():
    choices = [
        Choice(
            f"c{n}",
            tuple(Request(f"Say {word}:", f" {other}") for other in WORDS[:3]),
            n % 3,
            tuple(Request("Answer:", f" {other}") for other in WORDS[:3]),
        )
        for n, word in enumerate(WORDS)
    ]
    completions = [Completion(f"k{n}", Request("The word is", f" {word}")) for n, word in enumerate(WORDS)]
    text = " ".join(WORDS * 4)
    documents = [Document(f"d{n}", text, n * 50, n * 50 + 50) for n in range(4)]
    replies = [
        Generation(f"g{n}", word, Match((word,)), max_new_tokens=4) for n, word in enumerate(WORDS[:5])
    ]
    return [
        Prepared(name, "", metric, tuple(items), total=len(items))
        for name, metric, items in (
            ("choices", "acc", choices),
            ("mixed", "acc", [*completions, *documents]),
            ("replies", "exact", replies),
        )
    ]


def test_an_evaluation_does_not_depend_on_the_batch_or_on_other_tasks(model):
    tasks = prepared()
    first = evaluate(model, tasks, batch=3)
    others = {one.task.name: one for one in evaluate(model, tasks[::-1], batch=1)}
    for one in first:
        for item, mine, theirs in zip(
            one.task.items, one.outcomes, others[one.task.name].outcomes, strict=True
        ):
            assert mine.figures.keys() == theirs.figures.keys(), item.id
            for name, figure in mine.figures.items():
                assert figure == pytest.approx(theirs.figures[name], abs=1e-5), (item.id, name)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantized_models_give_the_same_whatever_contexts_share(tmp_path, quant):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = jaxchat.load(write_tiny_chat(tmp_path, max_position_embeddings=160, **sizes), quant=quant)
    context = " ".join(WORDS * 2)
    requests = [Request(context[: 70 + 10 * n], f" {word}") for n, word in enumerate(WORDS[:4])]
    probe = ModelProbe(model, 1)
    assert probe.likelihoods(requests) == [probe.likelihoods([request])[0] for request in requests]


def test_a_plan_is_what_is_evaluated(model):
    (task,) = prepared()[1:2]
    plain, other = (evaluate(m, [task])[0].outcomes for m in (model, model.with_plan("0,2")))
    assert plain[0].figures["nats"] != other[0].figures["nats"]
    context, continuation = encode_pair(model, *task.items[0].request)
    expected = nats(model.with_plan("0,2"), context, continuation)
    assert other[0].figures["nats"].value == pytest.approx(expected, abs=1e-4)


def test_what_is_known_is_not_asked_again_and_partly_known_groups_come_out_the_same(model):
    tasks, results, seen = prepared(), {}, []
    first = evaluate(model, tasks, batch=2, results=results, progress=lambda *done: seen.append(done))
    total = sum(len(task.items) for task in tasks)
    assert len(results) == total
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    half = dict(list(results.items())[::3])
    assert evaluate(model, tasks, batch=2, results=half) == first
    assert half == results
    assert asked(None, tasks, most=1, results=dict(results)) == first  # nobody is there to be asked


def test_results_that_are_none_are_refused(model):
    tasks = prepared()[:1]
    results = {}
    evaluate(model, tasks, results=results)
    key = next(iter(results))
    for broken in (
        [],
        [1],
        [{"figures": {"acc": [1]}, "cut": 0}],
        [{"figures": {"acc": [1e99, 1]}, "cut": 0}],
    ):
        with pytest.raises(JaxchatError, match=r"the result choices c0 .*delete the file"):
            evaluate(model, tasks, results={**results, key: broken})


def test_groups_have_one_kind_and_about_as_much_work():
    _, mixed, _ = prepared()
    parts = list(groups(mixed.items, 8))
    assert [len(part) for part in parts] == [8, 2, 1, 1, 1, 1]
    assert [n for part in parts for n in part] == list(range(len(mixed.items)))


def test_logits_that_are_no_numbers_are_told():
    class Broken:
        def likelihoods(self, requests):
            from jaxchat.evaluation.items import Found

            return [Found(math.nan, 1, False) for _ in requests]

    with pytest.raises(JaxchatError, match=r"choices: item c0: .* is nan: the model's logits are not finite"):
        asked(Broken(), prepared()[:1], most=8)
