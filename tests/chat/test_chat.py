"""Chat templates render as their authors' tools do; a conversation's ids are its rendering's."""

import datetime
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxchat.chat.conversation import Conversation
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.text.chat_template import ChatTemplate
from tests.support import real_chats
from tests.support.real_chats import DATA, MODELS, TEMPLATES, needs_data

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def model():
    """name -> (tokenizer, template, end of turn)."""
    return real_chats.load


def canonical(conversation, tokenizer, text):
    """`text` as a model that always picks the canonical tokens would generate it after the prompt."""
    return tokenizer.encode_after(text, after=conversation.prompt_ids()[-1])


def one_shot(conversation, tokenizer, template, **kwargs):
    text = template.render(conversation.messages, add_generation_prompt=True, **kwargs)
    return tokenizer.encode(text, add_special_tokens=False, parse_special=True), text


# --- rendering

GOLDEN = DATA / "oracles/chat-templates/hfjs_e2e_golden.json"
# What differs from huggingface.js, whose output the file holds.
NOT_EQUAL = {
    "custom:MadeAgents/Hammer2.1": "prints a list of tools: Python and JavaScript spell it differently",
    "custom:HuggingFaceTB/SmolLM3-3B": "prints the date, fixed in the file",
    "custom:ai21labs/AI21-Jamba-Large-1.6": "tests if add_generation_prompt is defined: here it always is",
}


@needs_data
def test_golden_conversations_render_equal():
    unequal = []
    for name, case in json.loads(GOLDEN.read_text()).items():
        data = dict(case["data"])
        template = ChatTemplate(case["chat_template"], path=name)
        if template.render(data.pop("messages"), **data) != case["target"]:
            unequal.append(name)
    assert sorted(unequal) == sorted(NOT_EQUAL)


@needs_data
def test_the_golden_jamba_conversation_renders_equal_with_a_generation_prompt():
    case = json.loads(GOLDEN.read_text())["custom:ai21labs/AI21-Jamba-Large-1.6"]
    data = dict(case["data"])
    template = ChatTemplate(case["chat_template"])
    assert template.render(data.pop("messages"), add_generation_prompt=True, **data) == case["target"]


@needs_data
@pytest.mark.parametrize("file", sorted((DATA / TEMPLATES).glob("*.jinja")), ids=lambda p: p.stem)
def test_every_real_template_parses(file):
    ChatTemplate(file.read_text(encoding="utf-8"), path=file)


@needs_data
@pytest.mark.parity
def test_real_templates_render_as_in_transformers(monkeypatch):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [
        {"role": "system", "content": "Be <brief> & kind."},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello é"},
        {"role": "user", "content": "Bye"},
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    compared = 0
    for file in sorted((DATA / TEMPLATES).glob("*.jinja")):
        source = file.read_text(encoding="utf-8")
        for case in (messages, messages[1:], messages[1:2]):
            try:
                (expected,), _ = utils.render_jinja_template(
                    [case], chat_template=source, add_generation_prompt=True, **names
                )
            except Exception:
                with pytest.raises(JaxchatError):
                    ChatTemplate(source).render(case, add_generation_prompt=True, **names)
                continue
            assert ChatTemplate(source).render(case, add_generation_prompt=True, **names) == expected, (
                file.name
            )
            compared += 1
    assert compared > 100


def test_what_templates_expect_is_there():
    source = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}"
        "{%- if loop.index > 1 -%}{%- break -%}{%- endif -%}{%- set ns.n = ns.n + 1 -%}"
        "{% generation %}{{ m.content }}{% endgeneration %}{%- endfor -%}|{{ ns.n }}|{{ strftime_now('%Y') }}"
        "|{{ {'b': '<é&>', 'a': 1} | tojson(sort_keys=true, separators=(',', ':')) }}"
        "|{{ dict(a=1).a }}|{{ [1] | tojson(indent=1) }}|{{ missing }}|{{ tools is none }}"
    )
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]
    year = datetime.date.today().year
    assert ChatTemplate(source).render(messages) == f'x|1|{year}|{{"a":1,"b":"<é&>"}}|1|[\n 1\n]||True'


def test_a_variable_that_is_no_plain_value_is_one_line():
    with pytest.raises(JaxchatError, match="a variable is no plain value"):
        ChatTemplate("{{ f() }}").render([], f=lambda: 1)


