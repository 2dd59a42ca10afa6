"""A batch of conversations: each gets what it would get alone, whatever the others do."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxchat.chat.batch import Continue, Retry, Send
from jaxchat.engine.session import ContextOverflowError
from jaxchat.errors import UsageError
from jaxchat.options import GenerateOptions
from jaxchat.runtime import Model
from jaxchat.text.chat_template import ChatTemplate
from tests.support.products import some
from tests.support.real_chats import needs_data

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 3
SHORT = GenerateOptions(max_new_tokens=6)
SETTINGS = (
    {},
    {"system": "Be brief.", "reversed_role": True, "opening": "Tell me of rain."},
    {"system": "Rhyme."},
)
WITHOUT_SYSTEM = ({}, {"reversed_role": True, "opening": "Tell me of rain."}, {})


def in_both(model, settings=SETTINGS):
    """A batch of conversations, and the same ones alone."""
    batch = model.chat_batch([model.conversation(**own) for own in settings])
    return batch, [model.chat_session(**own) for own in settings]


def drawn(batch, turns, options):
    """The results of a batch's turns, after checking that the pieces of each are its text."""
    begun = batch.begin(turns, options)
    pieces = list(begun.pieces())
    results = {row: begun.result(row) for row in begun.replies}
    for row, result in results.items():
        assert "".join(piece.text for number, piece in pieces if number == row) == result.text
    return results


def alone(chat, turn, options):
    """The result of the same turn of a chat of its own; None if it is refused."""
    before = chat.messages
    calls = {
        Send: lambda: chat.send(turn.text, prefix=turn.prefix, prefix_in=turn.prefix_in, **vars(options)),
        Continue: lambda: chat.continue_(turn.suffix, **vars(options)),
        Retry: lambda: chat.retry(**vars(options)),
    }
    try:
        stream = calls[type(turn)]()
    except UsageError:
        assert chat.messages == before
        return None
    for _ in stream:
        pass
    return stream.result


def assert_equal(result, expected):
    for field in ("token_ids", "text", "content", "reasoning", "finish_reason", "prompt_tokens"):
        assert getattr(result, field) == getattr(expected, field), field
    np.testing.assert_allclose(result.logprobs, expected.logprobs, atol=2e-4)


def assert_in_step(batch, chats):
    for row, chat in enumerate(chats):
        assert batch.conversations[row].messages == chat.messages
        assert batch.conversations[row].token_ids == chat.token_ids
        assert batch.session.ids[row] == chat.session.ids[0]


# --- any history

words = st.sampled_from(["Hi", "", " and the", "café 🙂", "ok.\n\n", "<|im_end|></s><|eot_id|>", "Hel"])
turns = st.one_of(
    st.builds(Send, words, words),
    st.builds(Send, words, words, st.just("reasoning")),
    st.builds(Continue, words),
    st.just(Retry()),
)
drawing = st.builds(
    GenerateOptions,
    max_new_tokens=st.integers(1, 7),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.just(40),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("e",), (" ", "a")]),
    ignore_eos=st.booleans(),
)
changes = st.sampled_from(["undo", "other role", "other system prompt", "restart", "reload"])
step = st.one_of(st.none(), changes, st.tuples(turns, drawing), st.tuples(turns, drawing))
plans = st.sampled_from([None, None, "2,0,1", "0,2", "0:2,1:"])
histories = st.lists(st.tuples(plans, st.tuples(*[step] * ROWS)), min_size=2, max_size=4)


def change(what, model, batch, chats, row, path):
    """Changes a conversation between turns, in both."""
    conversation, chat = batch.conversations[row], chats[row]
    match what:
        case "undo":
            assert conversation.undo() == chat.undo()
        case "other role":
            conversation.reversed_role = not conversation.reversed_role
            chat.set_role(not chat.reversed_role)
        case "other system prompt" if conversation.system is not None:
            conversation.set_system("Sing.")
            chat.set_system("Sing.")
        case "restart":
            conversation.restart()
            chat.restart()
        case "reload" if chat.token_ids:
            batch.save(path, row)
            conversation.restart()
            batch.load(path, row)
            chats[row] = model.with_plan(chat.plan).load_session(path)


