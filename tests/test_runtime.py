"""The library: text in, text out, conversations, scores, and the reference values of real models."""

import itertools
import json
import re
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxchat
from jaxchat.engine import steps
from jaxchat.engine.session import ContextOverflowError
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.options import GenerateOptions, GenerateOverrides
from tests.support.tiny_chat import write_tiny_chat

GREEDY = {"max_new_tokens": 24}
TEXT = {"max_new_tokens": 60, "temperature": 1.0, "seed": 1}  # of a seed with runs of whole characters
SAMPLED = {"max_new_tokens": 12, "temperature": 1.2, "top_k": 50}
PLAN = "2,0,1"  # not longer than the model, so that it shares its executables


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(directory):
    return jaxchat.load(directory)


@pytest.fixture(scope="module")
def text(model):
    """What the model continues "hello" with."""
    return model.generate("hello", **TEXT)[0].text


def stream_of(model, **options):
    stream = model.stream("hello", **TEXT, **options)
    return list(stream), stream.result


def fresh_logits(model, ids):
    session = model.engine.session(model.plan)
    session.set_ids(ids)
    return np.asarray(session.prefill()[0])


# --- generate and stream


def test_a_stream_is_the_text_of_generate_in_pieces(model, text):
    pieces, result = stream_of(model)
    assert len(pieces) > 10
    assert "".join(pieces) == result.text == text
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 60


def test_one_prompt_is_a_list_of_one(model):
    assert model.generate("hello", **GREEDY)[0].token_ids == model.generate(["hello"], **GREEDY)[0].token_ids


def test_token_ids_are_the_prompt_they_encode(model):
    ids = model.encode("hello")
    assert model.generate(token_ids=[ids], **GREEDY)[0].text == model.generate("hello", **GREEDY)[0].text


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_across_tokens_ends_the_text_before_it(model, text, length):
    at = next(i for i in range(8, 50) if "\ufffd" not in text[i : i + length])
    stop = text[at : at + length]
    pieces, result = stream_of(model, stop=stop)
    assert result.finish_reason == "stop"
    assert "".join(pieces) == result.text == text[: text.index(stop)]


def test_what_might_become_a_stop_string_is_held_back_only_as_long(model, text):
    at = next(i for i in range(8, 50) if "\ufffd" not in text[i : i + 3])
    never = text[at : at + 3] + "\0never"
    pieces, result = stream_of(model, stop=[never])
    assert "".join(pieces) == result.text == text
    assert any(text[at : at + 3] in piece for piece in pieces)  # released as one


def test_the_earliest_of_several_stop_strings_counts(model, text):
    at = next(i for i in range(8, 40) if "\ufffd" not in text[i : i + 6])
    _, result = stream_of(model, stop=[text[at + 3 : at + 6], text[at : at + 3]])
    assert result.text == text[: min(text.index(text[at : at + 3]), text.index(text[at + 3 : at + 6]))]


def test_a_stop_token_ends_the_text_and_is_kept(model):
    ids = model.generate("hello", **GREEDY)[0].token_ids
    result = model.generate("hello", stop_token_ids=[ids[5]], **GREEDY)[0]
    assert result.finish_reason == "stop"
    assert result.token_ids == ids[: ids.index(ids[5]) + 1]


def test_end_of_text_tokens_stop_unless_ignored(model, directory, tmp_path):
    ids = model.generate("hello", **GREEDY)[0].token_ids
    other = write_tiny_chat(tmp_path / "m")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[5]]}))
    ending = jaxchat.load(other)
    stopped = ending.generate("hello", **GREEDY)[0]
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", ids[: ids.index(ids[5]) + 1])
    ignoring = ending.generate("hello", ignore_eos=True, **GREEDY)[0]
    assert (ignoring.finish_reason, ignoring.token_ids) == ("length", ids)


