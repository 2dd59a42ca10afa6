"""What a line asks for, and what is said of one that asks for nothing that there is."""

import json

import pytest

from jaxchat.jobs.requests import LineError, read_line
from jaxchat.options import DEFAULTS, GenerateOptions
from tests.jobs.support import chat, openai

MESSAGES = [{"role": "user", "content": "hello"}]


def asked(line):
    _, ask = read_line(json.dumps(line).encode())
    assert not isinstance(ask, LineError), ask
    return ask


def refused(line):
    _, error = read_line(line if isinstance(line, bytes) else json.dumps(line).encode())
    assert isinstance(error, LineError)
    return str(error), error.param


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"stop": "END"}, {"stop": "END"}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1, "frequency_penalty": -1}),
        (
            {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1},
            {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1},
        ),
        ({"ignore_eos": True, "seed": 3}, {"ignore_eos": True, "seed": 3}),
        ({"temperature": None, "logit_bias": {}, "stream": False, "user": "me"}, {}),
    ],
    ids=str,
)
def test_fields_of_openai_are_the_options_they_mean(body, options):
    for line in (chat("a", "hello", **body), openai("a", "completions", prompt="hello", **body)):
        if "max_completion_tokens" in body and "prompt" in line["body"]:
            continue
        assert asked(line).options(DEFAULTS, seed=9) == GenerateOptions(**{"seed": 9, **options})


def test_a_plain_line_takes_every_option_by_its_name():
    options = GenerateOptions(
        max_new_tokens=3, temperature=0.5, stop_token_ids=[4], overflow="truncate_oldest", seed=2
    )
    given = {"max_new_tokens": 3, "temperature": 0.5, "stop_token_ids": [4], "overflow": "truncate_oldest"}
    ask = asked({"prompt": "hello", "seed": 2, **given})
    assert ask.options(DEFAULTS, seed=9) == options
    assert (ask.kind, ask.url, ask.key, list(ask.inputs)) == ("completion", "", None, ["hello"])


def test_what_a_line_does_not_say_is_as_the_job_has_it():
    job = GenerateOptions(temperature=0.7, max_new_tokens=4)
    found = asked({"prompt": "x", "temperature": 0}).options(job, seed=2**32 + 1)
    assert found == GenerateOptions(temperature=0, max_new_tokens=4, seed=1)


@pytest.mark.parametrize(
    ("given", "inputs", "listed"),
    [
        ("hello", ["hello"], False),
        (["a", "b"], ["a", "b"], True),
        ([5, 6], [[5, 6]], False),
        ([[5, 6], [7]], [[5, 6], [7]], True),
    ],
)
def test_inputs_are_texts_or_token_ids_one_or_several(given, inputs, listed):
    ask = asked(openai("a", "embeddings", input=given))
    assert (list(ask.inputs), ask.listed, ask.kind) == (inputs, listed, "embedding")


def test_no_adapter_is_another_thing_than_none_being_said():
    assert asked({"prompt": "x", "adapter": []}).adapter_given
    assert not asked({"prompt": "x", "adapter": None}).adapter_given


@pytest.mark.parametrize(
    ("line", "said", "param"),
    [
        (b"nonsense", "not a line of JSON", None),
        (b"\xff\xfe{}", "not a line of JSON", None),
        (b'{"prompt": "\x00"}', "not a line of JSON", None),
        (b'{"prompt": "\\ud800"}', "not a line of JSON", None),
        (b'{"prompt": "a", "temperature": NaN}', "not a line of JSON", None),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice", None),
        (b'{"prompt": "a", "x": ' + b"[" * 70 + b"]" * 70 + b"}", "nested more than 64 deep", None),
        (b'{"a":' * 100_000, "not a line of JSON", None),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not a line of JSON", None),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is inf; expected a number", "temperature"),
        ([1], "the line is [1]; expected an object", None),
        ({"id": 1}, "expected one of prompt, messages, token_ids in the line, found none", None),
        ({"prompt": "a", "messages": MESSAGES}, "found prompt and messages", None),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature'; did you mean temperature?",
         "temprature"),
        ({"prompt": "a", "id": 1.5}, "id is 1.5; expected a text or a whole number", "id"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0; expected a whole", "max_new_tokens"),
        ({"prompt": "a", "layer_plan": "@/etc/passwd"}, "no line opens a file", "layer_plan"),
        ({"token_ids": [1, "x"]}, "token_ids[1] is 'x'; expected a token id", "token_ids"),
        ({"custom_id": "a", "body": {}}, "'method' is missing", "method"),
        ({**chat("a", "x"), "method": "GET"}, "method is 'GET'; expected POST", "method"),
        ({**chat("a", "x"), "url": "/v1/x"}, "url is '/v1/x'; expected /v1/chat/completions or", "url"),
        ({**chat("a", "x"), "extra": 1}, "unknown field 'extra'", "extra"),
        (chat(5, "x"), "custom_id is 5; expected a text", None),
        (chat("a", "x", max_tokenz=1), "unknown field 'max_tokenz' in the body; did you mean max_tokens?",
         "max_tokenz"),
        (chat("a", "x", max_tokens=-1), "max_tokens is -1; expected a whole number, 1 or more", "max_tokens"),
        (chat("a", "x", max_tokens=1, max_completion_tokens=1), "both given", "max_tokens"),
        (chat("a", "x", top_logprobs=2), "top_logprobs is 2; jaxchat knows only 0", "top_logprobs"),
        (chat("a", "x", n=0), "n is 0; expected a whole number, 1 to 128", "n"),
        (chat("a", "x", stream=True), "stream is True; jaxchat knows only False", "stream"),
        (chat("a", "x", response_format={"type": "json_object"}), "response_format is", "response_format"),
        (openai("a", "completions", max_tokens=1), "'prompt' is missing in the body", "prompt"),
        (openai("a", "completions", prompt="x", echo=True), "echo is True", "echo"),
        (openai("a", "completions", prompt="x", logprobs=3), "logprobs is 3; expected 0", "logprobs"),
        (openai("a", "embeddings", input="x", dimensions=8), "unknown field 'dimensions'", "dimensions"),
        (openai("a", "embeddings", input=["x"] * 2049), "input has 2,049 entries", "input"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_line_that_cannot_be_answered_says_why_and_which_field_it_is(line, said, param):
    found, field = refused(line)
    assert said in found
    assert len(found) < 500
    if param is not None:
        assert field == param


@pytest.mark.parametrize("line", [{"id": "a", "promt": "x"}, chat("a", "x", foo=1)], ids=["plain", "openai"])
def test_a_refused_line_keeps_its_name(line):
    identity, _ = read_line(json.dumps(line).encode())
    assert identity.key == "a"
