"""Steering, continuing and reversed roles: after every step ids, text and cache are those of the template.

On real templates and tokenizers with a tiny random model; each fault that was measured in chatllm.cpp has a
test of its own name here.
"""

import dataclasses
import itertools
import json
import re
import unicodedata
import zlib
from itertools import accumulate

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import jaxchat
from jaxchat.chat.conversation import Conversation, ConversationState
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.options import GenerateOptions
from jaxchat.runtime import Model
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.healing import Healing, byte_length, join, settle
from jaxchat.text.tokenizer import Detokenizer
from jaxchat.text.tokenizer_json import JsonTokenizer
from tests.support import real_chats
from tests.support.real_chats import DATA, TEMPLATES, needs_data
from tests.support.tiny_chat import write_parrot, write_tiny_chat

EXAMPLES = 4  # of step sequences a model
PLANS = ("all", "2,0,1", "0,2", "0:2,1:")
pytestmark = pytest.mark.usefixtures("quick_compilation")

REAL = ("llama-3.1", "qwen2.5", "qwen3", "mistral-nemo", "gemma-2", "phi-3.5", "deepseek-r1", "minueza")


def run(stream):
    """A stream's result, after checking that its pieces are its text."""
    assert "".join(stream) == stream.result.text
    return stream.result


def fresh_logits(chat):
    session = chat.session.engine.session(chat.plan, max_slots=4)
    session.set_ids(chat.token_ids)
    return np.asarray(session.prefill()[0])


def through_json(state):
    text = json.dumps(msgspec.to_builtins(state))
    return msgspec.convert(json.loads(text), ConversationState)


def assert_in_step(chat):
    """Cache, history and template agree, and the logits are those of a fresh prefill."""
    conversation = chat.conversation
    template, tokenizer = conversation.template, conversation.tokenizer
    if not chat.token_ids:
        return
    assert chat.session.ids[0] == chat.token_ids
    np.testing.assert_allclose(np.asarray(chat.session.prefill()[0]), fresh_logits(chat), atol=2e-4)
    assert squeezed(spelled(tokenizer, chat.token_ids)) == squeezed(conversation.rendered_text())
    copy = Conversation.from_state(template, tokenizer, through_json(conversation.state()))
    assert (copy.messages, copy.token_ids) == (chat.messages, chat.token_ids)
    try:
        copy.open()
    except UsageError:
        return  # not this role's turn
    expected = rendered(template, chat.messages, chat.conversation.role)
    assert copy.rendered_text() == expected
    assert squeezed(spelled(tokenizer, copy.token_ids)) == squeezed(expected)


def rendered(template, messages, role):
    """The template's own text up to where the next message of the model begins."""
    if role == "assistant":
        return template.render(messages, add_generation_prompt=True)
    with_user = [*messages, {"role": "user", "content": "NEXT MESSAGE"}]
    return template.render(with_user, add_generation_prompt=True).rpartition("NEXT MESSAGE")[0].rstrip(" ")