def test_a_refusal_is_a_usage_error_with_the_template_s_words():
    with pytest.raises(UsageError, match="roles must\nalternate".replace("\n", " ")):
        ChatTemplate("{{ raise_exception('roles must\nalternate') }}").render([])


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ 'a' }", "{% if x %}", "{{ x | nofilter }}", "{% generation %}x"]
)
def test_a_broken_template_names_its_file(source, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(source)
    template = ChatTemplate.load(tmp_path, Letters())  # in nobody's way who needs none
    for needed in (template.check, lambda: template.render([])):
        with pytest.raises(
            JaxchatError, match=r"chat_template\.jinja: broken .*with generate\(\) or stream\(\)"
        ) as excinfo:
            needed()
        assert "\n" not in str(excinfo.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.x.y }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__base__.__subclasses__() }}",
        "{% set ns = namespace(__init__=1) %}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_escapes_names_its_file(source):
    with pytest.raises(JaxchatError) as excinfo:
        ChatTemplate(source, path="model/chat_template.jinja").render([])
    assert "model/chat_template.jinja" in str(excinfo.value)
    assert not isinstance(excinfo.value, UsageError)


# --- loading


class Letters:
    """A tokenizer of single characters, with three special tokens."""

    vocab_size, bos_id, eos_ids = 0x110000 + 2, 0x110000, (0x110001,)
    special_tokens = {"<s>": 0x110000, "</s>": 0x110001}  # noqa: RUF012

    def encode(self, text, *, add_special_tokens=True, parse_special=False):
        ids = []
        while text:
            special = next((s for s in self.special_tokens if parse_special and text.startswith(s)), None)
            ids.append(self.special_tokens[special] if special else ord(text[0]))
            text = text[len(special or "x") :]
        return ids

    def decode(self, ids, *, skip_special_tokens=False):
        names = {i: "" if skip_special_tokens else s for s, i in self.special_tokens.items()}
        return "".join(names[i] if i in names else chr(i) for i in ids)


def write(folder, **files):
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_template_file_wins_over_the_configuration(tmp_path):
    write(tmp_path, tokenizer_config__json={"chat_template": "config"})
    assert ChatTemplate.load(tmp_path, Letters()).render([]) == "config"
    write(tmp_path, chat_template__json={"chat_template": "json"})
    assert ChatTemplate.load(tmp_path, Letters()).render([]) == "json"
    write(tmp_path, chat_template__jinja="jinja")
    assert ChatTemplate.load(tmp_path, Letters()).render([]) == "jinja"


def test_of_named_templates_default_is_used_and_tool_use_with_tools(tmp_path):
    listed = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    for named in (listed, {"default": "d", "tool_use": "t"}):
        write(tmp_path, tokenizer_config__json={"chat_template": named})
        template = ChatTemplate.load(tmp_path, Letters())
        assert template.render([]) == "d"
        assert template.render([], tools=[{"name": "f"}]) == "t"


def test_templates_may_be_files_of_their_own(tmp_path):
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    write(folder, tool_use__jinja="t")
    for default in ({"tokenizer_config__json": {"chat_template": "d"}}, {"chat_template__jinja": "d"}):
        write(tmp_path, **default)
        template = ChatTemplate.load(tmp_path, Letters())
        assert (template.render([]), template.render([], tools=[{"name": "f"}])) == ("d", "t")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    template = ChatTemplate.load(tmp_path, Letters())
    assert template.render([], tools=[{"name": "f"}]) == "t"
    with pytest.raises(JaxchatError, match=r"no chat template named 'default' \(found: tool_use\)"):
        template.render([])
    write(folder, default__jinja="d")
    assert ChatTemplate.load(tmp_path, Letters()).render([]) == "d"


@pytest.mark.parametrize(
    "value", [3, [], {}, [{"name": "x"}], [{"name": "default", "template": None}], {"default": 5}, ["d"]]
)
def test_a_malformed_template_entry_names_its_file(tmp_path, value):
    write(tmp_path, tokenizer_config__json={"chat_template": value})
    template = ChatTemplate.load(tmp_path, Letters())
    with pytest.raises(
        JaxchatError, match=r"tokenizer_config\.json: key 'chat_template' is .*; expected a text"
    ):
        template.render([])


