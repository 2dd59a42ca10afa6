"""Broken and hostile files of every kind that commands read: one line that names the file, or an answer.

Every file in every state with `make test-full`; `make test` meets each file and each state.
"""

import copy
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxchat.chat import session_file
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.manifest import MANIFEST
from jaxchat.checkpoints.safetensors_file import SafetensorsFile
from jaxchat.checkpoints.write import convert
from jaxchat.errors import JaxchatError
from jaxchat.quant import QuantFormat
from jaxchat.runtime import load
from jaxchat.text.chat_template import ChatTemplate
from tests.support.products import diagonal
from tests.support.tiny_chat import write_tiny_chat

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="has no such files"),
    pytest.mark.usefixtures("quick_compilation"),
]

# --- files in bad states


def _link(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5 << 30)


def _holds(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


STATES: dict[str, Callable[[Path], object]] = {
    "empty": _holds(b""),
    "blank": _holds(b" \r\n"),
    "zeros": _holds(bytes(100)),
    "noise": _holds(bytes(range(256)) * 8),
    "a list": _holds(b"[]"),
    "null": _holds(b"null"),
    "a number": _holds(b"7"),
    "a text": _holds(b'"x"'),
    "deep": _holds(b'{"a":' + b"[" * 100_000),
    "deep and closed": _holds(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "digits": _holds(b'{"a": ' + b"9" * 5000 + b"}"),
    "UTF-16": _holds('{"a": 1}'.encode("utf-16")),
    "a web page": _holds(b"<!DOCTYPE html><html><title>404</title></html>"),
    "a pointer": _holds(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    "escapes": _holds(b'{"\x1b]0;owned\x07\x1b[2J": "\x1b[2J"}'),
    "huge": _sparse,
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": _link("/dev/zero"),
    "a loop": lambda path: path.symlink_to(path.name),
    "dangling": _link("nowhere"),
}
"""What may be where a file is expected."""

NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
OPTIONAL = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    MANIFEST,
)
FLAGGED = {
    "a session": ("-p", "hello", "--load_session"),
    "a recipe": ("-p", "hello", "--recipe"),
    "a prompt": ("--prompt_file",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model") / "chat")


def copied(model: Path, to: Path) -> Path:
    to.mkdir()
    for path in model.iterdir():
        (to / path.name).symlink_to(path)
    return to


def assert_is_a_line_that_names(said: str, *names: str) -> None:
    assert said.startswith("jaxchat: error: "), said
    assert any(name in said for name in names), said
    assert len(said) < 2000
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said), said


def replace(path: Path, state: str) -> None:
    path.unlink(missing_ok=True)
    STATES[state](path)


@pytest.mark.parametrize(("name", "state"), diagonal((*NEEDED, *OPTIONAL), STATES))
def test_a_file_of_a_model_in_a_bad_state_is_one_line_that_names_it(name, state, model, tmp_path, commands):
    directory = copied(model, tmp_path / "m")
    replace(directory / name, state)
    done = commands("generate", "-m", directory, "-p", "hello", "--max_new_tokens", 2, "--quiet")
    if done.code == 0:  # what nobody needs, or says nothing
        assert name in OPTIONAL
        assert done.err == ""
        return
    assert done.code in (1, 2)
    assert done.out == ""
    # A template may be any text, also a long one.
    assert_is_a_line_that_names(done.err, name, str(directory), "too many for the context")


@pytest.mark.parametrize(("flag", "state"), diagonal(FLAGGED, STATES))
def test_a_file_that_a_flag_names_in_a_bad_state_is_one_line_that_names_it(
    flag, state, model, tmp_path, commands
):
    if (flag, state) == ("a prompt", "a pipe"):
        pytest.skip("as <(command) makes one: it is read until its end")
    path = tmp_path / "given"
    replace(path, state)
    source = () if flag == "a recipe" else ("-m", model)
    done = commands("generate", *source, *FLAGGED[flag], path, "--max_new_tokens", 2, "--quiet")
    if done.code == 0:
        assert flag == "a prompt"
        return
    assert done.code in (1, 2)
    assert done.out == ""
    assert_is_a_line_that_names(done.err, str(path), "too many for the context")


# --- JSON whose shape is right and whose values are not

_SCALARS = (
    st.none() | st.booleans() | st.sampled_from([0, -1, 1, 2**31, 10**30, 0.5, 1e300, float("nan")])
    | st.text(max_size=4)
)  # fmt: skip
WILD = _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), _SCALARS, max_size=2)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def changed(value: Any, data: st.DataObject) -> Any:
    """The value with something wild somewhere in it, or without something."""
    value = copy.deepcopy(value)
    *path, last = data.draw(st.sampled_from(list(_places(value))))
    holder = value
    for key in path:
        holder = holder[key]
    if data.draw(st.integers(0, 4)):
        holder[last] = data.draw(WILD)
    else:
        del holder[last]
    return value


def outcome_of(action: Callable[[], object]) -> str:
    """What it raises, if that is for users."""
    try:
        action()
    except JaxchatError as error:
        return str(error)
    return ""


many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.data())
@many
def test_any_manifest_is_read_or_refused(converted, tmp_path, data):
    text = json.dumps(changed(json.loads((converted / MANIFEST).read_text()), data))
    directory = tmp_path / "m"
    if not directory.exists():
        copied(converted, directory)
        (directory / MANIFEST).unlink()
    (directory / MANIFEST).write_text(text)
    found = ModelDirectory.at(directory)
    said = outcome_of(lambda: (found.config, found.plan, found.source()))
    assert not said or MANIFEST in said or str(directory) in said


