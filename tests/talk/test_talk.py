"""Conversations among models: what one says is what the other hears, and batches change nothing."""

import dataclasses

import numpy as np
import pytest

import jaxchat
from jaxchat import demo
from jaxchat.errors import UsageError
from jaxchat.options import GenerateOptions
from jaxchat.talk import (
    Expert,
    ModelLoader,
    Nudge,
    Panel,
    Speaker,
    Thinker,
    choose,
    crosstalk,
    says_goodbye,
)
from jaxchat.talk.crosstalk import begin
from jaxchat.talk.experts import read_panel
from tests.support.tiny_chat import write_tiny_chat

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPTIONS = GenerateOptions(max_new_tokens=6, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("talk"), max_position_embeddings=400)


@pytest.fixture(scope="module")
def model(directory):
    return jaxchat.load(directory, max_slots=4)


def say(chat, text, options=OPTIONS):
    stream = chat.send(text, **vars(options))
    return "".join(stream)


# --- several conversations at once


def test_a_batch_of_conversations_says_what_each_would_say_alone(model):
    systems = ["Be brief.", None, "Sing."]
    batch = model.chat_batch([model.conversation(system=system) for system in systems])
    alone = [model.chat_session(system) for system in systems]
    for texts in (["hi", "hello there, all of you", "x"], ["again", None, "y"], [None, "late", None]):
        replies = batch.send(texts, OPTIONS)
        for row, text in enumerate(texts):
            if text is None:
                assert replies[row] is None
                continue
            expected = say(alone[row], text, dataclasses.replace(OPTIONS, seed=OPTIONS.seed + row))
            assert replies[row].text == expected
    assert [talk.messages for talk in batch.conversations] == [chat.messages for chat in alone]
    assert [talk.token_ids for talk in batch.conversations] == [chat.token_ids for chat in alone]


def test_what_does_not_fit_is_said_in_no_conversation(model):
    batch = model.chat_batch([model.conversation(), model.conversation()])
    with pytest.raises(jaxchat.ContextOverflowError, match="too many for the context of 400"):
        batch.send(["hi", "x" * 500], OPTIONS)
    assert [talk.messages for talk in batch.conversations] == [[], []]


# --- two speakers


def test_what_one_says_is_the_next_message_of_the_other(model):
    a = Speaker(name="A", model=model, reversed_role=True, system="Ask.", options=OPTIONS)
    b = Speaker(name="B", model=model.with_plan("0,1,1"), options=dataclasses.replace(OPTIONS, seed=8))
    turns = list(crosstalk(a, b, "hello", turns=4))
    assert [turn.speaker for turn in turns] == ["A", "B", "A", "B", "A"]
    assert [turn.ends for turn in turns] == ["", "", "", "", "turns"]
    asker = model.chat_session("Ask.", reversed_role=True, opening="hello")
    answerer = model.with_plan("0,1,1").chat_session()
    heard = "hello"
    for number, turn in enumerate(turns[1:]):
        speaker, options = (asker, a.options) if number % 2 else (answerer, b.options)
        assert turn.text == say(speaker, heard, options)
        heard = turn.text
    assert [message["role"] for message in asker.messages] == ["system", *["user", "assistant"] * 2, "user"]


def test_the_opening_line_is_part_of_the_history_of_an_assistant_whose_template_allows_it(model, tmp_path):
    strict = write_tiny_chat(
        tmp_path,
        template="{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}assistant:",
    )
    for one, expected in ((model, ["hello"]), (jaxchat.load(strict), [])):
        begun = begin(Speaker(name="A", model=one, options=OPTIONS), "hello")
        assert [message["content"] for message in begun.messages] == expected


def test_a_goodbye_ends_a_conversation_and_leaves_the_others(model):
    speaker = Speaker(name="A", model=model, options=OPTIONS)
    other = dataclasses.replace(speaker, name="B")
    plain = list(crosstalk(speaker, other, "hi", turns=4, conversations=3))
    word = next(t.text for t in plain if t.conversation == 1 and t.number == 2)
    turns = list(crosstalk(speaker, other, "hi", turns=4, conversations=3, goodbye=[word]))
    last = {turn.conversation: turn for turn in turns}
    assert (last[1].number, last[1].ends) == (2, "goodbye")
    assert [t for t in plain if t.conversation != 1] == [t for t in turns if t.conversation != 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Well, goodbye!", True), ("BYE", True), ("See you.", True), ("a byte", False), ("seeyou", False)],
)
def test_goodbyes_are_whole_words(text, expected):
    assert says_goodbye(text) == expected