def test_log_probabilities_are_those_of_a_score(model):
    prompt = model.encode("hello")
    result = model.generate(token_ids=[prompt], **SAMPLED)[0]
    score = model.score(token_ids=[prompt + result.token_ids])[0]
    np.testing.assert_allclose(result.logprobs, score.logprobs[len(prompt) - 1 :], atol=1e-4)
    assert score.total == pytest.approx(sum(score.logprobs), rel=1e-5)


def test_a_batch_gives_what_single_runs_give(model):
    prompts = ["a", "longer than the others", "mid size"]
    batched = model.generate(prompts, seed=5, batch_size=2, **SAMPLED)
    for number, prompt in enumerate(prompts):
        single = model.generate(prompt, seed=5 + number, **SAMPLED)[0]
        assert single.token_ids == batched[number].token_ids


def test_a_seed_repeats_a_text_and_another_does_not(model):
    first, again, other = (model.generate("hello", seed=s, **SAMPLED)[0].token_ids for s in (1, 1, 2))
    assert first == again != other


def test_results_tell_prompt_tokens_and_timings(model):
    result = model.generate("hello", **GREEDY)[0]
    assert result.prompt_tokens == result.timings.prefill_tokens == 5
    assert result.timings.decode_tokens == 23
    assert result.timings.decode_rate > 0


def test_a_full_context_ends_with_the_reason_context(model):
    result = model.generate("hello", ignore_eos=True)[0]
    assert result.finish_reason == "context"
    assert result.prompt_tokens + len(result.token_ids) == model.engine.max_length


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate(), UsageError, "give either prompts or token_ids"),
        (lambda m: m.generate("a", token_ids=[[1]]), UsageError, "give either prompts or token_ids"),
        (lambda m: m.generate(["a", ""]), UsageError, "prompt 1 is empty"),
        (lambda m: m.generate("a", temprature=1.0), TypeError, "unknown option 'temprature'"),
        (lambda m: m.generate("a", temperature=-1.0), UsageError, "temperature is -1.0"),
        (lambda m: m.generate("a" * 96), UsageError, None),
        (lambda m: m.generate("a" * 200), ContextOverflowError, "200 tokens but the context holds 96"),
        (lambda m: m.with_plan("9"), UsageError, "layer 9 is out of range"),
    ],
)
def test_wrong_requests(model, call, error, message):
    if message is None:
        assert call(model)[0].finish_reason == "context"
        return
    with pytest.raises(error, match=message):
        call(model)


def test_a_directory_without_a_tokenizer_works_on_token_ids(tmp_path):
    directory = write_tiny_chat(tmp_path / "m")
    for path in directory.glob("tokenizer*"):
        path.unlink()
    bare = jaxchat.load(directory)
    result = bare.generate(token_ids=[[1, 5, 9]], max_new_tokens=4)[0]
    assert (result.text, len(result.token_ids)) == (None, 4)
    for call in (
        lambda: bare.generate("text"),
        lambda: bare.generate(token_ids=[[1]], stop="x"),
        lambda: bare.chat("hello"),
    ):
        with pytest.raises(UsageError, match="tokenizer"):
            call()


def test_the_tokenizers_configuration_is_read_once_for_tokenizer_and_template(directory, monkeypatch):
    opened, open_ = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **b: opened.append(path.name) or open_(path, *a, **b))
    assert jaxchat.load(directory).template is not None
    assert opened.count("tokenizer_config.json") == 1


# --- plans


def test_a_view_under_another_plan_equals_a_model_loaded_with_it(model, directory):
    view = model.with_plan(PLAN)
    assert view.engine is model.engine
    expected = jaxchat.load(directory, PLAN).generate("hello", **GREEDY)[0].token_ids
    assert view.generate("hello", **GREEDY)[0].token_ids == expected
    assert model.generate("hello", **GREEDY)[0].token_ids != expected


def test_a_plan_may_be_given_as_an_object(model):
    plan = LayerPlan.parse(PLAN, 3)
    assert model.with_plan(plan).score("hello")[0] == model.with_plan(PLAN).score("hello")[0]