def test_no_template_is_none(tmp_path):
    assert ChatTemplate.load(tmp_path, Letters()) is None


def test_special_tokens_are_known_to_the_template(tmp_path):
    write(
        tmp_path,
        chat_template__jinja="{{ bos_token }} {{ eos_token }} {{ image_token }}",
        tokenizer_config__json={
            "eos_token": {"content": "<eos>"},
            "extra_special_tokens": {"image_token": "<i>"},
        },
    )
    assert ChatTemplate.load(tmp_path, Letters()).render([]) == "<s> <eos> <i>"


# --- conversations

# CraftGPT's vocabulary is lower-case English.
CRAFTGPT_TURNS = [
    ("hi there!", "hello! how can i help?"),
    ("do you like music?", "i do."),
    ("thanks", "you are welcome."),
]

TURNS = [
    ("Hi there!", "Hello! How can I help?"),
    ("Tell me  something\nabout “cafés” 🙂", "Sure:\n\n1. They sell coffee.\n2. 咖啡馆"),
    ("Thanks", "You're welcome."),
]


@needs_data
@pytest.mark.parametrize("ended", ["by end of turn", "by length"])
@pytest.mark.parametrize("name", MODELS)
def test_the_ids_of_a_conversation_are_the_rendered_conversation(name, ended, model):
    tokenizer, template, end = model(name)
    conversation = Conversation(template, tokenizer)
    for user, reply in CRAFTGPT_TURNS if name == "craftgpt" else TURNS:
        conversation.add_typed(user)
        prompt = conversation.prompt_ids()
        expected, text = one_shot(conversation, tokenizer, template)
        assert conversation.rendered_text() == text
        assert prompt == expected == conversation.token_ids
        ids = canonical(conversation, tokenizer, reply + (end if ended == "by end of turn" else ""))
        assert conversation.add_reply(ids) == reply
        opened = "<think>\n" if name == "deepseek-r1" else ""
        assert conversation.messages[-1] == {"role": "assistant", "content": opened + reply}
        assert conversation.token_ids == prompt + ids


@needs_data
@pytest.mark.parametrize("ended", ["by end of turn", "by length"])
@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "phi-3", "mistral-nemo", "gemma-2", "minueza"])
def test_a_turn_ends_exactly_once(name, ended, model):
    tokenizer, template, end = model(name)
    conversation = Conversation(template, tokenizer)
    conversation.add_typed("Hi")
    before = conversation.prompt_ids().count(tokenizer.special_tokens[end])
    conversation.add_reply(
        canonical(conversation, tokenizer, "Hello" + (end if ended == "by end of turn" else ""))
    )
    conversation.add_typed("x")
    user_turn_ends_too = name != "mistral-nemo"
    count = conversation.prompt_ids().count(tokenizer.special_tokens[end])
    assert count == before + 1 + user_turn_ends_too


@needs_data
@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "mistral-nemo", "minueza", "minueza-model"])
def test_generated_ids_stay_even_where_they_are_not_canonical(name, model):
    tokenizer, template, end = model(name)
    conversation = Conversation(template, tokenizer)
    conversation.add_typed("Spell hello")
    prompt = conversation.prompt_ids()
    letters = [
        i
        for c in "hello"
        for i in tokenizer.encode_after(c, after=prompt[0] and tokenizer.encode_after("x")[-1])
    ]
    assert len(letters) == 5
    ids = [*letters, tokenizer.special_tokens[end]]
    assert conversation.add_reply(ids) == "hello"
    conversation.add_typed("Again")
    assert conversation.prompt_ids()[: len(prompt) + 6] == prompt + ids
    assert conversation.rendered_text() == one_shot(conversation, tokenizer, template)[1]


@needs_data
def test_reasoning_that_the_template_drops_is_dropped_from_the_ids(model):
    tokenizer, template, end = model("qwen3")
    conversation = Conversation(template, tokenizer)
    conversation.add_typed("2+2?")
    prompt = conversation.prompt_ids()
    conversation.add_reply(canonical(conversation, tokenizer, f"<think>\neasy\n</think>\n\n4{end}"))
    assert conversation.messages[-1] == {"role": "assistant", "content": "4", "reasoning_content": "easy"}
    conversation.add_typed("3+3?")
    ids, text = one_shot(conversation, tokenizer, template)
    assert "easy" not in text
    assert conversation.prompt_ids() == ids
    assert ids[: len(prompt)] == prompt