def spelled(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


def squeezed(text):
    """Text as every tokenizer spells it: Qwen's compose characters, Phi-3's swallow some white space."""
    return "".join(unicodedata.normalize("NFC", text).split())


# --- the joint of a given and a generated text

TOKENIZERS = {
    "gpt2": {"tokenizer.json": "tokenizers/gpt2/tokenizer.json"},
    "gpt-neox": {"tokenizer.json": "tokenizers/gpt-neox/20B_tokenizer.json"},
    "llama2": {"tokenizer.model": "tokenizers/llama2/tokenizer.model"},
    "llama2-json": {"tokenizer.json": "tokenizers/llama_swift/tokenizer.json"},
    "llama3": {"tokenizer.model": "tokenizers/llama3/tokenizer.model"},
    "qwen2": {"vocab.json": "tokenizers/qwen2/vocab.json", "merges.txt": "tokenizers/qwen2/merges.txt"},
    "mistral": {"tokenizer.model": "tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3"},
    "phi-3": {"tokenizer.json": "tokenizers/phi-3/tokenizer.json"},
    "unigram": {"tokenizer.model": "tokenizers/spm-unigram/test_model.model"},
}
TEXTS = (
    "The URL is http://example.com/a?b=1.",
    "  Hello,   world!\n\nInternationalization isn't 1234567 cafés.",
    "def f(x):\n    return x\n\n\n# 咖啡馆 🙂👍🏽 e\u0301 façade",
)


@pytest.fixture
def tokenizer_of():
    return lambda name: real_chats.tokenizer_of(TOKENIZERS[name])


def go_on(tokenizer, given, target):
    """The ids of `given` healed, and then of a model that, where it may, draws the tokens of `target`."""
    healing = Healing(tokenizer, given)
    ids, text = given[: healing.kept], b"".join(map(tokenizer.token_bytes, target))
    starts = dict(
        zip(accumulate((byte_length(tokenizer, [i]) for i in target), initial=0), target, strict=False)
    )
    while (at := byte_length(tokenizer, ids)) < len(text) or healing.allowed():
        among = healing.allowed()
        wanted = starts.get(at)
        if wanted is None or (among and wanted not in among):
            fitting = [i for i in among or tokenizer.ids_starting_with(text[at : at + 1])
                       if text[at:].startswith(tokenizer.token_bytes(i))]  # fmt: skip
            wanted = max(fitting, key=lambda i: len(tokenizer.token_bytes(i)))
        healing.push(wanted)
        ids = [*ids, wanted]
    return ids


@needs_data
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prefix_and_continuation_are_tokenized_as_one_text(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    after = tokenizer.encode_after("x")[-1]
    for text in TEXTS:
        target = tokenizer.encode_after(text, after=after)
        for cut in range(1, len(text), 2):
            given = join(tokenizer, [], text[:cut], after=after)
            assert given == tokenizer.encode_after(text[:cut], after=after)
            ids = go_on(tokenizer, given, target)
            joint = byte_length(tokenizer, given)
            if byte_length(tokenizer, target) == byte_length(tokenizer, ids):  # no character was composed
                assert settle(tokenizer, ids, joint, after=after) == target, (text[:cut], text[cut:])


@needs_data
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "unigram"])  # it knows no "?"
def test_a_suffix_is_tokenized_with_what_it_follows(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    after = tokenizer.encode_after("x")[-1]
    for text in TEXTS[:2]:
        target = tokenizer.encode_after(text, after=after)
        for cut in range(0, len(text), 3):
            first = tokenizer.encode_after(text[:cut], after=after)
            assert join(tokenizer, first, text[cut:], after=after) == target


@needs_data
@pytest.mark.parametrize("name", ["gpt2", "llama2", "qwen2"])
def test_generated_tokens_away_from_a_joint_stay_as_they_are(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    after = tokenizer.encode_after("x")[-1]
    letters = [i for c in " spelled" for i in tokenizer.encode_after(c, after=after)]
    ids = join(tokenizer, letters, " out. Hel", after=after)
    assert ids[: len(letters)] == letters
    joint = byte_length(tokenizer, ids)
    more = [*ids, *tokenizer.encode_after("lo", after=ids[-1]), *letters]
    settled = settle(tokenizer, more, joint, after=after)
    assert settled == [*letters, *tokenizer.encode_after(" out. Hello", after=letters[-1]), *letters]


@needs_data
def test_a_token_may_span_the_end_of_a_prefix(tokenizer_of):
    tokenizer = tokenizer_of("gpt2")
    healing = Healing(tokenizer, tokenizer.encode('The link is <a href="http:'))
    allowed = {tokenizer.token_bytes(i) for i in healing.allowed()}
    assert {b":", b"://"} <= allowed
    assert all(text.startswith(b":") for text in allowed)


@needs_data
def test_what_no_longer_token_begins_with_is_not_drawn_again(tokenizer_of):
    healing = Healing(tokenizer_of("gpt2"), tokenizer_of("gpt2").encode("xq zqj~}{"))
    assert healing.kept >= len(tokenizer_of("gpt2").encode("xq zqj~}{")) - 2


@needs_data
def test_special_tokens_in_a_prefix_are_text(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    ids = join(tokenizer, [], "a<|eot_id|>b", after=tokenizer.encode_after("x")[-1])
    assert not set(ids) & set(tokenizer.control_tokens.values())
    assert tokenizer.decode(ids) == "a<|eot_id|>b"


@needs_data
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 3, "min_p": 0.2}]
)
def test_what_is_drawn_after_a_prefix_spells_it(options, chat_of):
    model, _ = chat_of("llama-3.1")
    for number, prefix in enumerate(("http:", "Hello wor", "咖", "  ")):
        chat = model.chat_session()
        result = run(chat.send("Hi", prefix=prefix, max_new_tokens=3, seed=number, **options))
        assert result.text.startswith(prefix)
        assert chat.messages[-1]["content"] == result.text
        assert_in_step(chat)


