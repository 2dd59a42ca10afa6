"""Answers are what the library gives for the same, in OpenAI's form or a plain one, and in any company."""

import base64
import dataclasses
import json
import random

import numpy as np
import pytest

import jaxchat
from jaxchat.engine import steps
from jaxchat.jobs.answering import Answerer, Manner
from jaxchat.jobs.input_file import Line
from jaxchat.options import GenerateOptions
from tests.jobs.support import chat, openai

MANNER = Manner(options=GenerateOptions(max_new_tokens=8), lines=100, model="tiny", created=1_700_000_000)


def answers(model, lines, **changes):
    """By the number of the line."""
    data = [Line(number, json.dumps(line).encode()) for number, line in enumerate(lines, 1)]
    found = Answerer(model, dataclasses.replace(MANNER, **changes)).answers(data)
    return [json.loads(one.data) for one in sorted(found)]


def body(answer):
    assert answer["response"]["status_code"] == 200, answer
    return answer["response"]["body"]


# --- the same as the library


def test_a_chat_is_what_chat_says(job_model):
    for line, options in (
        (chat("a", "hello", max_tokens=9), {}),
        (chat("b", "hello", temperature=1.5, seed=7), {"temperature": 1.5, "seed": 7}),
    ):
        (answer,) = answers(job_model, [line])
        expected = job_model.chat("hello", max_new_tokens=line["body"].get("max_tokens", 8), **options)
        (choice,) = body(answer)["choices"]
        assert choice["message"]["content"] == expected.content
        assert body(answer)["usage"]["prompt_tokens"] == expected.prompt_tokens
        assert body(answer)["usage"]["completion_tokens"] == len(expected.token_ids)


def test_a_plain_chat_has_the_jobs_system_prompt_if_it_has_none(job_model):
    user = {"role": "user", "content": "hello"}
    own = [{"role": "system", "content": "Be kind."}, user]
    lines = [{"messages": [user]}, {"messages": own}]
    texts = [answer["text"] for answer in answers(job_model, lines, system="Be brief.")]
    expected = [
        job_model.chat(m, max_new_tokens=8).text for m in ([{**own[0], "content": "Be brief."}, user], own)
    ]
    assert texts == expected
    assert texts[0] != texts[1]


def test_a_completion_is_what_generate_says(job_model):
    ids = job_model.encode("hello")
    lines = [{"prompt": "hello"}, {"token_ids": ids}, openai("a", "completions", prompt=["hello", ids])]
    expected = job_model.generate("hello", max_new_tokens=8)[0]
    plain, by_ids, several = answers(job_model, lines)
    assert plain == by_ids | {"line": 1}
    assert plain == {
        "line": 1,
        "text": expected.text,
        "finish_reason": "length",
        "prompt_tokens": len(ids),
        "completion_tokens": 8,
        "error": None,
    }
    assert [choice["text"] for choice in body(several)["choices"]] == [expected.text] * 2


def test_a_line_runs_under_its_own_plan_and_adapters(job_model, job_adapter):
    plans = [None, "2,0,1", [0, [1, 0.5, 1.0], 0]]
    lines = [{"prompt": "hello", "layer_plan": plan} for plan in plans]
    lines += [{"prompt": "hello", "adapter": adapter} for adapter in ("poet", ["poet=0.5"], [])]
    expected = [job_model.generate("hello", plans=[plan], max_new_tokens=8)[0].text for plan in plans]
    expected += [
        job_model.with_adapters(uses).generate("hello", max_new_tokens=8)[0].text
        for uses in ("poet", "poet=0.5", None)
    ]
    assert [answer["text"] for answer in answers(job_model, lines)] == expected
    assert len(set(expected)) >= 4