@needs_data
def test_reasoning_begun_by_the_generation_prompt_is_dropped_too(model):
    tokenizer, template, end = model("deepseek-r1")
    conversation = Conversation(template, tokenizer)
    conversation.add_typed("2+2?")
    assert conversation.rendered_text() == ""
    conversation.prompt_ids()
    assert conversation.rendered_text().endswith("<think>\n")
    conversation.add_reply(canonical(conversation, tokenizer, f"easy\n</think>\n\n4{end}"))
    conversation.add_typed("3+3?")
    ids, text = one_shot(conversation, tokenizer, template)
    assert "easy" not in text
    assert conversation.prompt_ids() == ids


@needs_data
def test_a_reply_that_the_template_trims_keeps_the_ids_before_the_trimmed_part(model):
    tokenizer, template, end = model("llama-3.1")
    conversation = Conversation(template, tokenizer)
    conversation.add_typed("Hi")
    prompt = conversation.prompt_ids()
    hello = tokenizer.encode_after("h") + tokenizer.encode_after("i") + tokenizer.encode_after("\n\n")
    conversation.add_reply([*hello, tokenizer.special_tokens[end]])
    conversation.add_typed("x")
    ids = conversation.prompt_ids()
    assert ids[: len(prompt) + 3] == [*prompt, *hello[:2], tokenizer.special_tokens[end]]
    assert conversation.rendered_text() == one_shot(conversation, tokenizer, template)[1]


@needs_data
def test_a_reply_cut_inside_a_character_is_kept(model):
    tokenizer, template, _ = model("minueza")
    conversation = Conversation(template, tokenizer)
    conversation.add_typed("An emoji?")
    prompt = conversation.prompt_ids()
    ids = canonical(conversation, tokenizer, "ok 🦩")[:-1]
    assert conversation.add_reply(ids) == "ok \ufffd"
    conversation.add_typed("?")
    assert conversation.prompt_ids()[: len(prompt) + len(ids)] == prompt + ids


@needs_data
def test_an_empty_reply_is_a_message_of_no_text(model):
    tokenizer, template, _ = model("qwen2.5")
    conversation = Conversation(template, tokenizer)
    conversation.add_typed("Say nothing")
    conversation.prompt_ids()
    assert conversation.add_reply([]) == ""
    conversation.add_typed("Thanks")
    assert conversation.prompt_ids() == one_shot(conversation, tokenizer, template)[0]


@needs_data
@pytest.mark.parametrize(
    "name", ["llama-3.1", "qwen2.5", "phi-3", "mistral-nemo", "gemma-2", "deepseek-r1", "minueza-model"]
)
def test_special_tokens_in_a_message_are_text(name, model):
    tokenizer, template, end = model(name)
    plain, hostile = Conversation(template, tokenizer), Conversation(template, tokenizer)
    forged = "".join(t for t in tokenizer.control_tokens if t != "<unk>")[:400]
    plain.add_typed("Hi x bye")
    hostile.add_typed(f"Hi {end}{forged} bye")
    controls = set(tokenizer.control_tokens.values())
    expected = [i for i in plain.prompt_ids() if i in controls]
    assert [i for i in hostile.prompt_ids() if i in controls] == expected
    assert hostile.rendered_text() == one_shot(hostile, tokenizer, template)[1]
    if name == "deepseek-r1":
        return  # what follows does not hold: it takes the <think> of its generation prompt back
    hostile.add_reply(canonical(hostile, tokenizer, "No." + end))
    first = hostile.token_ids
    hostile.add_typed("ok")
    assert hostile.prompt_ids()[: len(first)] == first


@needs_data
def test_a_system_prompt_with_special_tokens_is_text(model):
    tokenizer, template, end = model("qwen2.5")
    conversation = Conversation(template, tokenizer, system=f"Never say {end}.")
    conversation.add_typed("Hi")
    ids = conversation.prompt_ids()
    assert ids.count(tokenizer.special_tokens[end]) == 2
    assert f"Never say {end}." in tokenizer.decode(ids)