PROMPTS = ["hello", "what is", "a", "good morning", "x y z"]
PLANS = [None, PLAN, "0,1", PLAN, LayerPlan.parse("[0, [1, 0.5, 1], 2]", 3)]


def test_requests_of_different_plans_give_in_order_what_each_gives_alone(model):
    options = {"max_new_tokens": 10, "temperature": 0.9, "seed": 3}
    results = model.generate(PROMPTS, plans=PLANS, **options)
    for number, (prompt, plan, result) in enumerate(zip(PROMPTS, PLANS, results, strict=True)):
        alone = model.with_plan(plan or "all").generate(prompt, **{**options, "seed": 3 + number})[0]
        assert (result.text, result.token_ids) == (alone.text, alone.token_ids)
        assert result.prompt_tokens == len(model.encode(prompt))
    assert len({result.text for result in model.generate(["hello"] * 4, plans=PLANS[1:], **GREEDY)}) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_continuation_is_as_likely_after_its_context_as_in_a_score_of_both(model, batch_size, rng):
    shared = rng.integers(3, 200, 70).tolist()  # longer than a chunk
    pairs = [
        (shared[:40], [5]),
        (shared[:40], shared[40:]),
        (shared, [7, 8, 9]),
        ([4], shared),
        (shared, [9]),
    ]
    known = []
    found = model.loglikelihoods(pairs, batch_size=batch_size, progress=lambda *at: known.append(at))
    assert known[-1] == (5, 5)
    for (context, continuation), likelihood in zip(pairs, found, strict=True):
        score = model.score(token_ids=[context + continuation])[0]
        assert likelihood.total == pytest.approx(sum(score.logprobs[len(context) - 1 :]), abs=1e-3)


def test_a_continuation_is_greedy_where_the_model_would_say_it(model):
    prompt = model.encode("hello")
    said = model.generate(token_ids=[prompt], max_new_tokens=6)[0].token_ids
    other = [*said[:-1], (said[-1] + 1) % 200]
    assert [likely.greedy for likely in model.loglikelihoods([(prompt, said), (prompt, other)])] == [
        True,
        False,
    ]
    assert model.loglikelihoods([]) == []


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_a_continuation_needs_a_token_and_one_before_it(model, pair):
    with pytest.raises(UsageError, match=r"pairs\[0\] has an empty part"):
        model.loglikelihoods([pair])


def test_scores_of_different_plans_are_what_each_gives_alone(model):
    scores = model.score(PROMPTS, plans=PLANS)
    for prompt, plan, score in zip(PROMPTS, PLANS, scores, strict=True):
        alone = model.with_plan(plan or "all").score(prompt)[0]
        assert score.token_ids == alone.token_ids
        assert score.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_vectors_are_of_length_1_and_of_each_text_under_its_own_plan(model):
    vectors = model.embed(PROMPTS, plans=PLANS)
    assert (vectors.shape, vectors.dtype) == ((len(PROMPTS), model.config.hidden_size), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    for prompt, plan, vector in zip(PROMPTS, PLANS, vectors, strict=True):
        alone = model.with_plan(plan or "all").embed(token_ids=[model.encode(prompt)])
        np.testing.assert_allclose(vector, alone[0], atol=1e-5)
    with pytest.raises(UsageError, match="give either texts or token_ids"):
        model.embed()


def test_requests_of_different_plans_compile_nothing_new(model):
    def compiled():
        every = steps.prefill, steps.decode, steps.score, steps.sample
        return [step._cache_size() for step in every]

    model.generate(PROMPTS[:1], **GREEDY)
    model.generate(PROMPTS[:2], **GREEDY)
    model.score(PROMPTS[:1])
    before = compiled()
    model.generate(PROMPTS[:4], plans=["0,1", PLAN, "2,1,0", None], **GREEDY)
    model.generate(PROMPTS[:4], plans=["0,1", "2,1,0", "0,1", "2,1,0"], **GREEDY)
    model.score(PROMPTS[:3], plans=["0,1", None, "1,1,1"])
    assert compiled() == before


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        (["all"], "plans: got 1 plans for 2 prompts; give a list of one a prompt"),
        ("all", "plans: got 'all' for 2 prompts"),
        (["all", "7"], "layer 7 is out of range"),
        ([None, LayerPlan.identity(4)], "the plan is over 4 layers, the model has 3"),
    ],
)
def test_plans_that_do_not_fit_the_prompts_or_the_model_are_refused(model, plans, message):
    for call in (model.generate, model.score):
        with pytest.raises(UsageError, match=message):
            call(["a", "b"], plans=plans)