def check_history(model, end, settings, history, path):
    batch, chats = in_both(model, settings)
    for plan, steps in [(None, [(Send("Hi" * row), SHORT) for row in range(ROWS)]), *history]:
        if plan is not None:
            for chat in (batch, *chats):
                chat.set_plan(plan)
        expected, wanted, options = {}, [None] * ROWS, [SHORT] * ROWS
        for row, own in enumerate(steps):
            if isinstance(own, str):
                change(own, model, batch, chats, row, path)
            elif own is not None:
                turn, options[row] = own[0], dataclasses.replace(own[1], stop_token_ids=(end,))
                expected[row] = alone(chats[row], turn, options[row])
                wanted[row] = turn if expected[row] else None
        for row, result in drawn(batch, wanted, options).items():
            assert_equal(result, expected[row])
            check_said(chats[row], wanted[row], result)
        assert_in_step(batch, chats)


def check_said(chat, turn, result):
    """What was streamed is what the history holds."""
    said = chat.messages[-1]
    if isinstance(turn, Continue):
        assert said["content"].endswith(result.content)
    elif not said["content"].startswith("<think>"):  # where the template reads no reasoning apart
        assert said["content"] == result.content
        assert said.get("reasoning_content", "") == (result.reasoning or "")


NAMES = ["llama-3.1", "qwen3", "mistral-nemo", "gemma-2", "deepseek-r1"]


@needs_data
@pytest.mark.parametrize("name", some(NAMES, ["qwen3", "gemma-2"]))
def test_any_history_in_a_batch_equals_that_of_a_chat_of_its_own(name, chat_of, tmp_path):
    @settings(
        max_examples=4,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        database=None,
        derandomize=True,
    )
    @given(history=histories)
    def check(history):
        model, end = chat_of(name)
        own = WITHOUT_SYSTEM if name == "gemma-2" else SETTINGS
        check_history(model, end, own, history, tmp_path / "chat")

    check()


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(history=histories)
def test_any_history_of_a_batch_of_bytes_equals_that_of_chats_of_their_own(tiny, tmp_path_factory, history):
    check_history(tiny, 2, SETTINGS, history, tmp_path_factory.getbasetemp() / "chat")


# --- what a row has of its own


def test_each_row_has_options_of_its_own(tiny):
    batch, chats = in_both(tiny, [{}] * 4)
    options = [
        GenerateOptions(max_new_tokens=3),
        GenerateOptions(max_new_tokens=9, temperature=1.0, seed=7),
        GenerateOptions(max_new_tokens=40, temperature=1.0, seed=3, stop=("e", "a", "o")),
        GenerateOptions(
            overflow="truncate_oldest", ignore_eos=True, max_new_tokens=20, repetition_penalty=1.5
        ),
    ]
    wanted = [Send("one"), Send("two", prefix="So"), Send("three"), Send("x" * 300)]
    results = drawn(batch, wanted, options)
    for row, result in results.items():
        assert_equal(result, alone(chats[row], wanted[row], options[row]))
    assert len({len(result.token_ids) for result in results.values()}) >= 3
    assert_in_step(batch, chats)


def test_what_ends_one_row_does_not_end_another(tiny):
    batch, _ = in_both(tiny, [{}] * 3)
    options = GenerateOptions(max_new_tokens=12, ignore_eos=True)
    ids = drawn(batch, [Send("same")] * 3, [options] * 3)[0].token_ids
    at = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    stopping = dataclasses.replace(options, stop_token_ids=(ids[at],))
    results = drawn(batch, [Retry()] * 3, [options, stopping, dataclasses.replace(options, max_new_tokens=5)])
    assert [result.token_ids for result in results.values()] == [ids, ids[: at + 1], ids[:5]]
    assert [result.finish_reason for result in results.values()] == ["length", "stop", "length"]


def test_one_row_continues_another_retries_a_third_waits(tiny):
    batch, chats = in_both(tiny)
    for wanted in (
        [Send("hi"), Send("hello, all of you", prefix="Well"), None],
        [Continue(" and"), Retry(), None],
        [None, Continue("!"), Send("", prefix="I")],
    ):
        for row, result in drawn(batch, wanted, [SHORT] * ROWS).items():
            assert_equal(result, alone(chats[row], wanted[row], SHORT))
        assert batch.conversations[1].messages == chats[1].messages
    assert_in_step(batch, chats)


def test_a_row_that_never_spoke_holds_no_token(tiny):
    batch, _ = in_both(tiny)
    drawn(batch, [Send("hi"), None, None], [SHORT] * ROWS)
    assert (batch.session.ids[1], batch.session.cached[1]) == ([], 0)
    assert batch.send([None] * ROWS, SHORT) == [None] * ROWS


