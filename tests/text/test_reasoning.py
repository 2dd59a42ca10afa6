"""Reasoning is told from content by the tags of the model's template, however the text arrives."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.errors import UsageError
from jaxchat.text.reasoning import (
    Piece,
    ReasoningSplitter,
    opens_reasoning,
    parse_thought_tags,
    thought_tags_of,
)

THINK = ("<think>", "</think>")


def split(*pushes, tags=THINK, opened=False):
    """The (reasoning, content) of a message that arrives in these pushes."""
    splitter = ReasoningSplitter(tags, opened=opened)
    pieces = [piece for text in pushes for piece in splitter.push(text)] + splitter.flush()
    assert all(piece.text for piece in pieces)
    return tuple("".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content"))


@pytest.mark.parametrize(
    ("message", "reasoning", "content"),
    [
        ("<think>\nSix times seven.\n</think>\n\nIt is 42.", "Six times seven.", "It is 42."),
        ("<think></think>Hi", "", "Hi"),
        ("<think>\n\n</think>\n\nHi", "", "Hi"),
        ("\n<think>a</think>b", "a", "b"),
        ("<think>a</think>\n<think>b</think>\nc", "ab", "c"),
        ("<think>a b\n\nc</think> d \n", "a b\n\nc", "d \n"),
        ("<think>a</think>\n\n    code()", "a", "    code()"),
        ("<think>a < b, </thin", "a < b, </thin", ""),
        ("<think>never closed\n", "never closed\n", ""),
        ("<think>a</think>", "a", ""),
        ("<think>a</think>\n", "a", ""),
    ],
)
def test_a_message_is_its_reasoning_and_its_content(message, reasoning, content):
    assert split(message) == (reasoning, content)


@pytest.mark.parametrize(
    "text", ["", "y", "<", "<thin", " \n", "< think", " no\n", "</thin", "<3", "a<think>b</think>"]
)
def test_a_message_without_reasoning_is_content_to_the_last_character(text):
    assert split(text) == ("", text)


def test_a_tag_after_the_answer_began_is_text():
    text = "Models write <think> and </think> around their reasoning."
    assert split(text) == ("", text)
    assert split("<think>hm</think>" + text) == ("hm", text)


def test_a_close_tag_before_any_content_is_dropped():
    assert split("</think>\n\nHello") == ("", "Hello")


def test_a_close_tag_whose_open_tag_the_model_left_out_is_text():
    assert split("Well.\n</think>\nHello") == ("", "Well.\n</think>\nHello")


def test_the_prompt_may_have_opened_the_reasoning():
    assert split("Well.\n</think>\nHello", opened=True) == ("Well.", "Hello")
    assert split("<think>\nWell.</think>Hello", opened=True) == ("Well.", "Hello")
    assert split("Hello", opened=True) == ("Hello", "")


def test_without_tags_everything_is_content():
    assert split("<think>a</think>b", tags=None) == ("", "<think>a</think>b")


def test_text_comes_out_as_soon_as_it_is_certain():
    splitter = ReasoningSplitter(THINK)
    assert splitter.push("<thi") == []
    assert splitter.push("nk>\nSo") == [Piece("So", "reasoning")]
    assert splitter.push(" it is. </") == [Piece(" it is.", "reasoning")]
    assert splitter.kind == "reasoning"
    assert splitter.push("think>\n") == []
    assert splitter.push("\nYes <") == [Piece("Yes <", "content")]
    assert splitter.kind == "content"
    assert splitter.flush() == []


ALPHABET = st.sampled_from(["<think>", "</think>", "<", ">", "think", "</", "a", " ", "\n", "  \n", "é"])


@given(st.lists(ALPHABET, max_size=12).map("".join), st.data(), st.booleans())
def test_the_way_a_message_is_cut_does_not_matter(message, data, opened):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(message)), max_size=20)))
    pushes = [message[a:b] for a, b in zip([0, *cuts], [*cuts, len(message)], strict=True)]
    assert split(*pushes, opened=opened) == split(message, opened=opened)
    assert split(*message, opened=opened) == split(message, opened=opened)


@given(st.lists(ALPHABET, max_size=12).map("".join), st.booleans())
def test_nothing_is_lost_but_tags_and_white_space(message, opened):
    # Part by part: a cut between them may join what looks like a tag.
    parts = [part.replace("<think>", "").replace("</think>", "") for part in split(message, opened=opened)]
    bare = "".join("".join(parts).split())
    assert bare == "".join(message.replace("<think>", "").replace("</think>", "").split())


@pytest.mark.parametrize("bad", ["", "<think>", "a b c", "<t> <t>", "<t <t>"])
def test_thought_tags_are_two_different_words(bad):
    assert parse_thought_tags(" <r>  </r> ") == ("<r>", "</r>")
    with pytest.raises(UsageError, match="--thought_tags"):
        parse_thought_tags(bad)


def test_a_prompt_opens_the_reasoning_where_it_ends_with_the_tag():
    assert opens_reasoning("<|user|>hi<|assistant|><think>\n", THINK)
    assert not opens_reasoning("<|user|>hi<|assistant|><think>\n</think>", THINK)
    assert not opens_reasoning("<|user|><think><|assistant|>", THINK)
    assert not opens_reasoning("<think>", None)


def test_tags_in_a_comment_of_the_template_declare_nothing():
    assert thought_tags_of("{# strips <think> and\n</think> #}{{ messages }}") is None


# What each real template that mentions reasoning gives; all others give None.
THINKING = {
    **dict.fromkeys(
        (
            "Bielik-11B-v3.0-Instruct", "GLM-4.6", "GLM-4.7-Flash", "HuggingFaceTB-SmolLM3-3B",
            "Kimi-K2-Thinking", "LFM2.5-8B-A1B", "LFM2.5-Instruct", "MiniMax-M2",
            "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "NVIDIA-Nemotron-Nano-v2", "Qwen-QwQ-32B",
            "Qwen-Qwen3-0.6B", "Qwen3.5-4B", "Reka-Edge", "StepFun3.5-Flash", "stepfun-ai-Step-3.5-Flash",
            "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
            "deepseek-ai-DeepSeek-V3.1", "deepseek-ai-DeepSeek-V3.2", "llama-cpp-deepseek-r1",
            "ibm-granite-granite-3.3-2B-Instruct", "llama-cpp-rwkv-world", "v5_smollm3", "qwen3",
        ),
        THINK,
    ),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("[THINK]", "[/THINK]"),
    "ByteDance-Seed-OSS": ("<seed:think>", "</seed:think>"),
    "unsloth-Apriel-1.5": ("<thinking>", "</thinking>"),
    "Apriel-1.6-15b-Thinker-fixed": ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    "Apertus-8B-Instruct": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "google-gemma-4-31B-it": ("<|channel>thought", "<channel|>"),
    "google-gemma-4-31B-it-interleaved": ("<|channel>thought", "<channel|>"),
}  # fmt: skip
# These think, but not between two tags that the template names: the user gives --thought_tags or reads all.
NOT_BETWEEN_TAGS = {"openai-gpt-oss-120b", "gpt-oss", "upstage-Solar-Open-100B", "phi-4-mini-reasoning"}


def test_the_tags_of_real_templates(shared_data):
    sources = {p.stem: p.read_text(encoding="utf-8") for p in shared_data.glob("templates/llama.cpp/*.jinja")}
    for directory in sorted((shared_data / "templates" / "tokenizer_config").iterdir()):
        config = directory / "tokenizer_config.json"
        own = (
            json.loads(config.read_text(encoding="utf-8")).get("chat_template", "")
            if config.is_file()
            else ""
        )
        text = own if isinstance(own, str) else "\n".join(t["template"] for t in own)
        jinja = directory / "chat_template.jinja"
        sources[directory.name] = jinja.read_text(encoding="utf-8") if jinja.is_file() else text
    assert sources.keys() >= THINKING.keys() | NOT_BETWEEN_TAGS
    found = {name: tags for name, source in sources.items() if (tags := thought_tags_of(source))}
    assert found == THINKING