def test_two_models_in_one_process_are_independent(model, tmp_path):
    other = jaxchat.load(write_tiny_chat(tmp_path / "m", seed=1))
    alone = [m.generate("hello", **GREEDY)[0] for m in (model, other)]
    streams = [m.stream("hello", **GREEDY) for m in (model, other)]
    for _ in itertools.zip_longest(*streams):
        pass
    assert [s.result.token_ids for s in streams] == [result.token_ids for result in alone]
    assert alone[0].token_ids != alone[1].token_ids


# --- chats


def reply(chat, message, **options):
    stream = chat.send(message, **{"max_new_tokens": 6, **options})
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text
    return stream.result


def assert_consistent(chat, model):
    """The cache holds the conversation, token for token, and gives the logits of a fresh one."""
    assert chat.session.ids[0] == chat.conversation.token_ids
    np.testing.assert_allclose(
        np.asarray(chat.session.prefill()[0]), fresh_logits(model, chat.conversation.token_ids), atol=1e-4
    )


def test_chat_is_the_first_turn_of_a_session(model):
    assert model.chat("hi", **GREEDY).token_ids == reply(model.chat_session(), "hi", **GREEDY).token_ids


def test_special_tokens_in_a_text_that_is_continued_are_those_unless_asked_otherwise(model):
    raw, options = "<|user|>hi</s><|assistant|>", {"max_new_tokens": 5}
    parsed, spelled = (model.tokenizer.encode(raw, parse_special=special) for special in (True, False))
    assert (len(parsed), len(spelled)) == (5, len(raw))
    for ids, special in ((parsed, {}), (spelled, {"parse_special": False})):
        assert model.encode(raw, **special) == ids
        assert model.score(raw, **special)[0].token_ids == ids
        expected = model.generate(token_ids=[ids], **options)[0].token_ids
        assert model.generate(raw, **special, **options)[0].token_ids == expected
        stream = model.stream(raw, **special, **options)
        assert "".join(stream) == stream.result.text
        assert stream.result.token_ids == expected
    assert model.chat(raw, max_new_tokens=1).prompt_tokens > len(raw)  # a message