def test_a_row_may_be_stopped_alone(tiny):
    batch, chats = in_both(tiny, [{}, {}])
    options = GenerateOptions(max_new_tokens=20, ignore_eos=True)
    begun = batch.begin([Send("a"), Send("b")], [options] * 2)
    for row, _ in begun.pieces():
        if row == 0:
            begun.generation.stop(0)
    assert len(begun.result(0).token_ids) < 20
    assert_equal(begun.result(1), alone(chats[1], Send("b"), options))
    assert batch.conversations[0].messages[-1]["content"] == begun.result(0).text


def test_what_one_row_is_refused_is_said_in_none(tiny):
    batch, chats = in_both(tiny)
    drawn(batch, [Send("hi")] * ROWS, [SHORT] * ROWS)
    for chat in chats:
        alone(chat, Send("hi"), SHORT)
    with pytest.raises(
        ContextOverflowError, match=r"^conversation 2 has \d+ tokens, too many .* of 400; start"
    ):
        batch.begin([Send("more"), Continue("x"), Send("x" * 500)], [SHORT] * ROWS)
    assert_in_step(batch, chats)
    batch.conversations[1].restart()
    chats[1].restart()
    with pytest.raises(UsageError, match="no reply to continue"):
        batch.begin([Send("more"), Continue("x"), Retry()], [SHORT] * ROWS)
    wanted = [Retry(), Send("again"), Continue(" so")]
    for row, result in drawn(batch, wanted, [SHORT] * ROWS).items():
        assert_equal(result, alone(chats[row], wanted[row], SHORT))
    assert_in_step(batch, chats)


def test_a_saved_row_is_a_session_and_the_other_way_round(tiny, tmp_path):
    batch, _ = in_both(tiny)
    batch.send(["a", "b", "c"], SHORT)
    batch.save(tmp_path / "row", 1)
    session = tiny.load_session(tmp_path / "row")
    assert session.messages == batch.conversations[1].messages
    expected = alone(session, Send("more"), SHORT)
    batch.load(tmp_path / "row", 0)
    for result in drawn(batch, [Send("more"), Send("more"), None], [SHORT] * ROWS).values():
        assert_equal(result, expected)


class Scripted:
    """A generation that draws given tokens."""

    def __init__(self, session, ids):
        self.session, self.ids, self.finish_reasons = session, ids, [None]

    def allow(self, row, allowed):
        assert allowed[self.ids[0]]

    def uncount(self, row):
        pass

    def __iter__(self):
        while self.ids:
            self.session.ids[0].append(self.ids.pop(0))
            yield 0, self.session.ids[0][-1], 0.0


@needs_data
def test_ids_where_given_and_drawn_text_meet_are_put_right_in_the_cache_while_little_follows(chat_of):
    model, _ = chat_of("llama-3.1")
    chats = model.chat_batch([model.conversation()])
    words = {word: model.tokenizer.encode_after(word, after=1) for word in ("I", " am", " going")}
    begun = chats.begin([Send("Hi", prefix="I am go")], [SHORT])
    drawn = [
        i for word in (" go", "ing", " to", " say", " so", ".") for i in model.tokenizer.encode_after(word)
    ]
    begun.generation = Scripted(chats.session, drawn)
    text = ""
    for _, piece in begun.pieces():
        text += piece.text
        assert chats.session.ids[0] == begun.replies[0].context
        if " so" in text:
            assert begun.replies[0].ids[:3] == [i for ids in words.values() for i in ids]
    assert chats.conversations[0].messages[-1]["content"] == text == "I am going to say so."


def test_the_end_of_its_roles_turn_ends_a_reply(tiny):
    turns = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
        "{{ '<|user|>' if m.role == 'user' else '</s>' }}{% endfor %}"
    )
    model = Model(tiny.engine, tiny.plan, tokenizer=tiny.tokenizer, template=ChatTemplate(turns), max_slots=4)
    end, rows = tiny.tokenizer.special_tokens["<|user|>"], 16
    batch = model.chat_batch(
        [model.conversation(reversed_role=row % 2 == 0, opening="Hi") for row in range(rows)]
    )
    options = [GenerateOptions(max_new_tokens=200, temperature=20.0, seed=seed) for seed in range(rows)]
    results = drawn(batch, [Send("more")] * rows, options)
    users, assistants = ([r for row, r in results.items() if row % 2 == odd] for odd in (0, 1))
    assert any(end in r.token_ids for r in users)
    assert all(r.token_ids.index(end) == len(r.token_ids) - 1 for r in users if end in r.token_ids)
    assert any(end in r.token_ids[:-1] for r in assistants)
