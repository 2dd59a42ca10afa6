"""What the library is called with: wrong values are refused at once, by the name of the parameter."""

import numpy as np
import pytest

import jaxchat
from jaxchat.errors import JaxchatError, UsageError, in_flags, option, told
from jaxchat.layer_plan import LayerPlan, as_plan
from tests.support.tiny_chat import write_tiny_chat


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(directory):
    return jaxchat.load(directory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": 5}, "plan is 5; expected a text such as"),
        ({"plan": {0: 1}}, "plan is"),
        ({"plan": [0, 9]}, "item 1 of the layer plan, 9, is out of range"),
        ({"max_slots": -5}, "max_slots is -5; expected a whole number, 0 to"),
        ({"max_length": 10.5}, "max_length is 10.5; expected a whole number, 1 or more"),
        ({"max_length": True}, "max_length is True"),
        ({"quant": 4}, "quant is 4"),
        ({"dtype": np.float32}, "dtype is"),
        ({"kv_dtype": "int3"}, "kv_dtype is 'int3'; expected one of"),
        ({"kernels": None}, "kernels is None"),
        ({"kernels": "fast"}, "kernels is 'fast'; expected one of"),
        ({"mesh": 2}, "mesh is 2"),
        ({"keep_identity": "no"}, "keep_identity is 'no'; expected True or False"),
        ({"model_paths": "x=y"}, "model_paths is 'x=y'"),
        ({"progress": True}, "progress is True; expected a function"),
    ],
)
def test_load_names_the_parameter(directory, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        jaxchat.load(directory, **settings)
    assert "--" not in str(caught.value)


def test_load_names_a_path_that_is_none():
    with pytest.raises(UsageError, match="path is 5; expected a directory"):
        jaxchat.load(5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(5), "prompts is 5; expected a text, or a list of texts"),
        (lambda m: m.generate(["a", 5]), r"prompts\[1\] is 5; expected a text"),
        (lambda m: m.generate({"a": 1}), "prompts is"),
        (lambda m: m.generate(token_ids=[1, 5]), r"token_ids is \[1, 5\]; expected a list with a list"),
        (lambda m: m.generate(token_ids=[[1, 2.5]]), r"token_ids\[0\]\[1\] is 2.5"),
        (lambda m: m.generate(token_ids=[[1, 10**6]]), "token id 1000000 is not in the vocabulary"),
        (lambda m: m.generate("a", batch_size=0), "batch_size is 0; expected a whole number, 1 or more"),
        (lambda m: m.generate("a", parse_special="yes"), "parse_special is 'yes'"),
        (lambda m: m.generate("a", plans=5), "plans: got 5 for 1 prompts"),
        (lambda m: m.generate("a", plans=[1.5]), r"plans\[0\] is 1.5"),
        (lambda m: m.generate("a", seed=-1), "seed is -1; expected a whole number, 0 to 4294967295"),
        (lambda m: m.generate("a", max_new_tokens=2.5), "max_new_tokens is 2.5"),
        (lambda m: m.generate("a", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda m: m.generate("a", stop=7), "stop is 7"),
        (lambda m: m.generate("a", stop=["x", None]), r"stop\[1\] is None"),
        (lambda m: m.generate("a", stop_token_ids=3), "stop_token_ids is 3"),
        (lambda m: m.generate("a", ignore_eos="false"), "ignore_eos is 'false'"),
        (lambda m: m.generate("a", overflow="shift"), "overflow is 'shift'; expected error or trunc"),
        (lambda m: m.generate("a", options={"seed": 1}), "options is"),
        (lambda m: m.generate("a", max_tokens=5), "unknown option 'max_tokens'; did you mean max_new_tokens"),
        (lambda m: m.generate("a", temprature=1), "unknown option 'temprature'; did you mean temperature"),
        (lambda m: m.stream(["a", "b"]), r"prompt is \['a', 'b'\]; expected one text"),
        (lambda m: m.stream("a", colour=1), "unknown option 'colour'"),
        (lambda m: m.stream(token_ids=[[1]]), r"token_ids\[0\] is \[1\]"),
        (lambda m: list(m.stream("a" * 200)), r"raise max_length or use overflow='truncate_oldest'"),
        (lambda m: m.score("a", batch_size=1.0), "batch_size is 1.0"),
        (lambda m: m.score(b"a"), "texts is b'a'"),
        (lambda m: m.encode(5), "text is 5"),
        (lambda m: m.decode("ab"), "ids is 'ab'"),
        (lambda m: m.decode([1, -1]), r"ids\[1\] is -1"),
        (lambda m: m.decode([10**6]), "token id 1000000 is not in the vocabulary"),
        (lambda m: m.with_plan(None), "plan is None"),
        (lambda m: m.with_plan(LayerPlan.identity(7)), "over 7 layers, the model has 3"),
        (lambda m: m.chat(5), "messages is 5"),
        (lambda m: m.chat([]), "messages is empty"),
        (lambda m: m.chat(["hello"]), r"messages\[0\] is 'hello'; expected a dict with role and content"),
        (lambda m: m.chat([{"content": "x"}]), r"messages\[0\] has no 'role'"),
        (lambda m: m.chat([{"role": "user"}]), r"messages\[0\] has no 'content'"),
        (lambda m: m.chat([{"role": 3, "content": "x"}]), r"messages\[0\]\['role'\] is 3"),
        (lambda m: m.chat([{"role": "user", "content": 3}]), r"messages\[0\]\['content'\] is 3"),
        (
            lambda m: m.chat([{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
            "takes texts only",
        ),
        (lambda m: m.chat_session(system=3), "system is 3"),
        (lambda m: m.chat_session(template_kwargs=[1]), "template_kwargs is"),
        (lambda m: m.chat_session().send(None), "text is None"),
        (lambda m: m.chat_session().send("a", prefix=1), "prefix is 1"),
        (lambda m: m.chat_session().send("a", prefix_in="answer"), "prefix_in is 'answer'"),
        (lambda m: m.chat_session().set_plan(None), "plan is None"),
        (lambda m: m.engine.session([0, 1]), "plan is .*; expected a LayerPlan"),
    ],
)
def test_a_wrong_value_is_refused_by_name(model, call, message):
    with pytest.raises(UsageError, match=message) as caught:
        call(model)
    assert "--" not in str(caught.value)


def test_none_is_no_stop_and_arrays_are_lists(model):
    ids = model.encode("hello")
    plain = model.generate(token_ids=[ids], max_new_tokens=3)[0]
    options = {"stop": None, "stop_token_ids": None, "max_new_tokens": np.int64(3)}
    assert model.generate(token_ids=np.array([ids]), **options)[0].token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        ([0, 1, 0], "0,1,0"),
        ([0, [1, 0.5, 1.0], -1], "[0, [1, 0.5, 1], 2]"),
        ((2, 1, 0), "2,1,0"),
        (range(2), "0:2"),
        (slice(None, None, -1), "::-1"),
        ([range(2), slice(1, None)], "0:2,1:"),
        (np.array([1, 1]), "1,1"),
    ],
)
def test_a_plan_may_be_a_list_a_range_or_a_slice(model, given, spec):
    expected = LayerPlan.parse(spec, 3)
    chat = model.chat_session()
    chat.set_plan(given)
    assert model.with_plan(given).plan == chat.plan == as_plan(given, model.base_plan) == expected
    one, other = (model.generate("hello", plans=[p], max_new_tokens=2)[0] for p in (given, spec))
    assert one.token_ids == other.token_ids


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 2), r"\[0, 2\] for these two layers, or the text '\(0,2\)' for RYS"),
        ([(0, 2), (1, 3)], "item 0 of the layer plan, .* is no layer"),
        ([1.0], "item 0 of the layer plan, 1.0, is no layer"),
        ([True], "is no layer"),
        ([range(0)], "selects no layer"),
        ([slice(0, 2, 0)], "is no slice of layers"),
        ([], "has no slot"),
    ],
)
def test_lists_that_are_no_plan_name_the_item(given, message):
    with pytest.raises(UsageError, match=message):
        as_plan(given, LayerPlan.identity(3))