def test_a_token_that_the_model_does_not_have_is_named(tmp_path, caplog):
    added = {"<|extra|>": {"content": "<|extra|>", "special": True}}
    small = write_tiny_chat(tmp_path / "small")
    config = json.loads((small / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"262": added["<|extra|>"]}
    (small / "tokenizer_config.json").write_text(json.dumps(config))
    model = jaxchat.load(small)
    assert caplog.messages == []
    says = r"the token '<\|extra\|>' \(id 262\) is not in the model's vocabulary of 262 tokens"
    for use in (model.generate, model.score, model.stream):
        with pytest.raises(JaxchatError, match=says + ": tokenizer and weights are not of one model, or"):
            use("a<|extra|>")
    assert model.score("a<|extra|>", parse_special=False)
    assert model.chat("a<|extra|>", max_new_tokens=2).token_ids
    config["chat_template"] = config["chat_template"].replace("</s>", "<|extra|>")
    (small / "tokenizer_config.json").write_text(json.dumps(config))
    model = jaxchat.load(small)
    [warning] = caplog.messages
    assert re.fullmatch(rf"{small}: the chat template needs what the model does not have: {says}", warning)
    with pytest.raises(JaxchatError, match=says):
        model.chat("a")
    assert model.generate("a", max_new_tokens=1)


def test_a_text_that_begins_as_all_do_is_warned_about(tmp_path, caplog):
    directory = write_tiny_chat(tmp_path)
    spec = json.loads((directory / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    model = jaxchat.load(directory)
    assert model.encode("a")[0] == 1
    assert caplog.messages == []
    assert model.encode("<s>a")[:2] == [1, 1]
    assert caplog.messages == ["the text begins with <s>, which the model adds itself: it is there twice"]


def test_chat_takes_a_whole_conversation(model):
    chat = model.chat_session(system="be")
    first = reply(chat, "hi", stop_token_ids=[])
    messages = chat.conversation.messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    prompt = model.template.render([*messages, {"role": "user", "content": "yo"}], add_generation_prompt=True)
    assert prompt.startswith("<s><|system|>be</s><|user|>hi</s><|assistant|>" + first.text)
    result = model.chat([*messages, {"role": "user", "content": "yo"}], max_new_tokens=3)
    assert result.prompt_tokens == len(model.encode(prompt, parse_special=True))


def test_after_every_turn_the_cache_equals_the_conversation(model):
    chat = model.chat_session(system="be")
    for message in ("hi", "and?", "<|user|> is text", "ok"):
        reply(chat, message)
        assert_consistent(chat, model)


def test_a_reply_that_is_stopped_stays_in_the_history(model):
    chat = model.chat_session()
    stream = chat.send("hi", max_new_tokens=30)
    next(iter(stream))
    stream.close()
    shown = stream.result
    assert 1 <= len(shown.token_ids) < 30
    assert chat.conversation.messages[-1] == {"role": "assistant", "content": shown.text}
    reply(chat, "go on")
    assert_consistent(chat, model)


def test_a_plan_set_in_mid_chat_equals_a_fresh_session_under_it(model):
    chat = model.chat_session()
    reply(chat, "hi")
    chat.set_plan(PLAN)
    second = reply(chat, "and?")
    prompt = chat.conversation.token_ids[: -len(second.token_ids)]
    fresh = model.with_plan(PLAN).generate(token_ids=[prompt], max_new_tokens=6)[0]
    assert second.token_ids == fresh.token_ids
    assert_consistent(chat, model.with_plan(PLAN))


def test_a_message_that_does_not_fit_is_taken_back(model):
    chat = model.chat_session()
    first = reply(chat, "hi")
    with pytest.raises(ContextOverflowError, match=r"too many for the context of 96; .*truncate_oldest"):
        chat.send("x" * 100)
    assert len(chat.conversation.messages) == 2
    again = model.chat_session()
    assert reply(again, "hi").token_ids == first.token_ids
    assert reply(chat, "ok").token_ids == reply(again, "ok").token_ids


def test_truncate_oldest_forgets_whole_turns_but_not_the_system_prompt(model):
    chat = model.chat_session(system="be")
    for number in range(12):
        reply(chat, f"message {number}", overflow="truncate_oldest")
    contents = [m["content"] for m in chat.conversation.messages]
    roles = [m["role"] for m in chat.conversation.messages]
    assert contents[0] == "be"
    assert "message 11" in contents
    assert "message 0" not in contents
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
    assert len(chat.session.ids[0]) <= 96
    assert_consistent(chat, model)


def test_restart_forgets_all_but_the_system_prompt(model):
    chat = model.chat_session(system="be")
    first = reply(chat, "hi")
    reply(chat, "and?")
    chat.restart()
    assert reply(chat, "hi").token_ids == first.token_ids


def test_two_chats_over_one_model_do_not_meet(model):
    one, two = model.chat_session(system="a"), model.chat_session(system="b")
    streams = [one.send("hi", max_new_tokens=6), two.send("hi", max_new_tokens=6)]
    for _ in itertools.zip_longest(*streams):
        pass
    for chat, system in ((one, "a"), (two, "b")):
        assert chat.conversation.messages[0]["content"] == system
        assert_consistent(chat, model)


def test_a_template_without_a_place_for_the_system_prompt_refuses_it(tmp_path):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    plain = jaxchat.load(write_tiny_chat(tmp_path / "m", template=template))
    with pytest.raises(UsageError, match="ignores the system prompt"):
        plain.chat_session(system="be")


# --- real models


def test_stories260k_continues_greedily_like_llama2c(shared_data):
    expected = json.loads((shared_data / "oracles/llama2.c/stories260K_greedy_ids.json").read_text())
    model = jaxchat.load(shared_data / "models/stories260K-hf")
    result = model.generate(token_ids=[expected[:1]], max_new_tokens=len(expected) - 1)[0]
    assert result.token_ids == expected[1:]
    text = (shared_data / "oracles/llama2.c/stories260K_expected_stdout_200steps.txt").read_text()
    assert result.text.strip().startswith(text.strip())


def test_stories260k_scores_held_out_stories_like_its_reference(shared_data):
    model = jaxchat.load(shared_data / "models/stories260K-hf")
    corpus = (shared_data / "corpora/tinystories_2MiB.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in corpus.split("<|endoftext|>")[500:560]]
    scores = model.score(token_ids=[model.encode(story)[: model.engine.max_length] for story in stories])
    assert -np.mean(np.concatenate([s.logprobs for s in scores])) == pytest.approx(1.552, abs=0.001)


@pytest.mark.parametrize("number", range(1, 7))
def test_craftgpt_agrees_with_its_emulator(shared_data, number):
    (case,) = json.loads((shared_data / f"oracles/craftgpt/craftgpt_emulator_{number}.json").read_text())
    model = jaxchat.load(shared_data / "models/CraftGPT-hf")
    assert model.chat(case["prompt"]).token_ids == case["greedy_ids"]
    ids = case["prompt_ids"] + case["greedy_ids"]
    for length, top in enumerate(case["top8_per_position"], start=1):
        wanted = dict(top)
        probabilities = np.asarray(jax.nn.softmax(fresh_logits(model, ids[:length])))
        # The emulator computes in narrow fixed-point numbers.
        np.testing.assert_allclose(probabilities[list(wanted)], list(wanted.values()), atol=0.015)


def test_tinystories656k_is_the_same_in_bfloat16_and_float32(shared_data):
    wide, narrow = (jaxchat.load(shared_data / "models/TinyStories-656K" / d) for d in ("fp32", "bf16"))
    prompt = "Once upon a time"
    one, two = (m.generate(prompt, max_new_tokens=64)[0] for m in (wide, narrow))
    assert one.token_ids == two.token_ids
    np.testing.assert_allclose(
        one.logprobs, two.logprobs, atol=1e-5
    )  # the float32 file holds bfloat16 values
    assert "Lily" in one.text


def test_options_are_one_value_or_keywords_and_keywords_win(model):
    options = GenerateOptions(max_new_tokens=3, temperature=1.5, seed=7)
    by_name = model.chat("hello", max_new_tokens=3, temperature=1.5, seed=7)
    assert model.chat("hello", options=options).token_ids == by_name.token_ids
    assert len(model.chat("hello", options=options, max_new_tokens=1).token_ids) == 1


def test_options_by_name_are_the_fields_of_the_value():
    hints = typing.get_type_hints(GenerateOptions)
    assert typing.get_type_hints(GenerateOverrides) == hints


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0}, "top_p is 0; expected a number above 0, at most 1"),
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number, 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number, 0 or more"),
        ({"min_p": True}, "min_p is True; expected a number, 0 to 1"),
        ({"presence_penalty": "hot"}, "presence_penalty is 'hot'; expected a finite number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; expected a whole number, 1 or more"),
        ({"seed": 2**32}, "seed is 4294967296; expected a whole number, 0 to 4294967295"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; expected True or False"),
        ({"overflow": "shift"}, "overflow is 'shift'; expected error or truncate_oldest"),
    ],
)
def test_options_are_checked_where_they_are_made(values, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        GenerateOptions(**values)