def test_speakers_need_different_names_and_at_least_a_turn(model):
    speaker = Speaker(name="A", model=model)
    with pytest.raises(UsageError, match="both speakers are called A"):
        list(crosstalk(speaker, speaker, "hi"))
    with pytest.raises(UsageError, match="at least 1"):
        list(crosstalk(speaker, speaker, "hi", turns=0))


def test_a_directory_is_loaded_once_whatever_plans_run_over_it(directory):
    said = []
    load = ModelLoader(said=said.append)
    one, two = load(directory), load(str(directory), "0,1,1")
    assert one.engine is two.engine
    assert [str(m.plan) for m in (one, two)] == ["all", "0,1,1"]
    assert len(said) == 1


# --- experts


def test_labels_are_chosen_by_the_probability_of_all_their_tokens(model):
    labels = ["maths", "music", "mu"]
    choice = choose(model, "what is this?", labels)
    talk = model.conversation()
    talk.add_typed("what is this?")
    prompt = talk.prompt_ids()
    totals = []
    for label in labels:
        ids = model.encode(label)
        totals.append(sum(model.score(token_ids=[prompt + ids])[0].logprobs[-len(ids) :]))
    expected = np.exp(totals) / np.exp(totals).sum()
    np.testing.assert_allclose(list(choice.probabilities.values()), expected, rtol=1e-4)
    assert choice.name == labels[int(expected.argmax())]
    with pytest.raises(UsageError, match="no two alike"):
        choose(model, "?", ["a", "a"])


@pytest.fixture
def panel(model):
    experts = [
        Expert(name="maths", description="numbers", model=model, options=OPTIONS),
        Expert(name="music", description="songs", model=model, system="Sing.", options=OPTIONS),
        Expert(name="other", model=model.with_plan("0,1,1"), options=OPTIONS),
    ]
    return Panel(experts, model.with_plan("2,1,0"))


def test_the_selector_is_asked_with_names_and_descriptions(panel, model):
    asked = (
        "Please classify the question to one of these classes:\n"
        "1. maths: numbers\n2. music: songs\n3. other\n\nQuestion: why?"
    )
    assert panel.choose("why?") == choose(model.with_plan("2,1,0"), asked, ["maths", "music", "other"])


def test_the_chosen_expert_answers_in_a_conversation_of_its_own(panel):
    experts = {name: e.model.chat_session(e.system) for name, e in panel.experts.items()}
    for question in ("one?", "two!", "three", "four..."):
        choice, stream = panel.ask(question)
        assert choice.name == max(choice.probabilities, key=choice.probabilities.get)
        assert "".join(stream) == say(experts[choice.name], question)


def test_a_sticky_choice_stays_until_restart(panel):
    questions = [f"{n} {'?' * n}" for n in range(12)]
    panel.sticky = False
    fresh = [panel.choose(question) for question in questions]
    panel.restart()
    panel.sticky = True
    assert [panel.choose(question) for question in questions] == [fresh[0]] * len(questions)
    panel.restart()
    assert panel.choose(questions[5]) == fresh[5]


def test_all_experts_answer_as_they_would_alone(panel):
    answers = dict(panel.ask_all("hello?"))
    assert list(answers) == ["maths", "music", "other"]
    for row, name in ((0, "maths"), (1, "music"), (0, "other")):  # the first two are one batch
        expert = panel.experts[name]
        options = dataclasses.replace(OPTIONS, seed=OPTIONS.seed + row)
        assert answers[name].text == say(expert.model.chat_session(expert.system), "hello?", options)


def test_a_panel_is_read_from_yaml(directory, tmp_path):
    (tmp_path / "panel.yaml").write_text(
        f"experts:\n  - {{name: a, description: first, options: {{temperature: 0.5, stop: ['x']}}}}\n"
        f"  - {{name: b, model: {directory}, layer_spec: '0,1,1', system: Sing.}}\n"
        f"selector: {{model: {directory}, layer_spec: '0:2'}}\n"
        "prompt: '{classes}? {question}'\nsticky: true\n"
    )
    panel = read_panel(tmp_path / "panel.yaml", ModelLoader(), OPTIONS)
    first, second = panel.experts.values()
    assert (first.options.temperature, first.options.stop, first.options.seed) == (0.5, ("x",), 3)
    assert str(first.model.plan) == str(panel.selector.plan) == "0,1"
    assert (str(second.model.plan), second.system) == ("0,1,1", "Sing.")
    assert first.model.engine is second.model.engine
    assert panel.sticky
    assert panel.prompt == "{classes}? {question}"