# --- any order of steps

words = st.sampled_from(
    ["Hi", "", " and the", "café 🙂", "ok.\n\n", "<|im_end|></s><|eot_id|>", "Hel", "e\u0301"]
)
sizes = st.integers(1, 7)
steps = st.one_of(
    st.tuples(st.just("send"), words, words, sizes),
    st.tuples(st.just("think"), words, words, sizes),
    st.tuples(st.just("continue"), words, sizes),
    st.tuples(st.just("retry"), sizes),
    st.tuples(st.just("undo")),
    st.tuples(st.just("plan"), st.sampled_from(PLANS)),
    st.tuples(st.just("role"), st.booleans()),
    st.tuples(st.just("system"), st.sampled_from([None, "Be brief.", "Rhyme."])),
    st.tuples(st.just("reload")),
    st.tuples(st.just("restart")),
)


def take(model, chat, step, seed, options, path):
    """Does one step and returns the chat."""
    name, *arguments = step
    options = {**options, "temperature": 1.0, "top_k": 40, "seed": seed}
    match name:
        case "send":
            run(chat.send(arguments[0], prefix=arguments[1], max_new_tokens=arguments[2], **options))
        case "think":
            text, prefix, size = arguments
            run(chat.send(text, prefix=prefix, prefix_in="reasoning", max_new_tokens=size, **options))
        case "continue":
            run(chat.continue_(arguments[0], max_new_tokens=arguments[1], **options))
        case "retry":
            run(chat.retry(max_new_tokens=arguments[0], **options))
        case "undo":
            chat.undo()
        case "plan":
            chat.set_plan(arguments[0])
        case "role":
            chat.set_role(arguments[0])
        case "system":
            chat.set_system(arguments[0])
        case "reload":
            if chat.token_ids:
                chat.save(path)
                return model.with_plan(chat.plan).load_session(path)
        case "restart":
            chat.restart()
    return chat


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_after_any_steps_the_cache_holds_the_rendered_conversation(name, chat_of, tmp_path):
    model, end = chat_of(name)

    @seed(zlib.crc32(name.encode()))
    @settings(
        max_examples=EXAMPLES,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        database=None,
    )
    @given(
        steps=st.lists(steps, min_size=3, max_size=5),
        reversed_role=st.booleans(),
        opening=st.sampled_from([None, "Tell me about rain."]),
    )
    def check(steps, reversed_role, opening):
        chat = model.chat_session(reversed_role=reversed_role, opening=opening if reversed_role else None)
        chat = (
            take(model, chat, ("send", "Hi", "", 3), 0, {"stop_token_ids": [end]}, None)
            if not reversed_role
            else chat
        )
        for number, step in enumerate(steps):
            before = chat.messages
            try:
                chat = take(model, chat, step, number, {"stop_token_ids": [end]}, tmp_path / "chat")
            except UsageError:
                assert chat.messages == before  # refused, and nothing changed
            if step[0] in ("send", "think", "continue", "retry", "reload"):
                assert_in_step(chat)

    check()


# --- the faults of chatllm.cpp, one by one

OPTIONS = {"max_new_tokens": 6}


def ended_chat(chat_of, name="qwen2.5"):
    """A chat whose reply was ended by the end-of-turn token."""
    model, end = chat_of(name)
    chat = model.chat_session()
    chat.conversation.add_typed("Hi")
    chat.conversation.add_reply(
        [*model.tokenizer.encode_after("Fine, thanks."), end], chat.conversation.open()
    )
    chat.session.set_ids(chat.token_ids)
    return chat, end


