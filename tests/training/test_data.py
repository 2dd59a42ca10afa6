"""Training data: what examples become of files, which of their tokens are learnt, and what is refused how."""

import itertools
import json
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.chat.conversation import Conversation
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.named_templates import chosen_template
from jaxchat.text.tokenizer_files import load_tokenizer
from jaxchat.training import data_files
from jaxchat.training.data import Dataset, Encoder
from jaxchat.training.records import Chat, Text
from tests.support import real_chats
from tests.support.tiny_chat import TEMPLATE, write_tiny_chat

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte; no BOS of its own."""
    return load_tokenizer(write_tiny_chat(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def encoder_of(tokenizer):
    """`encoder_of(source, **options)`: an encoder with that template, None for none."""

    def build(source=TEMPLATE, **options):
        variables = {"bos_token": "<s>", "eos_token": "</s>"}
        template = None if source is None else ChatTemplate(source, path="the template", variables=variables)
        return Encoder(tokenizer, template, **{"max_length": 1000, **options})

    return build


@pytest.fixture
def encoder(encoder_of):
    return encoder_of()


@pytest.fixture
def written(tmp_path):
    """`written(name, records or text or bytes)`: the path of a file that holds it."""

    def write(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def stretches(example):
    """`[(first, past the last, learnt)]` of an example."""
    cuts = [0, *(np.flatnonzero(np.diff(example.weights)) + 1).tolist(), len(example.ids)]
    return [(a, b, bool(example.weights[a])) for a, b in itertools.pairwise(cuts)]


def marked(tokenizer, example):
    """The text of an example, what is learnt in brackets."""
    texts = [(tokenizer.decode(example.ids[a:b].tolist()), learnt) for a, b, learnt in stretches(example)]
    return "".join(f"⟦{text}⟧" if learnt else text for text, learnt in texts)


# --- kinds of records

CHAT = "<s><|user|>Hi</s><|assistant|>⟦Yo</s>⟧"
TWICE = [USER, REPLY, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Bye"}]
RECORDS = {
    "text": ({"text": "abc"}, "a⟦bc</s>⟧"),
    "special tokens of a text are text": ({"text": "a</s>"}, "a⟦</s></s>⟧"),
    "openai": ({"messages": [USER, REPLY]}, CHAT),
    "every reply": ({"messages": TWICE}, CHAT + "<|user|>So?</s><|assistant|>⟦Bye</s>⟧"),
    "nothing after the last reply": ({"messages": [*TWICE[:3]]}, CHAT),
    "openai, in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, REPLY]},
        CHAT,
    ),
    "system": (
        {"messages": [{"role": "developer", "content": "Be kind"}, USER, REPLY]},
        "<s><|system|>Be kind</s>" + CHAT[3:],
    ),
    "an empty system prompt is none": ({"messages": [{"role": "system", "content": " "}, USER, REPLY]}, CHAT),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, CHAT),
    "sharegpt with a system prompt": (
        {
            "system": "S",
            "conversations": [{"from": "user", "value": "Hi"}, {"from": "Bing", "value": "Yo"}],
        },
        "<s><|system|>S</s>" + CHAT[3:],
    ),
    "a first reply to nothing is dropped": (
        {
            "conversations": [
                {"from": "bard", "value": "I'm here"},
                {"from": "human", "value": "Hi"},
                {"from": "chatgpt", "value": "Yo"},
            ]
        },
        CHAT,
    ),
    "two turns of one role are one": (
        {
            "conversations": [
                {"from": "human", "value": "H"},
                {"from": "human", "value": "i"},
                {"from": "gpt", "value": "Y"},
                {"from": "gpt", "value": "o"},
            ]
        },
        "<s><|user|>H\n\ni</s><|assistant|>⟦Y\n\no</s>⟧",
    ),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Yo"}, CHAT),
    "alpaca with an input": (
        {"instruction": "Add", "input": "1 1", "output": "2", "text": "made of the rest"},
        "<s><|user|>Add\n\n1 1</s><|assistant|>⟦2</s>⟧",
    ),
    "results of tools are messages each": (
        {"messages": [USER, *({"role": "tool", "content": n} for n in "12"), REPLY]},
        "<s><|user|>Hi</s><|tool|>1</s><|tool|>2</s><|assistant|>⟦Yo</s>⟧",
    ),
    "special tokens of messages are text": (
        {"messages": [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "<|user|>"}]},
        "<s><|user|></s></s><|assistant|>⟦<|user|></s>⟧",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_a_text_of_which_replies_are_learnt(encoder, written, tokenizer, name):
    record, expected = RECORDS[name]
    path = written("train.jsonl", [record])
    example = Dataset([path], encoder)[0]
    assert marked(tokenizer, example) == expected
    assert (example.ids.dtype, example.weights.dtype) == (np.int32, np.float32)
    assert example.place == f"{path}:1"
    assert example.weights[0] == 0


def test_ids_and_weights_are_these(encoder, written, tokenizer):
    ids = {text: tokenizer.encode(text)[0] for text in "HiYo</s>"}
    example = Dataset([written("train.jsonl", [{"messages": [USER, REPLY]}])], encoder)[0]
    assert example.ids.tolist() == [1, 4, ids["H"], ids["i"], 2, 5, ids["Y"], ids["o"], 2]
    assert example.weights.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    spelled = Dataset([written("train.jsonl", [{"text": "</s>"}])], encoder)[0]
    assert spelled.ids.tolist() == [*(ids[c] for c in "</s>"), 2], "one token a character, and then EOS"


def test_bos_and_eos_of_a_text_are_the_tokenizers(tmp_path, written):
    write_tiny_chat(tmp_path)
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    tokens = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>")]
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [tokens[0], {"Sequence": {"id": "A", "type_id": 0}}, tokens[1]],
        "pair": [],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("<s>", 1), ("</s>", 2))},
    }
    path.write_text(json.dumps(fields))
    tokenizer = load_tokenizer(tmp_path)
    encoder = Encoder(tokenizer, None, max_length=5)
    texts = Dataset([written("a.jsonl", [{"text": "ab"}]), written("b.txt", "abcde")], encoder)
    found = [marked(tokenizer, texts[k]) for k in range(len(texts))]
    assert found == ["<s>⟦ab</s>⟧", "<s>⟦abcd⟧", "<s>⟦e</s>⟧"]


def test_all_of_a_conversation_can_be_learnt(encoder_of, written, tokenizer):
    path = written("train.jsonl", [{"messages": TWICE}, {"messages": TWICE[:3]}, {"messages": [USER]}])
    examples = Dataset([path], encoder_of(train_on="all"))
    whole = "<s>⟦<|user|>Hi</s><|assistant|>Yo</s><|user|>So?</s>"
    assert marked(tokenizer, examples[0]) == whole + "<|assistant|>Bye</s>⟧"
    assert marked(tokenizer, examples[1]) == whole + "⟧"
    assert marked(tokenizer, examples[2]) == "<s>⟦<|user|>Hi</s>⟧"


def test_tools_and_calls_are_written_by_the_template(encoder_of, tokenizer):
    source = (
        "{% for tool in tools %}<|system|>{{ tool.name }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content }}{% for call in m.tool_calls %}call {{ call.name }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    messages = [USER, call, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, REPLY]
    example = encoder_of(source).encode(Chat(messages, [{"name": "f"}]), "here").example
    assert marked(tokenizer, example) == (
        "<|system|>f<|user|>Hi</s><|assistant|>⟦call f</s>⟧<|tool|>1</s><|tool|>2</s><|assistant|>⟦Yo</s>⟧"
    )


def test_without_a_template_instructions_have_alpacas_format_and_conversations_are_refused(
    encoder_of, written, tokenizer
):
    encoder = encoder_of(None)
    task = {"instruction": "Add", "input": "1 1", "output": "2"}
    example = Dataset([written("a.jsonl", [task])], encoder)[0]
    assert marked(tokenizer, example).endswith(
        "### Instruction:\nAdd\n\n### Input:\n1 1\n\n### Response:⟦2</s>⟧"
    )
    with pytest.raises(
        UsageError, match=r"b\.jsonl:1: a conversation, .* no chat template; name one \(chat_t"
    ):
        Dataset([written("b.jsonl", [{"messages": [USER, REPLY]}])], encoder, skip_bad_lines=True)[0]


@given(
    st.lists(st.tuples(*[st.text(min_size=1).filter(str.strip) | st.just("</s><|user|>")] * 2), min_size=1)
)
def test_what_is_learnt_is_the_replies(tokenizer, turns):
    template = ChatTemplate(TEMPLATE, variables={"bos_token": "<s>", "eos_token": "</s>"})
    encoder = Encoder(tokenizer, template, max_length=10**6)
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    example = encoder.encode(Chat(messages), "here").example
    parts = [example.ids[a:b].tolist() for a, b, learnt in stretches(example) if learnt]
    assert [tokenizer.decode(part[:-1]) for part in parts] == [reply for _, reply in turns]
    assert all(part[-1] == 2 and not {0, 1, 2, 3, 4, 5} & set(part[:-1]) for part in parts)


# --- templates

ENDS = {
    "alpaca": ("Yo</s>", "Bye</s>"),
    "vicuna_v1.1": (" Yo</s>", " Bye</s>"),
    "vicuna_v0": (" Yo\n### Human:", " Bye</s>"),  # nothing is written after the last one: EOS
    "dolly": ("Yo\n\n### End", "Bye\n\n### End"),
    "rwkv": (" Yo\n\n", " Bye\n\n"),
    "llama2": (" Yo </s>", " Bye </s>"),
    "zephyr": ("Yo</s>", "Bye</s>"),
    "chatml": ("Yo<|im_end|>", "Bye<|im_end|>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_reply_is_learnt_with_it(tokenizer, name):
    encoder = Encoder(tokenizer, chosen_template(name, tokenizer, None), max_length=1000)
    example = encoder.encode(Chat(TWICE), "here").example
    found = [tokenizer.decode(example.ids[a:b].tolist()) for a, b, learnt in stretches(example) if learnt]
    assert tuple(found) == ENDS[name]


def test_a_template_that_ends_no_reply_gets_the_eos(encoder_of, tokenizer):
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    assert marked(tokenizer, encoder_of(source).encode(Chat([USER, REPLY]), "here").example).endswith(
        "⟦Yo</s>⟧"
    )


def test_what_a_template_writes_only_between_a_reply_and_the_next_message_is_learnt_at_the_end(
    encoder_of, tokenizer
):
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ ' ' if m.role == 'assistant' }}"
        "{% if m.role == 'user' or not loop.last %}</s>{% endif %}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    )
    example = encoder_of(source).encode(Chat(TWICE), "here").example
    assert marked(tokenizer, example) == (
        "<|user|>Hi</s><|assistant|>⟦Yo </s>⟧<|user|>So?</s><|assistant|>⟦Bye </s>⟧"
    )


def test_a_reply_that_the_template_changes_later_is_not_learnt(encoder_of, tokenizer):
    written = "m['content'] if m['role'] == 'user' or loop.last else m['content'] | upper"
    source = TEMPLATE.replace("m['content']", written)
    example, unlearnt = encoder_of(source).encode(Chat(TWICE), "here")
    assert (
        marked(tokenizer, example)
        == "<s><|user|>Hi</s><|assistant|>YO</s><|user|>So?</s><|assistant|>⟦Bye</s>⟧"
    )
    assert unlearnt == 1


REAL = [
    {"role": "user", "content": "Say </s> <|im_end|>\n<|eot_id|>"},
    {"role": "assistant", "content": "Well: </s><|im_end|>, is that right?"},
    {"role": "user", "content": "Très bien."},
    {"role": "assistant", "content": "Good.\n\n```\n  x = 1\n```"},
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "That was all"},
]
REWRITING = {"qwen3", "deepseek-r1"}  # they take the reasoning out of all replies but the last


@real_chats.needs_data
@pytest.mark.parametrize("name", [name for name in real_chats.MODELS if name != "craftgpt"])
def test_ids_are_those_that_a_chat_makes(name):
    """Each prompt is that of the chat in which the learnt ids are the replies before it."""
    tokenizer, template, end = real_chats.load(name)
    example, unlearnt = Encoder(tokenizer, template, max_length=1000).encode(Chat(REAL), "here")
    replies = [(a, b) for a, b, learnt in stretches(example) if learnt]
    assert (len(replies), unlearnt) == ((1, 2) if name in REWRITING else (3, 0))
    chat = Conversation(template, tokenizer)
    chat.extend(REAL[: 1 + 2 * unlearnt])
    for number, (start, stop) in enumerate(replies, start=unlearnt):
        assert chat.prompt_ids() == example.ids[:start].tolist()
        assert tokenizer.special_tokens[end] == example.ids[stop - 1]
        chat.add_reply(example.ids[start:stop].tolist())
        content = chat.messages[-1]["content"].removeprefix("<think>\n\n</think>\n\n")
        assert content == REAL[2 * number + 1]["content"]
        chat.extend(REAL[2 * number + 2 :][:1])


THOUGHT = [
    USER,
    {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nYo"},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "<think>\nsecond\n</think>\n\nBye, <|im_end|><｜User｜>"},
]


@real_chats.needs_data
@pytest.mark.parametrize(
    ("name", "learnt"),
    [
        ("qwen3", "<think>\nsecond\n</think>\n\nBye, <|im_end|><｜User｜><|im_end|>"),
        # The prompt opens the reasoning.
        ("deepseek-r1", "second\n</think>\n\nBye, <|im_end|><｜User｜><｜end▁of▁sentence｜>"),
    ],
)
def test_reasoning_that_a_template_takes_out_later_is_learnt_of_the_last_reply_only(name, learnt):
    tokenizer, template, _ = real_chats.load(name)
    example, unlearnt = Encoder(tokenizer, template, max_length=1000).encode(Chat(THOUGHT), "here")
    (start, stop), *others = [(a, b) for a, b, learnt in stretches(example) if learnt]
    assert (tokenizer.decode(example.ids[start:stop].tolist()), others, unlearnt) == (learnt, [], 1)
    assert "first" not in tokenizer.decode(example.ids.tolist())
    spelled = {tokenizer.control_tokens.get(text) for text in ("<|im_end|>", "<｜User｜>")}
    assert not spelled & set(example.ids[start : stop - 1].tolist())


@real_chats.needs_data
def test_of_a_conversation_that_is_too_long_the_last_reply_that_fits_is_learnt():
    tokenizer, template, _ = real_chats.load("qwen3")
    turns = [m for k in range(8) for m in ({**USER, "content": f"{k}?"}, {**REPLY, "content": f"reply {k}"})]
    whole = Encoder(tokenizer, template, max_length=1000).encode(Chat(turns[:10]), "here").example
    cut = Encoder(tokenizer, template, max_length=len(whole.ids)).encode(Chat(turns), "here").example
    assert cut.ids.tolist() == whole.ids.tolist()
    assert cut.weights.tolist() == whole.weights.tolist()
    assert tokenizer.decode(cut.ids[-6:].tolist()).endswith("reply 4<|im_end|>")


def test_a_record_of_very_many_messages_is_cut_like_any_other(encoder_of):
    for train_on in ("assistant", "all"):
        encoder = encoder_of(max_length=45, train_on=train_on)
        few, many = (encoder.encode(Chat([USER, REPLY] * count), "here").example for count in (10, 20_000))
        assert few.ids.tolist() == many.ids.tolist()
        assert few.weights.tolist() == many.weights.tolist()
        assert len(few.ids) == {"assistant": 41, "all": 45}[train_on]


def test_reasoning_that_a_template_never_writes_is_learnt_as_it_stands(encoder_of, tokenizer):
    source = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
    reply = {"role": "assistant", "content": "<think>hm</think>Yo"}
    example = encoder_of(source).encode(Chat([USER, reply]), "here").example
    assert marked(tokenizer, example).endswith("<|assistant|>⟦<think>hm</think>Yo</s>⟧")


def test_reasoning_of_its_own_key_is_spelled_out_for_templates_that_do_not_read_it(encoder_of, tokenizer):
    source = TEMPLATE + "{# '</think>' #}{{ '' if '</think>' else '' }}"
    reply = {"role": "assistant", "content": "Yo", "reasoning_content": "hm"}
    example = encoder_of(source).encode(Chat([USER, reply]), "here").example
    assert marked(tokenizer, example).endswith("⟦<think>\nhm\n</think>\n\nYo</s>⟧")
    with pytest.raises(JaxchatError, match="the chat template knows no reasoning"):
        encoder_of().encode(Chat([USER, reply]), "here")


REFUSING = {
    "raises": (
        "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + TEMPLATE,
        "refuses this conversation: no system role",
    ),
    "ignores": (
        TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        "ignores the system prompt",
    ),
    "changes replies": (
        TEMPLATE.replace("m['content']", "m['content'] | upper"),
        "does not write out what the assistant says|does not write reply 2",
    ),
    "writes replies elsewhere": (
        TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>Sure: {% endif %}"),
        r"does not write reply 2 \('Yo'\) as the model has to",
    ),
}


@pytest.mark.parametrize("name", REFUSING)
def test_what_a_template_does_not_write_as_it_is_is_refused(encoder_of, written, name):
    source, message = REFUSING[name]
    path = written("train.jsonl", [{"messages": [{"role": "system", "content": "be kind"}, USER, REPLY]}])
    with pytest.raises(JaxchatError, match=rf"train\.jsonl:1: .*({message})"):
        Dataset([path], encoder_of(source))[0]
    examples = Dataset([path], encoder_of(source), skip_bad_lines=True)
    assert (examples[0], examples.skipped) == (None, 1)


def test_a_broken_template_is_no_fault_of_a_record(encoder_of, written):
    path = written("train.jsonl", [{"messages": [USER, REPLY]}])
    with pytest.raises(JaxchatError, match="the template: broken chat template"):
        Dataset([path], encoder_of("{% if %}"), skip_bad_lines=True)[0]


# --- lengths


def test_what_is_too_long_is_cut_at_the_end_and_left_out_without_anything_to_learn(encoder_of, written):
    records = [
        {"messages": [USER, REPLY]},
        {"messages": [{"role": "user", "content": "long"}, REPLY]},
        {"text": ""},
        {"messages": [USER]},
    ]
    examples = Dataset([written("train.jsonl", records)], encoder_of(max_length=8))
    assert examples[0].weights.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert [examples[k] for k in (1, 2, 3, 3)] == [None] * 4
    assert (len(examples), examples.empty, examples.skipped) == (4, 3, 0)
    assert examples.lengths.tolist() == [8, 0, 0, 0]


def test_a_text_file_is_cut_in_pieces_that_begin_with_bos(shared_data, written):
    """Each token is learnt once, and read in blocks they are those of the whole text."""
    text = (shared_data / "corpora" / "botchan.txt").read_text("utf-8-sig")[:3000]
    text += "\ndef f():\n" + "    x = 1\n\n\n" * 60 + "</s>\n\n  the end "
    path = written("book.txt", text)
    for name in ("mistral-nemo", "llama-3.1", "minueza", "qwen2.5"):
        tokenizer, template, _ = real_chats.load(name)
        whole = [*tokenizer.encode(text), *tokenizer.eos_ids[:1]]
        bos = whole[:1] if whole[0] == tokenizer.bos_id else []
        examples = Dataset([path], Encoder(tokenizer, template, max_length=50))
        found = [examples[k].ids.tolist() for k in range(len(examples))]
        assert bos + [i for ids in found for i in ids[len(bos) :]] == whole
        assert all(ids[: len(bos)] == bos for ids in found)
        assert {len(ids) for ids in found[:-1]} == {50}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data_files, "_TEXT_BLOCK", 200)
            examples = Dataset([path], Encoder(tokenizer, template, max_length=50))
            assert [examples[k].ids.tolist() for k in range(len(examples))] == found
    assert examples[1].place == f"{path}, piece 2"


# --- files


def test_lines_count_as_an_editor_counts_them(encoder, written):
    lines = [
        b'\xef\xbb\xbf{"text": "one"}\r\n',
        b"\n",
        b"\r\n",
        b'{"text": "two\xc3\xa9"}\n',
        b'{"text": "3"}',
    ]
    path = written("train.jsonl", b"".join(lines))
    examples = Dataset([path], encoder)
    assert [examples[k].place for k in range(len(examples))] == [f"{path}:{line}" for line in (1, 4, 5)]
    assert examples[1].ids.tolist() == encoder.encode(Text("twoé"), "").example.ids.tolist()


@given(
    st.lists(st.dictionaries(st.text(), st.recursive(st.text() | st.integers(), st.lists, max_leaves=4))),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_a_json_list_has_the_elements_that_a_parser_finds(tmp_path_factory, elements, indent, plain):
    path = tmp_path_factory.mktemp("list") / "train.json"
    path.write_text(" " + json.dumps(elements, indent=indent, ensure_ascii=not plain) + "\n\n", "utf-8")
    if not elements:
        with pytest.raises(JaxchatError, match="no records"):
            data_files.records_of(path)
        return
    records = data_files.records_of(path)
    assert [json.loads(records.read(k)) for k in range(len(records))] == elements
    assert records.place(0) == f"{path}[0]"


def test_a_file_that_is_cut_while_it_is_read_is_named(encoder, written):
    path = written("train.jsonl", [{"text": "ab"}] * 3)
    examples = Dataset([path], encoder, skip_bad_lines=True)
    assert len(examples) == 3
    path.write_bytes(b"")
    with pytest.raises(JaxchatError, match=r"train\.jsonl: the file has become shorter"):
        examples[2]


def test_json_lines_may_be_called_json_and_a_list_may_begin_with_a_byte_order_mark(encoder, written):
    assert len(Dataset([written("list.json", b'\xef\xbb\xbf[{"text": "ab"}]')], encoder)) == 1
    assert len(Dataset([written("train.json", [{"text": "ab"}] * 3)], encoder)) == 3


def test_a_directory_is_its_data_files_by_name(encoder, tmp_path, written):
    written("b.txt", "text")
    written("a.jsonl", [{"text": "ab"}, {"text": "cd"}])
    written("README.md", "no data")
    written(".hidden.txt", "no data")
    examples = Dataset([tmp_path], encoder)
    places = [examples[k].place for k in range(len(examples))]
    assert places == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.txt, piece 1"]


def test_the_digest_tells_data_apart_wherever_it_lies(encoder, written, tmp_path):
    def digest(records, name="a.jsonl"):
        return Dataset([written(name, records)], encoder).digest

    first = digest([{"text": "ab"}])
    (tmp_path / "other").mkdir()
    assert first == digest([{"text": "ab"}], "other/a.jsonl")
    assert len({first, digest([{"text": "ba"}]), digest([{"text": "ab"}], "b.jsonl")}) == 3


def test_all_examples_can_be_made_at_once(encoder, written):
    records = [{"text": "ab"}, {"text": 1}, {"text": ""}, {"text": "cd"}]
    told = []
    path = written("train.jsonl", records)
    examples = Dataset(
        [path], encoder, skip_bad_lines=True, lazy=False, progress=lambda *done: told.append(done)
    )
    assert [examples[k].place for k in range(len(examples))] == [f"{path}:1", f"{path}:4"]
    assert (examples.skipped, examples.empty) == (1, 1)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(JaxchatError, match=r"train\.jsonl:2: text is 1"):
        Dataset([path], encoder, lazy=False)
    empty = written("none.jsonl", [{"text": ""}])
    with pytest.raises(JaxchatError, match="nothing to learn: 0 bad records, 1 without"):
        Dataset([empty], encoder, lazy=False)


def test_a_large_file_is_opened_without_reading_it(encoder, tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    begin = time.monotonic()
    tracemalloc.start()
    assert Dataset([path], encoder).digest
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - begin < 1
    assert peak < 100 << 20


def test_of_lines_only_offsets_are_kept(encoder, written):
    path = written("train.jsonl", b'{"text": "' + b"x" * 980 + b'"}\n' + (b"\x00" * 999 + b"\n") * 50_000)
    tracemalloc.start()
    examples = Dataset([path], encoder)
    assert len(examples) == 50_001
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 1 << 20, "8 bytes a line, and a byte of what is known of it"
    assert peak < 24 << 20, "a block of the file, of 50 MB"


# --- what is refused

GOOD = b'{"text": "ab"}\n'
BAD = {
    "no JSON": (b"{text: ab}\n", r"not readable as JSON \(Expecting property name"),
    "cut off": (b'{"text": "ab\n', r"not readable as JSON \(Invalid control character|Unterminated"),
    "no object": (b'["text"]\n', r"\['text'\]; expected an object with 'messages', 'conversations'"),
    "other keys": (b'{"prompt": "a", "answer": 1}\n', "keys 'prompt', 'answer'; expected 'messages', "),
    "a number for a text": (b'{"text": 5}\n', "text is 5; expected a text"),
    "no output": (b'{"instruction": "a"}\n', "'output' is missing"),
    "an empty output": (b'{"instruction": "a", "output": ""}\n', "output is empty; expected a text"),
    "an unknown role": (
        b'{"conversations": [{"from": "dog", "value": "a"}]}\n',
        r"conversations\[0\]\.from is 'dog'; expected one of system, ",
    ),
    "an empty value": (
        b'{"conversations": [{"from": "human", "value": " "}]}\n',
        r"conversations\[0\]\.value is empty",
    ),
    "no value": (b'{"conversations": [{"from": "human"}]}\n', r"conversations\[0\]: 'value' is missing"),
    "no content": (b'{"messages": [{"role": "user"}]}\n', r"messages\[0\]\.content is empty"),
    "a number in content": (
        b'{"messages": [{"role": "user", "content": 3}]}\n',
        r"messages\[0\]\.content is 3; expected a text or a list or null",
    ),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n',
        r"messages\[0\]\.content\[0\]\.type is 'image_url'; expected 'text'",
    ),
    "a part without text": (
        b'{"messages": [{"role": "user", "content": [{"type": "text", "value": "a"}]}]}\n',
        r"messages\[0\]\.content\[0\]: 'text' is missing",
    ),
    "a key twice": (b'{"text": "a", "text": "b"}\n', "the key 'text' is there twice"),
    "half a character": (b'{"text": "\\ud83d"}\n', r"'\\ud83d' is half a character"),
    "no UTF-8": (b'{"text": "\xff"}\n', "not UTF-8 text: byte 0xff at offset 10"),
    "deep": (b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n", "nested more than 64 deep"),
    "long": (b'{"text": "' + b"x" * (17 << 20) + b'"}\n', "a record of 17 MiB, where at most 16 are read"),
    "an escape": (b'{"\x1b[2J": 1}\n', "Invalid control character"),
    "a long number": (b'{"text": ' + b"1" * 5000 + b"}\n", "not readable as JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_or_skipped(encoder, written, name):
    line, message = BAD[name]
    path = written("train.jsonl", GOOD + b"\n" + line + GOOD)
    with pytest.raises(JaxchatError, match=rf"train\.jsonl:3: .*({message})") as refusal:
        Dataset([path], encoder)[1]
    assert "skip_bad_lines" in str(refusal.value) or name == "long"
    assert len(str(refusal.value)) < 600
    assert "\x1b" not in str(refusal.value)
    examples = Dataset([path], encoder, skip_bad_lines=True)
    assert [examples[k] is None for k in (0, 1, 2, 1)] == [False, True, False, True]
    assert examples.skipped == 1


def test_a_bad_element_of_a_list_is_named_by_its_index(encoder, written):
    path = written("train.json", '[{"text": "a, ] }"}, {"text": 1}]')
    with pytest.raises(JaxchatError, match=r"train\.json\[1\]: text is 1"):
        Dataset([path], encoder)[1]


FILES = {
    "an empty file": ("a.jsonl", b"", "an empty file"),
    "blank lines only": ("a.jsonl", b"\n\n\r\n", "no records; expected JSON objects"),
    "an empty list": ("a.json", b" [ ] ", "no records"),
    "a list that is cut off": ("a.json", b'[{"text": "a"}, {"te', "does not end: element 1 is cut off"),
    "a text that is cut off": ("a.json", b'["' + b'\\"' * 10**6, "does not end: element 0 is cut off"),
    "more after a list": ("a.json", b'[{"text": "a"}] {', "there is more after the list, from byte 15 on"),
    "another kind": ("a.parquet", b"PAR1", "not a kind of file that is known; expected one of .jsonl, "),
    "a byte order mark only": ("a.txt", b"\xef\xbb\xbf", "no text"),
    "a text in Latin-1": ("a.txt", "schön".encode("latin-1"), "not UTF-8 text: byte 0xf6 at offset 3"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(encoder, written, name):
    file, content, message = FILES[name]
    with pytest.raises(JaxchatError, match=rf"{file}: .*{message}"):
        len(Dataset([written(file, content)], encoder, skip_bad_lines=True))


def test_a_path_that_leads_to_no_data_is_named(encoder, tmp_path):
    for path, message in [
        (tmp_path / "none.jsonl", r"data_path: .*none\.jsonl: No such file"),
        (tmp_path, "no data files in this directory; expected some of .jsonl"),
        ("/dev/null", "/dev/null: not a file"),
        ("a\0b.txt", "null"),
    ]:
        with pytest.raises(UsageError, match=message):
            Dataset([path], encoder)
    with pytest.raises(UsageError, match="train_on"):
        Encoder(encoder.tokenizer, None, max_length=8, train_on="replies")


# --- the reference


GENERATION = TEMPLATE.replace(
    "{{ m['content'] }}</s>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}",
)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (GENERATION, "", ""),
        # It marks what the prompt gives, and what nobody reads, as well.
        ("templates/tokenizer_config/v5_smollm3/chat_template.jinja", "<|im_start|>assistant\n", "\n"),
    ],
    ids=["tiny", "smollm3"],
)
def test_replies_are_those_that_transformers_masks(
    tmp_path, template, before, after, encoder_of, shared_data, tokenizer
):
    transformers = pytest.importorskip("transformers")
    if template.endswith(".jinja"):
        template = (shared_data / template).read_text()
    write_tiny_chat(tmp_path, template=template)
    expected = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(
        TWICE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    example = encoder_of(template, max_length=10**5).encode(Chat(TWICE), "here").example
    learnt = np.zeros(len(expected["input_ids"]), int)
    for start, stop in [(a, b) for a, b, is_learnt in stretches(example) if is_learnt]:
        learnt[start - len(before) : stop + len(after)] = 1
        assert tokenizer.decode(example.ids[start - len(before) : start].tolist()) == before
    assert example.ids.tolist() == expected["input_ids"][: len(example.ids)]
    assert learnt.tolist() == expected["assistant_masks"]
