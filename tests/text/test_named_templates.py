"""Prompt formats by name: the texts that were published with the models, and what picks one."""

from pathlib import Path

import pytest

import jaxchat
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.named_templates import NAMED, chosen_template, suggested
from tests.support.tiny_chat import write_parrot, write_tiny_chat

LONG = {"max_position_embeddings": 512}
HELLO = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "How are you?"},
]
KIND = [{"role": "system", "content": "Be kind."}, *HELLO]
_TASK = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_CHAT = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the {0}'s questions."
)

# Name, messages, the text. Where nothing else is said it is FastChat's (conversation.py of 0.2.36).
PUBLISHED = [
    (
        "vicuna_v1.1",
        HELLO,
        f"{_CHAT.format('user')} USER: Hello! ASSISTANT: Hi there.</s>USER: How are you? ASSISTANT:",
    ),
    (
        "vicuna_v0",
        HELLO,
        f"{_CHAT.format('human')}\n### Human: Hello!\n### Assistant: Hi there.\n### Human: How are you?\n"
        "### Assistant:",
    ),
    (
        "alpaca",  # tatsu-lab/stanford_alpaca, train.py
        HELLO,
        f"{_TASK}\n\n### Instruction:\nHello!\n\n### Response:Hi there.</s>\n\n"
        "### Instruction:\nHow are you?\n\n### Response:",
    ),
    (
        "koala",
        HELLO,
        "BEGINNING OF CONVERSATION: USER: Hello! GPT: Hi there.</s>USER: How are you? GPT:",
    ),
    (
        "dolly",  # databrickslabs/dolly, consts.py
        HELLO,
        f"{_TASK}\n\n### Instruction:\nHello!\n\n### Response:\nHi there.\n\n### End\n\n### Instruction:\n"
        "How are you?\n\n### Response:\n",
    ),
    (
        "openassistant",
        HELLO,
        "<|prompter|>Hello!</s><|assistant|>Hi there.</s><|prompter|>How are you?</s><|assistant|>",
    ),
    (
        "mistrallite",  # the model's card
        HELLO[:1],
        "<|prompter|>Hello!</s><|assistant|>",
    ),
    (
        "stablevicuna",  # the model's card
        HELLO,
        "### Human: Hello!\n### Assistant: Hi there.\n\n### Human: How are you?\n### Assistant:",
    ),
    (
        "openhermes",
        KIND,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
        "Hi there.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "chatml",
        HELLO[:1],
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "zephyr",
        KIND,
        "<|system|>\nBe kind.</s>\n<|user|>\nHello!</s>\n<|assistant|>\nHi there.</s>\n"
        "<|user|>\nHow are you?</s>\n<|assistant|>\n",
    ),
    (
        "rwkv",  # with the roles of the World models (BlinkDL/RWKV-LM)
        [{"role": "user", "content": "Hello!\r\n\r\nYou."}, *HELLO[1:]],
        "User: Hello!\nYou.\n\nAssistant: Hi there.\n\nUser: How are you?\n\nAssistant:",
    ),
    ("rwkv-world", KIND[:2], "System: Be kind.\n\nUser: Hello!\n\nAssistant:"),
    (
        "llama2",
        KIND,
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello! [/INST] Hi there. </s>"
        "<s>[INST] How are you? [/INST]",
    ),
    ("mistral", HELLO, "<s>[INST] Hello! [/INST] Hi there.</s>[INST] How are you? [/INST]"),
    (
        "openchat",
        HELLO,
        "GPT4 Correct User: Hello!<|end_of_turn|>GPT4 Correct Assistant: Hi there.<|end_of_turn|>"
        "GPT4 Correct User: How are you?<|end_of_turn|>GPT4 Correct Assistant:",
    ),
    (
        "tulu",  # the template of allenai/tulu-2-7b
        HELLO,
        "<|user|>\nHello!\n<|assistant|>\nHi there.</s>\n<|user|>\nHow are you?\n<|assistant|>\n",
    ),
    (
        "llama3",  # the model's own template
        KIND,
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (
        "gemma",  # the model's own template, the system prompt as in that of Gemma 3
        KIND,
        "<s><start_of_turn>user\nBe kind.\n\nHello!<end_of_turn>\n<start_of_turn>model\n"
        "Hi there.<end_of_turn>\n<start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
        "phi3",  # the model's own template
        KIND,
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHello!<|end|>\n<|assistant|>\nHi there.<|end|>\n"
        "<|user|>\nHow are you?<|end|>\n<|assistant|>\n",
    ),
]
_WRITES_BOS = ("llama2", "mistral", "llama3", "gemma")


@pytest.mark.parametrize(("name", "messages", "text"), PUBLISHED)
def test_a_named_template_writes_what_was_published(name, messages, text):
    bos = "<s>" if name in _WRITES_BOS else ""
    template = ChatTemplate(NAMED[name].source, variables={"bos_token": bos, "eos_token": "</s>"})
    assert template.render(messages, add_generation_prompt=True) == text


def test_every_name_has_a_published_text():
    assert {name for name, _, _ in PUBLISHED} == set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_another_role_is_refused_and_a_system_prompt_is_written(name):
    template = ChatTemplate(NAMED[name].source)
    assert "Be kind." in template.render(KIND)
    with pytest.raises(UsageError, match="this template knows system, user and assistant, not tool"):
        template.render([*HELLO, {"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("lmsys/vicuna-13b-v1.5", "vicuna_v1.1"),
        ("vicuna-7b-delta-v0", "vicuna_v0"),
        ("TheBloke/stable-vicuna-13B-HF", "stablevicuna"),
        ("chavinlo/alpaca-native", "alpaca"),
        ("young-geng/koala", "koala"),
        ("databricks/dolly-v2-3b", "dolly"),
        ("OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5", "openassistant"),
        ("teknium/OpenHermes-2.5-Mistral-7B", "openhermes"),
        ("HuggingFaceH4/zephyr-7b-alpha", "zephyr"),
        ("amazon/MistralLite", "mistrallite"),
        ("rwkv-4-world-7b", "rwkv"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2"),
        ("gpt2", None),
        ("", None),
    ],
)
def test_a_models_name_suggests_a_template(model, name):
    assert suggested(model) == name


# --- with a model


def run(stream):
    for _ in stream:
        pass
    return stream.result


def test_a_chosen_template_replaces_the_models_own(tmp_path):
    chat = jaxchat.load(write_tiny_chat(tmp_path, **LONG), chat_template="koala").chat_session()
    template = chat.conversation.template
    assert (template.source, template.stop_strings) == (NAMED["koala"].source, ("USER:",))
    run(chat.send("Hi", max_new_tokens=4, ignore_eos=True))
    assert chat.conversation.rendered_text().startswith("BEGINNING OF CONVERSATION: USER: Hi GPT:")


def test_the_stop_strings_of_a_template_end_a_reply(tmp_path):
    model = jaxchat.load(write_parrot(tmp_path, "abcdEf</s>"))
    assert run(model.chat_session().send("x")).text == "abcdEf"
    source = model.template.source
    model.template = ChatTemplate(source, variables=model.template.variables, stop_strings=("no", "dE"))
    chat = model.chat_session()
    assert run(chat.send("x")).text == "abc"
    assert chat.messages[-1]["content"] == "abc"
    assert run(chat.send("x", ignore_eos=True, max_new_tokens=9)).text.startswith("abcdEf")


def test_a_file_is_a_template_and_sees_what_the_models_own_does(tmp_path):
    model_path = write_tiny_chat(tmp_path / "m")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ eos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}>")
    template = jaxchat.load(model_path, chat_template=file).template
    assert template is not None
    assert template.render(HELLO[:1]) == "</s>[Hello!]>"


@pytest.mark.parametrize("name", ["no-such", "", ".", "a\0b"])
def test_an_unknown_name_lists_the_names(name, tmp_path):
    model = jaxchat.load(write_tiny_chat(tmp_path))
    with pytest.raises(UsageError, match=r"chat_template.*no such name.*one of stablevicuna, vicuna_v0"):
        chosen_template(name, model.tokenizer, None)


def test_bos_is_written_where_the_tokenizer_puts_one_only(tmp_path):
    tokenizer = jaxchat.load(write_tiny_chat(tmp_path)).tokenizer
    template = chosen_template("chatml", tokenizer, None)
    begins = tokenizer.encode("a")[0] == tokenizer.bos_id
    assert template.render(HELLO).startswith("<s><|im_start|>" if begins else "<|im_start|>")


def test_a_model_without_a_template_is_not_given_one_but_told_of_one(tmp_path: Path, commands):
    model = write_tiny_chat(tmp_path / "koala-7b", template=None)
    with pytest.raises(UsageError, match=r"its name suggests chat_template='koala', or it can continue"):
        jaxchat.load(model).chat_session()
    _, _, err = commands("generate", "-m", model, "-p", "hello", "--max_new_tokens", "2")
    assert err.splitlines() == [
        "jaxchat: this model has no chat template: the prompt is continued as text (--format completion); "
        "its name suggests --chat_template koala"
    ]


def test_the_command_line_chats_in_the_format_asked_for(tmp_path, commands):
    model = write_parrot(tmp_path, "ok</s>", template=None, **LONG)
    _, out, err = commands("generate", "-m", model, "-p", "hi", "--chat_template", "vicuna_v1.1")
    assert (out, err) == ("ok\n", "")
    message = commands.error("generate", "-m", model, "-p", "x", "--chat_template", "vicunja", code=2)
    assert message.startswith("--chat_template vicunja: no such name")
    refused = ("--chat_template", "koala", "--format", "completion")
    assert "needs a chat" in commands.error("generate", "-m", model, "-p", "x", *refused, code=2)


def test_a_broken_file_is_named_before_weights_are_read(tmp_path, commands):
    model = write_tiny_chat(tmp_path / "m")
    (tmp_path / "bad.jinja").write_text("{% if %}")
    (model / "model.safetensors").unlink()
    message = commands.error(
        "generate", "-m", model, "-p", "x", "--chat_template", tmp_path / "bad.jinja", code=1
    )
    assert "bad.jinja: broken chat template (line 1" in message
    with pytest.raises(JaxchatError):
        jaxchat.load(model, chat_template="koala")