def test_a_vector_is_what_embed_gives(job_model):
    lines = [
        openai("a", "embeddings", input=["hello", "the sun"]),
        openai("b", "embeddings", input="hello", encoding_format="base64", layer_plan="0"),
    ]
    first, second = (body(answer) for answer in answers(job_model, lines))
    expected = job_model.embed(["hello", "the sun"])
    np.testing.assert_allclose([one["embedding"] for one in first["data"]], expected, atol=1e-6)
    vector = np.frombuffer(base64.b64decode(second["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, job_model.with_plan("0").embed("hello")[0], atol=1e-6)
    assert first["usage"] == {"prompt_tokens": 12, "total_tokens": 12}


# --- seeds


def test_lines_without_a_seed_draw_with_the_jobs_and_their_number(job_model):
    job = GenerateOptions(max_new_tokens=8, temperature=1.5, seed=40)
    texts = [one["text"] for one in answers(job_model, [{"prompt": "hello"}] * 3, options=job)]
    expected = [
        job_model.generate("hello", max_new_tokens=8, temperature=1.5, seed=40 + line)[0].text
        for line in (1, 2, 3)
    ]
    assert texts == expected
    assert len(set(texts)) == 3


def test_choices_draw_with_seeds_of_their_own(job_model):
    line = {"prompt": "hello", "temperature": 1.5, "n": 3}
    lines = [openai("a", "completions", **line), openai("b", "completions", **line, seed=5)]
    found = [[choice["text"] for choice in body(answer)["choices"]] for answer in answers(job_model, lines)]
    options = {"max_new_tokens": 8, "temperature": 1.5}
    seeds = ((1, 101, 201), (5, 6, 7))  # of a file of 100 lines, no other line has those of the first
    assert found == [
        [job_model.generate("hello", seed=seed, **options)[0].text for seed in own] for own in seeds
    ]


# --- OpenAI's form: what the API reference has of the objects


CHAT_COMPLETION = {"id": str, "object": str, "created": int, "model": str, "choices": list, "usage": dict}
CHOICE = {"index": int, "message": dict, "logprobs": (dict, type(None)), "finish_reason": str}
USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}


def check(value, fields):
    assert value.keys() == fields.keys()
    for name, kind in fields.items():
        assert isinstance(value[name], kind), name


def test_answers_have_the_fields_that_openai_publishes(job_model):
    lines = [
        chat("a", "hello", logprobs=True, model="gpt-x"),
        openai("b", "completions", prompt="hello", logprobs=0),
        openai("c", "embeddings", input="hello"),
        chat("d", "hello", foo=1),
    ]
    found = answers(job_model, lines)
    for answer, line in zip(found, lines, strict=True):
        check(answer, {"id": str, "custom_id": str, "response": dict, "error": type(None)})
        check(answer["response"], {"status_code": int, "request_id": str, "body": dict})
        assert answer["custom_id"] == line["custom_id"]
    talk, text, vectors = (body(answer) for answer in found[:3])
    for value, what in ((talk, "chat.completion"), (text, "text_completion")):
        check(value, CHAT_COMPLETION)
        check(value["usage"], USAGE)
        assert value["object"] == what
        assert value["created"] == 1_700_000_000
        assert value["usage"]["total_tokens"] == value["usage"]["prompt_tokens"] + 8
    assert (talk["model"], text["model"], vectors["model"]) == ("gpt-x", "tiny", "tiny")
    check(talk["choices"][0], CHOICE)
    check(text["choices"][0], {"text": str, **{k: v for k, v in CHOICE.items() if k != "message"}})
    check(talk["choices"][0]["message"], {"role": str, "content": str, "refusal": type(None)})
    (first, *_) = talk["choices"][0]["logprobs"]["content"]
    check(first, {"token": str, "logprob": float, "bytes": list, "top_logprobs": list})
    assert text["choices"][0]["logprobs"].keys() == {
        "tokens",
        "token_logprobs",
        "top_logprobs",
        "text_offset",
    }
    check(vectors, {"object": str, "data": list, "model": str, "usage": dict})
    check(vectors["data"][0], {"object": str, "index": int, "embedding": list})
    assert found[3]["response"]["status_code"] == 400
    check(
        found[3]["response"]["body"]["error"],
        {"message": str, "type": str, "param": str, "code": type(None)},
    )


def test_log_probabilities_are_of_the_chosen_tokens(job_model):
    (answer,) = answers(job_model, [openai("a", "completions", prompt="hello", logprobs=0)])
    (choice,) = body(answer)["choices"]
    expected = job_model.generate("hello", max_new_tokens=8)[0]
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], expected.logprobs, atol=1e-4)
    tokens, starts = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert starts == [sum(map(len, tokens[:place])) for place in range(len(tokens))]


def test_the_token_that_ends_a_text_has_no_log_probability(job_model):
    drawn = job_model.chat("hello", max_new_tokens=8).token_ids
    ending = GenerateOptions(max_new_tokens=8, stop_token_ids=drawn[2:3])
    (answer,) = answers(job_model, [chat("a", "hello", logprobs=True)], options=ending)
    (choice,) = body(answer)["choices"]
    count = drawn.index(drawn[2])
    assert choice["finish_reason"] == "stop"
    assert body(answer)["usage"]["completion_tokens"] == count + 1
    assert len(choice["logprobs"]["content"]) == count


