"""The text of a message is derived once: while its ids come, or afterwards, cut anywhere, it is the same."""

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxchat.chat.conversation import Conversation
from jaxchat.chat.message_text import MessageText
from jaxchat.chat.opening import Opening
from jaxchat.text.chat_template import ChatTemplate

TAGS = ("<think>", "</think>")
TURNS = (
    "{% for m in messages %}{{ 'U' if m.role == 'user' else 'A' }}:{{ m.content }}\n\n</s>{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def said(text, ids):
    """The pieces of a message's text, and what they joined are."""
    pieces = text.begin() + [piece for i in ids for piece in text.push(i)] + text.end()
    assert "".join(piece.text for piece in pieces) == text.text
    return pieces


words = st.lists(
    st.sampled_from(["a", " ", "\n", "é", "<think>", "</think>", "stop", "st", "🦩"]), max_size=8
)


@given(words, st.integers(0, 40))
def test_a_message_that_is_continued_is_one_that_was_never_cut(tiny, words, at):
    tokenizer = tiny.tokenizer
    ids = tokenizer.encode("".join(words))
    first, rest = ids[:at], ids[at:]
    whole = MessageText(tokenizer, Opening("assistant", (1,)), tags=TAGS)
    said(whole, ids)
    before = MessageText(tokenizer, Opening("assistant", (1,)), tags=TAGS)
    conversation = Conversation(tiny.template, tokenizer, thought_tags=TAGS)
    conversation.add_typed("Hi")
    opening = conversation.open()
    said(before, first)
    conversation.add_message(first, opening, before)
    reopened = conversation.reopen()
    after = MessageText(tokenizer, reopened, kept=len(reopened.ids), tags=TAGS)
    said(after, rest)
    assert (after.whole, after.content, after.reasoning) == (whole.whole, whole.content, whole.reasoning)


@given(words)
def test_what_is_streamed_is_what_the_history_holds(tiny, words):
    conversation = Conversation(tiny.template, tiny.tokenizer)
    conversation.add_typed("Hi")
    opening = conversation.open()
    ids = tiny.tokenizer.encode("".join(words))
    text = MessageText(tiny.tokenizer, opening, stops=["stop"])
    pieces = said(text, ids)
    conversation.add_message(ids, opening, text)
    assert conversation.messages[-1]["content"] == "".join(piece.text for piece in pieces)
    spelled = tiny.tokenizer.decode(conversation.token_ids)
    assert spelled.endswith(f"<|assistant|>{text.whole}")


stops = ["st", "</s>", "<|user|>", "a<|user|>", "<|user|>st", "</s><|user|>a", "user"]


def first_stop(whole, stops):
    """Where the text ends: at the stop string that is complete first, however early another one begins."""
    for said in itertools.accumulate(re.findall(r"<[^>]*>|.", whole)):
        if found := [at for at in map(said.find, stops) if at >= 0]:
            return min(found)
    return len(whole)


@given(
    st.lists(st.sampled_from(["a", "st", "é", "</s>", "<|user|>", "<pad>"]), max_size=8),
    st.lists(st.sampled_from(stops), max_size=3),
)
@example(["</s>", "<|user|>", "a"], ["<|user|>", "</s><|user|>a"])
def test_stop_strings_find_special_tokens_by_their_names(tiny, words, stops):
    conversation = Conversation(tiny.template, tiny.tokenizer)
    conversation.add_typed("Hi")
    opening = conversation.open()
    ids = tiny.tokenizer.encode("".join(words), parse_special=True)
    text = MessageText(tiny.tokenizer, opening, stops=stops)
    said(text, ids)
    whole = "".join(words)
    cut = first_stop(whole, stops)
    kept = tiny.tokenizer.encode(whole[:cut], parse_special=True)
    assert text.stopped == (cut < len(whole))
    inside = re.search(r"<[^>]*$", whole[:cut])  # a stop string may begin inside of a name
    shown = re.sub(r"<[^>]*>", "", whole[: inside.start()] if inside else whole[:cut])
    assert text.whole == shown
    conversation.add_message(ids, opening, text)
    if not inside:
        assert conversation.token_ids == [*opening.prompt, *kept]


@pytest.mark.parametrize(
    ("drawn", "content"),
    [
        ("So?\n\n</s>", "So?"),  # white space before the end is the template's
        ("So?\n\n\n</s>", "So?\n"),
        ("So?\n</s>", "So?\n"),  # and this is not all of it
        ("So?\n\n", "So?\n\n"),  # no end
        ("So?\n\nNo.\n\n</s>", "So?\n\nNo."),
    ],
)
def test_white_space_before_the_end_of_a_users_turn_is_no_text(tiny, drawn, content):
    conversation = Conversation(ChatTemplate(TURNS), tiny.tokenizer, reversed_role=True, opening="Hi")
    conversation.add_typed("Hello")
    opening = conversation.open()
    assert (opening.tail, opening.stop_ids) == ("\n\n", (2,))
    text = MessageText(tiny.tokenizer, opening, tags=TAGS)
    ids = tiny.tokenizer.encode(drawn, parse_special=True)
    pieces = said(text, ids)
    assert "".join(piece.text for piece in pieces) == content
    conversation.add_message(ids, opening, text)
    assert conversation.messages[-1] == {"role": "user", "content": content}
    conversation.add_typed("Yes")
    ledger = conversation.token_ids
    assert list(conversation.open().prompt)[: len(ledger)] == ledger or not drawn.endswith("\n\n</s>")


def test_a_character_cut_in_two_is_completed_by_what_follows(tiny):
    chat = tiny.chat_session()
    chat.conversation.add_typed("Hi")
    flamingo = tiny.tokenizer.encode("ok 🦩")
    chat.conversation.add_reply(flamingo[:-2], chat.conversation.open())
    assert chat.messages[-1]["content"] == "ok \ufffd"
    opening = chat.conversation.reopen()
    text = MessageText(tiny.tokenizer, opening, kept=len(opening.ids))
    assert "".join(piece.text for piece in said(text, flamingo[-2:])) == "🦩"
    chat.conversation.add_message(flamingo, opening, text)
    assert chat.messages[-1]["content"] == "ok 🦩"


def test_thought_tags_in_a_users_message_are_text(tiny):
    text = MessageText(tiny.tokenizer, Opening("user", (1,)), tags=TAGS)
    said(text, tiny.tokenizer.encode("<think>a</think>b"))
    assert (text.whole, text.content, text.part("reasoning")) == ("<think>a</think>b",) * 2 + ("",)