@needs_data
def test_the_prefix_is_part_of_message_and_history(chat_of):
    model, _ = chat_of("qwen2.5")
    chat = model.chat_session()
    stream = chat.send("Hi", prefix="Let's think.\n", **OPTIONS)
    pieces = list(stream)
    assert pieces[0] == "Let's think.\n"
    assert chat.messages[-1]["content"] == stream.result.text == "".join(pieces)
    run(chat.send("More", **OPTIONS))  # for one turn only
    assert not chat.messages[-1]["content"].startswith("Let's")
    assert "<|im_start|>assistant\nLet's think.\n" in spelled(model.tokenizer, chat.session.ids[0])
    assert_in_step(chat)


@needs_data
def test_continuing_after_a_prefix_drops_nothing(chat_of):
    chat = chat_of("qwen2.5")[0].chat_session()
    first = run(chat.send("Hi", prefix="Let me think about this step by step, in all detail.\n", **OPTIONS))
    ids = chat.token_ids
    second = run(chat.continue_(" Wait.", **OPTIONS))
    assert chat.messages[-1]["content"] == first.text + second.text
    assert chat.token_ids[: len(ids) - 2] == ids[:-2]  # the joint may recut the last tokens
    assert_in_step(chat)


@needs_data
def test_continuing_in_a_long_chat_goes_on_at_its_end(chat_of):
    chat = chat_of("llama-3.1")[0].chat_session()
    for number in range(6):
        run(chat.send(f"Message {number}. " + "word " * 40, **OPTIONS))
    ids, said = chat.token_ids, chat.messages[-1]["content"]
    assert len(ids) > 300
    more = run(chat.continue_(" And so on.", **OPTIONS))
    assert more.timings.prefill_tokens < 12  # the cache was kept
    assert chat.token_ids[: len(ids) - 2] == ids[:-2]
    assert chat.messages[-1]["content"] == said + more.text
    assert_in_step(chat)


def test_a_turn_ended_by_length_keeps_its_last_token(tiny):
    whole, parts = tiny.chat_session(), tiny.chat_session()
    expected = run(whole.send("hi", max_new_tokens=12)).token_ids
    first = run(parts.send("hi", max_new_tokens=5))
    rest = [run(parts.continue_(max_new_tokens=n)).token_ids for n in (1, 2, 4)]
    assert [*first.token_ids, *itertools.chain(*rest)] == expected
    assert parts.token_ids == whole.token_ids
    assert parts.messages == whole.messages


@needs_data
@pytest.mark.parametrize("ended", ["by itself", "by length"])
def test_the_end_of_turn_is_in_the_cache(ended, chat_of):
    chat, end = ended_chat(chat_of)
    if ended == "by length":
        chat = chat_of("qwen2.5")[0].chat_session()
        run(chat.send("Hi", max_new_tokens=2))
    before = chat.session.ids[0].count(end)
    run(chat.send("Next", **OPTIONS, stop_token_ids=[end]))
    prompt = chat.session.ids[0][: chat.session.ids[0].index(end) + 1]
    assert len(prompt) < len(chat.session.ids[0])
    turns = spelled(chat.conversation.tokenizer, chat.session.ids[0]).split("<|im_end|>\n")
    assert len(turns) >= 5  # system, user, assistant, user, assistant
    assert chat.session.ids[0].count(end) >= before + 1
    assert_in_step(chat)


@needs_data
def test_continuing_takes_the_end_of_turn_back(chat_of):
    chat, end = ended_chat(chat_of)
    ids, said = chat.token_ids, chat.messages[-1]["content"]
    more = run(chat.continue_(" However,", max_new_tokens=3))
    assert chat.token_ids[len(ids) - 1] != end
    assert "Fine, thanks. However," in chat.conversation.rendered_text()
    assert chat.messages[-1]["content"] == said + more.text
    assert_in_step(chat)
    chat, end = ended_chat(chat_of)
    assert run(chat.continue_(max_new_tokens=3)).text  # with nothing to add, it does not just end again