# --- lines that cannot be answered


def test_others_are_answered_beside_those_that_cannot_be(job_model):
    lines = [
        {"prompt": "hello"},
        {"id": "long", "prompt": "x" * 2000},
        {"prompt": "hello", "layer_plan": "0:99:0"},
        {"prompt": "hello", "layer_plan": "9"},
        {"prompt": "hello", "adapter": "nobody"},
        {"token_ids": [10**6]},
        {"prompt": ""},
        {"messages": [{"role": "user"}]},
        {"prompt": "hello", "layer_plan": [[0, 1e38, 1e38]] * 3},  # no logits are left
        {"prompt": "hello"},
    ]
    found = answers(job_model, lines)
    assert found[0]["text"] == found[-1]["text"] == job_model.generate("hello", max_new_tokens=8)[0].text
    errors = [one["error"] for one in found[1:-1]]
    assert all(one["text"] is None for one in found[1:-1])
    assert errors[0]["code"] == "context_length_exceeded"
    assert found[1]["id"] == "long"
    said = [
        "2000 tokens",
        "step",
        "layer 9",
        "'nobody' is not loaded",
        "token id 1000000",
        "empty",
        "no 'content'",
    ]
    for error, words in zip(errors, said, strict=False):
        assert words in error["message"]
        assert error["type"] == "invalid_request_error"
    assert errors[-1]["type"] == "server_error"
    assert "logits" in errors[-1]["message"]


def test_a_line_that_is_too_long_to_read_is_told_so(job_model):
    (found,) = Answerer(job_model, MANNER).answers([Line(3, None)])
    assert json.loads(found.data)["error"]["message"].startswith("the line is longer than 16 MiB")


# --- company


def many(rng, count=40):
    """Lines of all kinds, with prompts that share beginnings and are shorter and longer than every block."""
    lines = []
    for number in range(count):
        text = "Once upon a time " * rng.choice((1, 1, 4, 40)) + "x" * rng.choice((0, 1, 14, 50, 300))
        few = {"temperature": rng.choice((0, 1.0)), "max_tokens": rng.randint(1, 6)}
        lines.append(
            rng.choice(
                (
                    openai(f"{number}", "completions", prompt=text, logprobs=0, **few),
                    chat(f"{number}", text, logprobs=True, n=rng.choice((1, 2)), **few),
                    openai(
                        f"{number}", "completions", prompt=text, layer_plan=rng.choice(("1,0", "0:")), **few
                    ),
                    openai(f"{number}", "completions", prompt=text, adapter="poet", logprobs=0, **few),
                    openai(f"{number}", "embeddings", input=text),
                    {"prompt": text, "max_new_tokens": 4, "overflow": "truncate_oldest"},
                )
            )
        )
    return lines


@pytest.mark.parametrize("quant", [None, pytest.param("int8", marks=pytest.mark.full)])
def test_not_a_byte_depends_on_the_others_or_on_how_many_run_together(
    job_model, job_directory, job_adapter, quant
):
    model = job_model
    if quant:
        model = jaxchat.load(job_directory, adapter=job_adapter, quant=quant).with_adapters(None)
    rng = random.Random(0)
    lines = [Line(n, json.dumps(line).encode()) for n, line in enumerate(many(rng), 1)]

    def run(chosen, together):
        manner = dataclasses.replace(MANNER, together=together)
        return {one.number: one for one in Answerer(model, manner).answers(chosen)}

    expected = run(lines, 8)
    assert not any(one.failed for one in expected.values())
    for together in (1, 3, 32):
        assert run(lines, together) == expected
    some = rng.sample(lines, 13)
    assert run(some, 8) == {line.number: expected[line.number] for line in some}


def test_what_prompts_begin_with_alike_is_computed_once_a_sequence(job_model, monkeypatch):
    computed = []
    prefill = steps.prefill
    monkeypatch.setattr(
        steps, "prefill", lambda step, cache: computed.append(step.new.sum()) or prefill(step, cache)
    )
    beginning = "x" * 512
    for lines in (8, 32):
        computed.clear()
        answers(job_model, [{"prompt": f"{beginning} {number:02}"} for number in range(lines)])
        rest = 8 * 513 + lines * 3
        assert sum(computed) < rest + lines * 16