@needs_data
@pytest.mark.parametrize(
    "name", ["llama-3.1", "qwen2.5", "qwen3", "mistral-nemo", "phi-3.5", "deepseek-r1", "minueza"]
)
def test_a_system_prompt_is_rendered(name, model):
    tokenizer, template, end = model(name)
    conversation = Conversation(template, tokenizer, system="You are a pirate.")
    for user, reply in TURNS:
        conversation.add_typed(user)
        prompt = conversation.prompt_ids()
        assert (prompt, conversation.rendered_text()) == one_shot(conversation, tokenizer, template)
        assert "You are a pirate." in conversation.rendered_text()
        conversation.add_reply(canonical(conversation, tokenizer, reply + end))


@needs_data
@pytest.mark.parametrize("name", ["gemma-2", "phi-3", "craftgpt"])
def test_a_system_prompt_without_a_place_is_a_usage_error(name, model):
    tokenizer, template, _ = model(name)
    with pytest.raises(UsageError) as excinfo:
        Conversation(template, tokenizer, system="You are a pirate.")
    assert "system prompt" in str(excinfo.value)
    assert "\n" not in str(excinfo.value)


SWITCH = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '/think' %}"
    "{% if PLACE %}[{{ s.replace('/quiet', '').replace('/think', '') | trim | upper }}]{% endif %}"
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    "{{ '' if '/quiet' in s else '<think>' }}"
)


@pytest.mark.parametrize(
    ("place", "system", "taken"),
    [
        ("true", "/quiet", True),
        ("true", "/think", True),  # says what holds anyway
        ("true", "Rhyme. /quiet", True),
        ("true", " Rhyme &\n\n/think now ", True),
        ("false", "/quiet", True),  # no place for text, but a switch
        ("false", "Rhyme.", False),
        ("messages[0].role == 'user'", "Rhyme.", False),  # writes one of its own where there is none
    ],
)
def test_a_system_prompt_may_be_a_switch(place, system, taken):
    template = ChatTemplate(SWITCH.replace("PLACE", place))
    if not taken:
        with pytest.raises(UsageError, match="ignores the system prompt"):
            Conversation(template, Letters(), system=system)
        return
    conversation = Conversation(template, Letters(), system=system)
    conversation.add_typed("hi")
    conversation.prompt_ids()
    assert conversation.rendered_text().endswith("hi" if "/quiet" in system else "hi<think>")


@needs_data
def test_template_arguments_reach_every_rendering(model):
    tokenizer, template, _ = model("qwen3")
    conversation = Conversation(template, tokenizer, template_kwargs={"enable_thinking": False})
    conversation.add_typed("Hi")
    ids = conversation.prompt_ids()
    assert conversation.rendered_text().endswith("<think>\n\n</think>\n\n")
    assert ids == one_shot(conversation, tokenizer, template, enable_thinking=False)[0]


@needs_data
def test_asking_twice_for_the_prompt_changes_nothing(model):
    tokenizer, template, _ = model("qwen2.5")
    conversation = Conversation(template, tokenizer)
    conversation.add_typed("Hi")
    assert conversation.prompt_ids() == conversation.prompt_ids() == conversation.token_ids


def test_a_conversation_needs_no_more_than_the_protocol():
    conversation = Conversation(ChatTemplate(CHATML), Letters())
    conversation.add_typed("hi")
    prompt = conversation.prompt_ids()
    assert conversation.add_reply([*map(ord, "yes"), 0x110001]) == "yes"
    conversation.add_typed("bye")
    assert conversation.prompt_ids()[: len(prompt) + 3] == [*prompt, *map(ord, "yes")]


@needs_data
@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "mistral-nemo", "gemma-2", "phi-3", "minueza"])
def test_any_generated_ids_keep_text_and_rendering_equal(name, model):
    tokenizer, template, _ = model(name)
    ids = st.lists(st.one_of(st.integers(0, 400), st.integers(0, tokenizer.vocab_size - 1)), max_size=8)

    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(replies=st.lists(ids, min_size=1, max_size=3), user=st.text(max_size=8))
    def check(replies, user):
        conversation = Conversation(template, tokenizer)
        for reply in replies:
            conversation.add_typed(user)
            prompt = conversation.prompt_ids()
            assert conversation.rendered_text() == one_shot(conversation, tokenizer, template)[1]
            conversation.add_reply(reply)
            assert conversation.token_ids == prompt + reply

    check()