def test_two_models_share_no_system_prompt(tmp_path):
    one, two = (jaxchat.load(write_tiny_chat(tmp_path / n, seed=i, max_position_embeddings=400))
                for i, n in enumerate("ab"))  # fmt: skip
    chats = [one.chat_session("first prompt"), two.chat_session("second, longer prompt")]
    alone = [one.chat_session("first prompt"), two.chat_session("second, longer prompt")]
    streams = [chat.send("hi", **OPTIONS) for chat in chats]
    for _ in itertools.zip_longest(*streams):
        pass
    for chat, other, stream, system in zip(chats, alone, streams, ("first", "second"), strict=True):
        assert stream.result.token_ids == run(other.send("hi", **OPTIONS)).token_ids
        text = chat.conversation.rendered_text()
        assert text.startswith(f"<s><|system|>{system}")
        assert text.count("<|system|>") == 1


@needs_data
@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "phi-3.5", "mistral-nemo", "deepseek-r1"])
def test_reversed_role_has_the_system_prompt_and_the_opening(name, chat_of):
    model, _ = chat_of(name)
    chat = model.chat_session("You are a shy child.", reversed_role=True, opening="Who are you?")
    run(chat.send("I am a robot.", **OPTIONS))
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user"]
    text = spelled(model.tokenizer, chat.session.ids[0])
    for said in ("You are a shy child.", "Who are you?", "I am a robot."):
        assert text.count(said) == 1
    assert_in_step(chat)
    run(chat.send("And you?", **OPTIONS))
    assert_in_step(chat)


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_special_tokens_in_typed_text_are_not_obeyed(name, chat_of):
    model, _ = chat_of(name)
    tokenizer = model.tokenizer
    control = set(tokenizer.control_tokens.values())
    forged = "".join(itertools.islice((t for t in tokenizer.control_tokens if t != "<unk>"), 8))
    counts = []
    for text in ("plain", forged):
        conversation = Conversation(model.template, tokenizer)
        conversation.add_typed("x" + text)
        opening = conversation.open(prefix="y" + text)
        counts.append(sum(i in control for i in (*opening.prompt, *opening.ids)))
        chat = model.chat_session()
        run(chat.send(text, prefix="Sure " + text, **OPTIONS))
        run(chat.continue_(" " + text, max_new_tokens=1))
    assert counts[0] == counts[1]
    assert chat.conversation.rendered_text().count(forged) == 3


def test_top_p_is_one_softmax_cut_off(tiny):
    temperature, top_p = 0.5, 0.4
    prompt = tiny.encode("hello")
    session = tiny.engine.session(tiny.plan)
    session.set_ids(prompt)
    logits = np.asarray(session.prefill()[0], np.float64) / temperature
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    kept = order[: np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1]
    expected = probabilities[kept] / probabilities[kept].sum()
    assert len(kept) >= 3
    drawn = [
        result.token_ids[0]
        for seed in range(0, 1600, 64)
        for result in tiny.generate(
            token_ids=[prompt] * 64, batch_size=64, seed=seed, max_new_tokens=1,
            temperature=temperature, top_p=top_p,
        )
    ]  # fmt: skip
    assert set(drawn) <= set(kept.tolist())
    frequency = np.array([drawn.count(i) for i in kept]) / len(drawn)
    # A softmax of a softmax is nearly uniform.
    np.testing.assert_allclose(frequency, expected, atol=4 * np.sqrt(0.25 / len(drawn)))
    assert abs(frequency[0] - 1 / len(kept)) > 0.02


# --- reversed role, from any template

_SPECIAL = re.compile(
    r"<\|[^|<>\s]*\|>|<｜[^｜]*｜>|\[/?[A-Z_]{3,}\]|</?(?:start_of_turn|end_of_turn|s)>|<\|?turn\|?>"
)
# These only render with tools or functions; the error says so.
NEED_MORE = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2",
}