def test_ids_become_text_again(model):
    ids = model.encode("hello there")
    assert model.decode(ids, skip_special=True) == "hello there"
    assert model.decode(np.array(ids[-2:])) == model.decode(ids[-2:])


def test_everything_says_what_it_is_in_one_line(model):
    chat = model.chat_session()
    stream = chat.send("hello", max_new_tokens=3)
    list(stream)
    things = [
        model,
        model.engine,
        chat,
        chat.session,
        stream,
        stream.result,
        model.score("hello")[0],
        model.plan,
    ]
    for thing in things:
        text = repr(thing)
        assert "object at 0x" not in text
        assert len(text) < 300
        assert "\n" not in text
    assert "3 layers" in repr(model)
    assert "3 tokens, finish_reason='length'" in repr(stream.result)
    assert eval(repr(model.plan), {"LayerPlan": LayerPlan}) == model.plan


def test_a_message_speaks_to_its_reader():
    assert option("overflow", "error") == "overflow='error'"
    with in_flags():
        assert option("overflow", "error") == "--overflow error"
        assert told("stream()", "--format completion") == "--format completion"
    assert option("plan", flag="layer_spec") == "plan"


def test_box_is_the_model_in_the_box_unless_a_folder_is_called_so(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert jaxchat.load("box").config.num_layers == 8
    (tmp_path / "box").symlink_to(directory)
    assert jaxchat.load("box").config.num_layers == 3
    (tmp_path / "box").unlink()
    (tmp_path / "box").mkdir()
    with pytest.raises(JaxchatError, match=r"box: .*holds no config.json; rename it"):
        jaxchat.load("box")


def test_another_format_of_the_model_in_the_box_says_what_can_be_done():
    with pytest.raises(UsageError, match=r"holds int8.* weights, not int4; .*--to_hf --dequantize") as caught:
        jaxchat.load("box", quant="int4")
    assert "original" not in str(caught.value)