def test_the_selector_may_choose_by_how_an_answer_begins(model):
    says = {"tales": "Once", "greetings": "Hello"}
    experts = [Expert(name=name, says=text, model=model) for name, text in says.items()]
    choice = Panel(experts, prompt="{question}").choose("hello?")
    found = choose(model, "hello?", list(says.values()))
    assert dict(choice.probabilities) == {name: found.probabilities[text] for name, text in says.items()}
    assert says[choice.name] == found.name
    with pytest.raises(UsageError, match="two experts say the same: Once, Once"):
        Panel([dataclasses.replace(experts[0], name="more"), experts[0]], prompt="{question}")


def test_a_panel_may_name_the_model_in_the_box(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("jaxchat.talk.models.load", lambda directory, **settings: loaded.append(directory))
    ModelLoader()("box")
    (tmp_path / "panel.yaml").write_text(
        "experts: [{name: a, model: box, says: Once}]\nprompt: '{question}'\n"
    )
    read_panel(tmp_path / "panel.yaml", ModelLoader(), OPTIONS)
    (tmp_path / "box").mkdir()
    read_panel(tmp_path / "panel.yaml", ModelLoader(), OPTIONS)
    assert [found.path for found in loaded] == [demo.path(), demo.path(), tmp_path / "box"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts: []", "experts: expected a list"),
        ("a: [", "not YAML"),
        ("experts: [{name: a}]", r"experts\[0\]: model is missing"),
        ("experts: [{model: m}]", r"experts\[0\]: name is missing"),
        ("experts: [{name: a, modle: m}]", r"experts\[0\]: unknown key 'modle'"),
        ("experts: [{name: 3, model: m}]", r"experts\[0\].name is 3: expected text"),
        ("experts: [{name: a, model: m, options: {heat: 1}}]", "unknown option 'heat'"),
        ("experts: [{name: a, model: nowhere}]", "nowhere"),
        ("{experts: [{name: a, model: m}], sticky: 1}", "sticky is 1: expected true or false"),
        ("{experts: [{name: a, model: m}], prompt: hello}", "has no {classes}"),
    ],
)
def test_a_bad_panel_is_named(directory, tmp_path, text, message):
    (tmp_path / "panel.yaml").write_text(text.replace("model: m", f"model: {directory}"))
    with pytest.raises(UsageError, match=message):
        read_panel(tmp_path / "panel.yaml", ModelLoader(), OPTIONS)


# --- thinking


def test_nudges_continue_one_thought_and_the_summarizer_is_given_all_of_it(model):
    summarizer = model.with_plan("0,2")
    thinker = Thinker(
        thinker=model,
        summarizer=summarizer,
        prefix="Well, ",
        nudges=[Nudge(" But wait, "), Nudge(" Then ", max_new_tokens=2)],
        system=None,
        prompt="{question}|{thoughts}",
        options=OPTIONS,
        summary_options=OPTIONS,
    )
    pieces = list(thinker.ask("why?"))
    chat = model.chat_session()
    thought = "".join(chat.send("why?", prefix="Well, ", **vars(OPTIONS)))
    thought += "".join(chat.continue_(" But wait, ", **vars(OPTIONS)))
    thought += "".join(chat.continue_(" Then ", **vars(dataclasses.replace(OPTIONS, max_new_tokens=2))))
    assert "".join(p.text for p in pieces if p.step != "answer") == thought
    answer = "".join(p.text for p in pieces if p.step == "answer")
    assert answer == say(summarizer.chat_session(), f"why?|{thought}")


def test_no_nudge_is_given_beyond_the_budget(model):
    thinker = Thinker(
        thinker=model, summarizer=model, prefix="", nudges=[Nudge(" a "), Nudge(" b ")], budget=8,
        system=None, options=dataclasses.replace(OPTIONS, ignore_eos=True), summary_options=OPTIONS,
    )  # fmt: skip
    pieces = list(thinker.ask("why?"))
    steps = [p.step for p in pieces]
    thought = "".join(p.text for p in pieces if p.step != "answer")
    assert " a " in thought
    assert " b " not in thought
    assert {"think", "nudge", "answer"} == set(steps)