def byte_tokenizer(special):
    """One token a byte, and these special tokens."""
    names = sorted({*special, "<s>", "</s>"})
    alphabet = (*names, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend = Backend(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names)
    return JsonTokenizer(backend, bos="<s>", eos=["</s>"])


@needs_data
@pytest.mark.parametrize("file", sorted((DATA / TEMPLATES).glob("*.jinja")), ids=lambda p: p.stem)
def test_the_model_plays_the_user_of_any_template(file):
    source = file.read_text(encoding="utf-8")
    template = ChatTemplate(source, path=file.name, variables={"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = byte_tokenizer(_SPECIAL.findall(source))
    conversation = Conversation(template, tokenizer, reversed_role=True, opening="Who are you?")
    conversation.add_typed("I am a robot.")
    if file.stem in NEED_MORE:
        with pytest.raises(JaxchatError, match=r"it may need a variable, as in template_kwargs=") as excinfo:
            conversation.open()
        assert "\n" not in str(excinfo.value)
        return
    opening = conversation.open()
    assert conversation.rendered_text() == rendered(template, conversation.messages, "user")
    assert opening.stop_ids or opening.stop_strings
    # What the model says and how it ends it becomes the user's message, rendered as the template does.
    end = list(opening.stop_ids) or tokenizer.encode_after(opening.stop_strings[0])
    said = tokenizer.encode_after("Tell me more")
    ids = [*opening.ids, *said, *tokenizer.encode_after(opening.tail), *end]
    conversation.add_reply(ids, opening)
    assert conversation.messages[-1] == {"role": "user", "content": "Tell me more"}
    conversation.add_typed("No.")
    conversation.open()
    assert conversation.rendered_text() == rendered(template, conversation.messages, "user")


@needs_data
def test_a_template_that_cannot_go_on_says_so_in_one_line(chat_of):
    chat = chat_of("gemma-2")[0].chat_session(reversed_role=True)
    with pytest.raises(UsageError, match=r"the model cannot play the user here: .*must alternate") as excinfo:
        chat.send("I begin.", **OPTIONS)
    assert "\n" not in str(excinfo.value)
    assert chat.messages == []


@needs_data
def test_the_model_may_go_first(chat_of):
    chat = chat_of("gemma-2")[0].chat_session(reversed_role=True)
    run(chat.send("", prefix="Dear robot,", **OPTIONS))
    assert chat.messages[0]["content"].startswith("Dear robot,")
    assert_in_step(chat)
    assert chat.undo() == ""
    assert chat.messages == []


def test_the_end_of_the_users_turn_stops_it_be_it_text(tiny):
    source = (
        "{{ bos_token }}{% for m in messages %}{{ 'User' if m.role == 'user' else 'Bot' }}: {{ m.content }}"
        "\n\n{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}"
    )
    model = Model(tiny.engine, tiny.plan, tokenizer=tiny.tokenizer, template=ChatTemplate(source))
    chat = model.chat_session(reversed_role=True, opening="Hi")
    chat.conversation.add_typed("Hello")
    opening = chat.conversation.open()
    assert (opening.lead, opening.stop_strings) == (" ", ("\n\nBot:",))
    assert chat.conversation.rendered_text().endswith("Bot: Hello\n\nUser:")
    chat.conversation.add_reply(tiny.tokenizer.encode(" So?\n\nBot: me"), opening)
    assert chat.messages[-1] == {"role": "user", "content": "So?"}
    chat.conversation.add_typed("Yes")
    chat.conversation.open()
    assert chat.conversation.rendered_text().endswith("\n\nUser: So?\n\nBot: Yes\n\nUser:")


@pytest.mark.parametrize(
    ("said", "end", "reply"),
    [
        ("abc<|system|>def", "<|system|>", "abc"),  # a special token that no file calls an end
        ("abc\n<|user|>def", "\n", "abc"),  # no end but the next role's token
        ("ab c\n#def", "\n#", "ab c"),
        ("abc\n#def", "{{ '' if loop.last else '\n#' }}", "abc"),  # between two messages only
        ("abc<|system|>def", "{{ eos_token if loop.last else '<|system|>' }}", "abcdef"),  # the last one's
    ],
)
def test_a_reply_ends_where_the_template_ends_it(said, end, reply, tmp_path):
    turns = f"{{% for m in messages %}}<|{{{{ m.role }}}}|>{{{{ m.content }}}}{end}{{% endfor %}}"
    template = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    model = jaxchat.load(write_parrot(tmp_path, said + "</s>", template=template))
    batch = model.chat_batch([model.conversation(), model.conversation()])
    assert [message.text for message in batch.send(["x", "y"], GenerateOptions())] == [reply] * 2
    chat = model.chat_session()
    assert run(chat.send("x")).text == reply
    assert run(chat.continue_("z")).text == "z" + reply
    assert run(chat.send("y", prefix="z")).text == "z" + reply
    assert [m["content"] for m in chat.messages] == ["x", reply + "z" + reply, "y", "z" + reply]
    assert_in_step(chat)
    assert len(run(chat.send("y", ignore_eos=True, max_new_tokens=9)).token_ids) == 9


def test_the_role_may_change_in_mid_chat(tiny):
    chat = tiny.chat_session("be")
    run(chat.send("hi", **OPTIONS))
    chat.set_role(True)
    assert chat.reversed_role
    run(chat.send("", **OPTIONS))  # the model answers itself
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user"]
    run(chat.continue_("?", **OPTIONS))  # in any role
    chat.set_role(False)
    run(chat.send("", **OPTIONS))
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert_in_step(chat)


# --- reasoning


def think(conversation, opening, text, **options):
    tokenizer = conversation.tokenizer
    ids = [*opening.ids, *tokenizer.encode_after(text, after=opening.prompt[-1])]
    return conversation.add_reply(ids, opening, **options)


@needs_data
@pytest.mark.parametrize(
    ("name", "prefix_in", "begins", "message"),
    [
        ("qwen3", "content", "<think>\n\n</think>\n\nSure", {"content": "Sure thing"}),
        ("qwen3", "reasoning", "<think>\nSure", {"content": "", "reasoning_content": "Sure thing"}),
        ("deepseek-r1", "content", "\n</think>\n\nSure", {"content": "Sure thing"}),
        ("deepseek-r1", "reasoning", "Sure", {"content": "<think>\nSure thing"}),
    ],
)
def test_a_prefix_opens_the_answer_or_the_reasoning(name, prefix_in, begins, message, chat_of):
    model, _ = chat_of(name)
    conversation = Conversation(model.template, model.tokenizer)
    conversation.add_typed("Hi")
    opening = conversation.open(prefix="Sure", prefix_in=prefix_in)
    assert spelled(model.tokenizer, opening.ids) == begins
    think(conversation, opening, " thing")
    assert conversation.messages[-1] == {"role": "assistant", **message}


@needs_data
@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
@pytest.mark.parametrize("prefix_in", ["content", "reasoning"])
def test_a_stream_tells_reasoning_from_content(name, prefix_in, chat_of):
    chat = chat_of(name)[0].chat_session()
    stream = chat.send("Hi", prefix="Well", prefix_in=prefix_in, max_new_tokens=4)
    parts = list(stream.parts())
    result = stream.result
    assert parts[0].kind == prefix_in
    assert parts[0].text.startswith("Well")
    assert "".join(p.text for p in parts) == result.text
    assert "".join(p.text for p in parts if p.kind == "reasoning") == result.reasoning
    assert "".join(p.text for p in parts if p.kind == "content") == result.content
    assert_in_step(chat)
    more = chat.continue_(" so", max_new_tokens=3)
    assert {p.kind for p in more.parts()} == {prefix_in}  # it goes on where it was
    assert_in_step(chat)


@needs_data
def test_a_model_that_does_not_think_has_no_reasoning(chat_of):
    model, _ = chat_of("llama-3.1")
    chat = model.chat_session()
    assert run(chat.send("Hi", **OPTIONS)).reasoning is None
    with pytest.raises(UsageError, match=r"knows no reasoning: .*thought_tags"):
        chat.send("Hi", prefix="Hm", prefix_in="reasoning")
    assert len(chat.messages) == 2
    assert_in_step(chat)  # a refusal changes nothing
    named = model.chat_session(thought_tags=("<think>", "</think>"))
    assert run(named.send("Hi", prefix="Hm", prefix_in="reasoning", **OPTIONS)).reasoning.startswith("Hm")


@needs_data
def test_reasoning_that_is_switched_off_takes_no_prefix(chat_of):
    chat = chat_of("qwen3")[0].chat_session(template_kwargs={"enable_thinking": False})
    with pytest.raises(UsageError, match="has closed the reasoning"):
        chat.send("Hi", prefix="Hm", prefix_in="reasoning")


# --- the rest of a session


def test_retry_generates_the_message_anew_from_its_prefix(tiny):
    chat = tiny.chat_session()
    first = run(chat.send("hi", prefix="So", max_new_tokens=8, temperature=1.0, seed=1))
    run(chat.continue_(" more", max_new_tokens=3))
    again = run(chat.retry(max_new_tokens=8, temperature=1.0, seed=1))
    assert (again.token_ids, again.text) == (first.token_ids, first.text)
    other = run(chat.retry(max_new_tokens=8, temperature=1.0, seed=2))
    assert other.text != first.text
    assert other.text.startswith("So")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert_in_step(chat)


def test_undo_gives_the_typed_message_back(tiny):
    chat = tiny.chat_session("be")
    run(chat.send("one", **OPTIONS))
    ids = chat.token_ids
    run(chat.send("two", **OPTIONS))
    assert chat.undo() == "two"
    run(chat.send("two", **OPTIONS))
    assert chat.token_ids[: len(ids)] == ids
    assert (chat.undo(), chat.undo(), chat.undo()) == ("two", "one", None)
    assert [m["role"] for m in chat.messages] == ["system"]


def test_nothing_to_continue_or_retry_is_an_error(tiny):
    chat = tiny.chat_session("be", reversed_role=True, opening="Hi")
    for call, what in ((chat.continue_, "continue"), (chat.retry, "retry")):
        with pytest.raises(UsageError, match=f"no reply to {what}"):
            call()


def test_a_new_system_prompt_holds_for_the_whole_chat(tiny):
    chat = tiny.chat_session("be")
    run(chat.send("hi", **OPTIONS))
    chat.set_system("sing")
    run(chat.continue_("!", **OPTIONS))
    assert chat.conversation.rendered_text().startswith("<s><|system|>sing</s><|user|>hi</s>")
    assert_in_step(chat)
    chat.set_system(None)
    run(chat.send("and?", **OPTIONS))
    assert chat.conversation.rendered_text().startswith("<s><|user|>hi</s>")
    assert_in_step(chat)


def test_restart_keeps_system_prompt_and_opening(tiny):
    chat = tiny.chat_session("be", reversed_role=True, opening="Hello")
    kept = chat.messages
    run(chat.send("hi", **OPTIONS))
    chat.restart()
    assert chat.messages == kept


def test_prefixes_count_for_nothing_in_max_new_tokens(tiny):
    for prefix in ("", "hello", "a b c"):
        result = run(tiny.chat_session().send("hi", prefix=prefix, max_new_tokens=1, ignore_eos=True))
        assert result.finish_reason == "length"
        assert len(result.token_ids) <= 2  # the prefix's last token drawn again, and one


def test_a_stop_string_is_no_part_of_the_history(tiny):
    chat = tiny.chat_session()
    text = run(chat.send("hi", prefix="I say stop. ", max_new_tokens=24)).text
    stop = text[len("I say stop. ") + 4 :][:2]
    chat = tiny.chat_session()
    result = run(chat.send("hi", prefix="I say stop. ", stop=[stop, "stop"], max_new_tokens=24))
    assert result.text == text[: text.index(stop, len("I say stop. "))]  # not at the prefix's own
    assert chat.messages[-1]["content"] == result.text
    assert_in_step(chat)


def test_a_long_continued_chat_forgets_its_oldest_turns(tiny):
    chat = tiny.chat_session("be")
    options = {"max_new_tokens": 20, "overflow": "truncate_oldest"}
    for number in range(8):
        run(chat.send(f"message {number}", prefix="Well", **options))
        run(chat.continue_(" and", **options))
    contents = [m["content"] for m in chat.messages]
    assert (contents[0], "message 0" in contents, "message 7" in contents) == ("be", False, True)
    assert len(chat.session.ids[0]) <= 400


def test_a_state_is_json_and_gives_the_same_conversation(tiny):
    chat = tiny.chat_session("be", reversed_role=True, opening="Hi", template_kwargs={"x": 1})
    run(chat.send("yes", prefix="No", **OPTIONS))
    state = through_json(chat.conversation.state())
    again = Conversation.from_state(tiny.template, tiny.tokenizer, state)
    assert again.state() == chat.conversation.state()
    assert again.open() == chat.conversation.open()
    assert dataclasses.asdict(again.reopen("x")) == dataclasses.asdict(chat.conversation.reopen("x"))