@pytest.fixture(scope="module")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "m"
    convert(model, directory, layer_spec="0,1,1", quant=QuantFormat.parse("int8"))
    return directory


@pytest.fixture(scope="module")
def chat(model: Path):
    chat = load(model, max_length=200).chat_session(system="Be brief.")
    for _ in chat.send("hello", max_new_tokens=3):
        pass
    return chat


@pytest.fixture(scope="module")
def saved(chat, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a session."""
    path = tmp_path_factory.mktemp("saved") / "a.session"
    chat.save(path)
    return dict(SafetensorsFile(path).metadata), load_file(path)


def rewritten(path: Path, metadata: dict[str, str], tensors: dict[str, np.ndarray], stored: Any) -> Path:
    text = json.dumps(stored)
    save_file(tensors, path, metadata=metadata | {"session": text, "crc32": str(zlib.crc32(text.encode()))})
    return path


@given(st.data())
@many
def test_any_session_is_loaded_or_refused_by_name(chat, saved, tmp_path, data):
    metadata, tensors = saved
    path = rewritten(
        tmp_path / "a.session", metadata, tensors, changed(json.loads(metadata["session"]), data)
    )
    said = outcome_of(lambda: chat.load(path))
    assert not said or said.startswith(str(path))
    if not said:  # then one can go on with it
        outcome_of(lambda: list(chat.send("more", max_new_tokens=1)))


@given(st.sampled_from(["ids", "k", "v", "rope_regime"]), st.data())
@many
def test_any_tensors_of_a_session_are_loaded_or_refused_by_name(chat, saved, tmp_path, name, data):
    metadata, tensors = saved[0], dict(saved[1])
    array = tensors.pop(name)
    if data.draw(st.booleans()):
        kind = data.draw(st.sampled_from(["float32", "int32", "int64", "float16", "bool"]))
        tensors[name] = array.reshape(data.draw(st.permutations([*array.shape, 1]))).astype(kind)
    stored = json.loads(metadata["session"])
    stored["crc32"] = {key: session_file._crc32(value) for key, value in tensors.items()}
    path = rewritten(tmp_path / "a.session", metadata, tensors, stored)
    said = outcome_of(lambda: chat.load(path))
    assert not said or said.startswith(str(path))


@given(st.data())
@many
def test_any_tokenizer_configuration_is_read_or_refused_by_name(model, tmp_path, data):
    values = json.loads((model / "tokenizer_config.json").read_text())
    values["added_tokens_decoder"] = {"0": {"content": "<pad>", "special": True}}
    values["additional_special_tokens"] = ["<|user|>"]
    values["chat_template"] = [{"name": "default", "template": values["chat_template"]}]
    generation = {"do_sample": True, "temperature": 0.7, "top_k": 5, "eos_token_id": [2], "top_p": 0.9}
    name, values = data.draw(
        st.sampled_from([("tokenizer_config.json", values), ("generation_config.json", generation)])
    )
    text = json.dumps(changed(values, data))
    directory = tmp_path / "m"
    if not directory.exists():
        copied(model, directory)
        (directory / "tokenizer_config.json").unlink()
    path = directory / name
    path.write_text(text)
    found = ModelDirectory.at(directory)

    def everything() -> None:
        template = found.template
        assert found.tokenizer is not None
        found.tokenizer.encode("hello <pad>")
        _ = found.recommended_sampling, found.config
        if isinstance(template, ChatTemplate):
            template.check()

    said = outcome_of(everything)
    path.unlink()
    assert not said or str(directory) in said
