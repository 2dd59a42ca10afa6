"""Conversions: byte-exact there and back, all or nothing on disk, and one line about whatever goes wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import load_params
from jaxchat.checkpoints.manifest import Manifest
from jaxchat.checkpoints.safetensors_file import PAD_PREFIX, SafetensorsFile
from jaxchat.checkpoints.write import FORMATS, KEEP, convert, to_hf
from jaxchat.cli.flags import flag_fields
from jaxchat.commands.convert import ConvertRequest
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.quant import QuantFormat
from tests.support.commands import Commands
from tests.support.tiny import TINY_CONFIGS, write_tiny_hf
from tools.convert import main

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT.parent / "shared/data/models"
REAL = ["stories260K-hf", "CraftGPT-hf", "TinyStories-656K/fp32", "TinyStories-656K/bf16"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def assert_same_tensors(a: Path, b: Path) -> None:
    """Every tensor of two Hugging Face directories is equal in name, dtype, shape and bytes."""
    first, second = (
        {n: t for path in sorted(d.glob("*.safetensors")) for n, t in load_file(path).items()} for d in (a, b)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value.dtype, value.shape) == (second[name].dtype, second[name].shape), name
        assert value.tobytes() == second[name].tobytes(), name


def there_and_back(src: Path, tmp_path: Path, **arguments: object) -> None:
    convert(src, tmp_path / "converted", **arguments)  # type: ignore[arg-type]
    to_hf(tmp_path / "converted", tmp_path / "back")
    assert_same_tensors(src, tmp_path / "back")


# There and back.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_native_and_back_is_byte_exact(tmp_path: Path, model_type: str, dtype: str) -> None:
    write_tiny_hf(tmp_path / "hf", model_type, dtype=dtype)
    there_and_back(tmp_path / "hf", tmp_path)
    assert (tmp_path / "back/config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()


@pytest.mark.parametrize("model_type", ["phi3", "gpt2"])
def test_orbax_and_back_is_byte_exact(tmp_path: Path, model_type: str) -> None:
    write_tiny_hf(tmp_path / "hf", model_type, dtype="bfloat16")
    there_and_back(tmp_path / "hf", tmp_path, format="orbax")
    convert(tmp_path / "converted", tmp_path / "native")
    config, params = load_params(tmp_path / "hf")
    for name in ("converted", "native"):
        found_config, found = load_params(tmp_path / name)
        assert found_config == config
        for key, value in params.items():
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)


@pytest.mark.parametrize("format", ["native", "orbax"])
@pytest.mark.parametrize("stored", ["copy", "only", "different"])
def test_what_was_stored_of_a_tied_head_comes_back(tmp_path: Path, stored: str, format: str) -> None:
    write_tiny_hf(tmp_path / "hf", "gemma2")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = -embedding if stored == "different" else embedding.copy()
    if stored == "only":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    there_and_back(tmp_path / "hf", tmp_path, format=format)


def test_other_prefixes_come_back(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "gpt2")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    renamed = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "hf/model.safetensors")
    there_and_back(tmp_path / "hf", tmp_path)


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "phi3")
    convert(tmp_path / "hf", tmp_path / "native")
    to_hf(tmp_path / "native", tmp_path / "back", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in load_file(tmp_path / "hf/model.safetensors").values()
    )
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    there_and_back(tmp_path / "back", tmp_path / "again")


@pytest.mark.parametrize("name", REAL)
def test_real_models_come_back(tmp_path: Path, name: str) -> None:
    if not (MODELS / name).is_dir():
        pytest.skip(f"the real model {name} is not beside the repository")
    there_and_back(MODELS / name, tmp_path)


# What is in a native directory.


def test_native_file_is_aligned_and_official(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "gpt2", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "native")
    path = tmp_path / "native/model.safetensors"
    file, official = SafetensorsFile(path), load_file(path)
    assert all(entry.start % 64 == 0 for entry in file.entries.values())
    assert {n for n in official if not n.startswith(PAD_PREFIX)} == set(file.entries)
    for name in file.entries:
        np.testing.assert_array_equal(official[name], file.view(name))


def test_description_says_where_the_weights_come_from(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "tiny-phi", "phi3")
    written = convert(tmp_path / "tiny-phi", tmp_path / "native", dtype="bfloat16")
    assert Manifest.read(tmp_path / "native") == written
    assert (written.source, written.format, set(written.dtypes.values())) == (
        "tiny-phi",
        "native",
        {"bfloat16"},
    )
    assert written.parameters == sum(value.size for value in load_params(tmp_path / "native")[1].values())
    assert json.loads((tmp_path / "native/config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_and_template_files_are_copied(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    names = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
    names.append("generation_config.json")
    for name in names:
        (tmp_path / "hf" / name).write_text(f'{{"of": "{name}"}}')
    (tmp_path / "hf/notes.txt").write_text("not a part of the model")
    convert(tmp_path / "hf", tmp_path / "native")
    to_hf(tmp_path / "native", tmp_path / "back")
    for directory in ("native", "back"):
        for name in names:
            assert (tmp_path / directory / name).read_text() == f'{{"of": "{name}"}}'
        assert not (tmp_path / directory / "notes.txt").exists()


def test_conversion_while_converting_equals_conversion_at_load(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "gpt2")
    convert(tmp_path / "hf", tmp_path / "native", dtype="float16")
    _, late = load_params(tmp_path / "hf", dtype="float16")
    for name, value in load_params(tmp_path / "native")[1].items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, late[name])


def test_configuration_of_a_converted_model_has_its_own_head(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "qwen2")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "native")
    assert not ModelDirectory.at(tmp_path / "native").config.tied_embeddings


# All or nothing.


def test_existing_destination_is_kept_unless_told(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "llama", seed=1)
    write_tiny_hf(tmp_path / "hf2", "llama", seed=2)
    convert(tmp_path / "hf", tmp_path / "native")
    before = (tmp_path / "native/model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        convert(tmp_path / "hf2", tmp_path / "native")
    assert (tmp_path / "native/model.safetensors").read_bytes() == before
    convert(tmp_path / "hf2", tmp_path / "native", overwrite=True)
    assert (tmp_path / "native/model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "hf2", "native"]


def test_overwrite_spares_what_is_no_model(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not a model directory"):
        convert(tmp_path / "hf", tmp_path / "home", overwrite=True)
    with pytest.raises(UsageError, match="must be separate"):
        convert(tmp_path / "hf", tmp_path / "hf", overwrite=True)
    with pytest.raises(UsageError, match="must be separate"):
        convert(tmp_path / "hf", tmp_path, overwrite=True)


@pytest.mark.parametrize("format", ["native", "orbax", "hf"])
@pytest.mark.parametrize(
    "more", ["notes.txt", "photos/wedding.jpg", "empty/", ".git/HEAD", "orbax/x.txt", "model.bin"]
)
def test_overwrite_names_what_no_conversion_wrote_and_touches_nothing(
    tmp_path: Path, format: str, more: str
) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    out = tmp_path / "out"

    def again(**arguments: bool) -> None:
        if format == "hf":
            to_hf(tmp_path / "hf", out, max_shard_bytes=20_000, **arguments)
        else:
            convert(tmp_path / "hf", out, format=format, **arguments)

    again()
    again(overwrite=True)
    path = out / more
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if more.endswith("/") else path.write_text("dear")
    before = sorted(out.rglob("*"))
    with pytest.raises(UsageError, match=rf"out: holds {more.rstrip('/')}, which no conversion writes"):
        again(overwrite=True)
    assert sorted(out.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_link_stays_and_leads_to_the_new_model(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "llama", seed=1)
    write_tiny_hf(tmp_path / "hf2", "llama", seed=2)
    (tmp_path / "link").symlink_to("disk/model")
    (tmp_path / "disk").mkdir()
    (tmp_path / ".model.old-1").symlink_to("hf")  # as conversions of old left
    (tmp_path / ".model.old-1").rename(tmp_path / "disk/.model.old-1")
    for number, source in enumerate(("hf", "hf2")):
        convert(tmp_path / source, tmp_path / "link", overwrite=number > 0)
        assert os.readlink(tmp_path / "link") == "disk/model"
        assert Manifest.read(tmp_path / "disk/model").source == source
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "hf", "hf2", "link"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("dst", "message"),
    [
        ("loop", "loop: a link that leads back to itself"),
        ("file/model", "file/model: cannot be created: there is a file where a folder would be"),
        ("loop/model", "loop/model: cannot be created"),
        ("file", "file: is not a model directory"),
        ("hf-link/inside", "must be separate directories"),
        ("hf-link", "must be separate directories"),
        ("/proc/model", "/proc/model: cannot be created"),
    ],
)
def test_destinations_that_cannot_be(tmp_path: Path, dst: str, message: str) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "hf-link").symlink_to("hf")
    (tmp_path / "file").write_text("x")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(JaxchatError, match=re.escape(message)):
        convert(tmp_path / "hf", tmp_path / dst, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("how", ["cut", "replaced", "written to"])
@pytest.mark.parametrize("format", ["hf", "native"])
def test_a_source_that_changes_while_it_is_converted(tmp_path: Path, format: str, how: str) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    source = tmp_path / "hf"
    if format == "native":
        source = tmp_path / "source"
        convert(tmp_path / "hf", source)
    weights = source / "model.safetensors"
    reports: list[tuple[int, int]] = []

    def change(done: int, total: int) -> None:
        reports.append((done, total))
        if len(reports) != 3:
            return
        if how == "cut":
            os.truncate(weights, 100)
        elif how == "replaced":  # what is open stays as it is
            (tmp_path / "new").write_bytes(b"")
            (tmp_path / "new").replace(weights)
        else:
            os.utime(weights, (1, 1))

    if how == "replaced":
        convert(source, tmp_path / "out", quant=None, dtype="bfloat16", progress=change)
        assert reports[0] == (0, reports[-1][0])  # all of it is known at the start
        load_params(tmp_path / "out")
    else:
        with pytest.raises(JaxchatError, match=r"model\.safetensors: was changed while it was read \("):
            convert(source, tmp_path / "out", dtype="bfloat16", progress=change)
        assert not (tmp_path / "out").exists()
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_cannot_be_quantized_say_what_to_do(tmp_path: Path, value: float) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(JaxchatError, match=r"up.*: holds NaN or infinite .*download it again, or do with"):
        convert(tmp_path / "hf", tmp_path / "out", quant=QuantFormat.parse("int4"))
    convert(tmp_path / "hf", tmp_path / "out")


def test_replacement_that_was_cut_short_is_undone(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "native")
    (tmp_path / "native").rename(tmp_path / ".native.old-1")
    convert(tmp_path / "hf", tmp_path / "native", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


SLOW = """
import contextlib, signal, sys, time
import tools.convert
from jaxchat.cli import progress_bar
@contextlib.contextmanager
def slow(label):
    def report(done, total):
        print("half way" if done > total / 2 else "started", flush=True)
        if done > total / 2:
            time.sleep(60)
    yield report
progress_bar.copying_bar = slow
signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the programs begin
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, and its children with it
sys.exit(tools.convert.main(["convert", "--src", sys.argv[1], "--dst", sys.argv[2]]))
"""


@pytest.fixture
def half_way(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A conversion of tmp_path/hf to tmp_path/native that is stuck half way."""
    write_tiny_hf(tmp_path / "hf", "llama")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "hf"), str(tmp_path / "native")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("half way"):
            break
    yield process
    process.kill()
    process.communicate()


def test_killed_conversion_leaves_no_destination_and_is_cleaned_up(
    tmp_path: Path, half_way: subprocess.Popen[str]
) -> None:
    half_way.kill()
    half_way.wait()
    names = {path.name for path in tmp_path.iterdir()}
    partial = f".native.partial-{half_way.pid}"
    assert names == {"hf", partial, f"{partial}.lock"}
    convert(tmp_path / "hf", tmp_path / "native")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native"}
    load_params(tmp_path / "native")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_nothing_and_says_how_to_go_on(
    tmp_path: Path, half_way: subprocess.Popen[str], number: int, code: int
) -> None:
    half_way.send_signal(number)
    _, stderr = half_way.communicate(timeout=30)
    assert half_way.returncode == code
    assert stderr == (
        f"jaxchat: interrupted; nothing was left in {tmp_path / 'native'}; "
        "run the same command again to start over\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_two_conversions_to_one_destination(tmp_path: Path, half_way: subprocess.Popen[str]) -> None:
    with pytest.raises(UsageError, match="another conversion is writing it"):
        convert(tmp_path / "hf", tmp_path / "native")
    assert half_way.poll() is None
    assert (tmp_path / f".native.partial-{half_way.pid}").is_dir()


# The command.


def command(
    *arguments: object, program: tuple[str, ...] = ("tools/convert.py",)
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
        check=False,
    )


def test_command_converts_and_sums_up(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "phi3")
    done = command("--src", tmp_path / "hf", "--dst", tmp_path / "native", "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'native'}: 18,072 parameters, ")
    assert load_params(tmp_path / "native")[1]["norm.weight"].dtype == np.uint16


def test_command_writes_orbax_quietly_and_reads_it_back(tmp_path: Path, commands: Commands) -> None:
    write_tiny_hf(tmp_path / "hf", "gpt2")
    done = commands("convert", "--src", tmp_path / "hf", "--dst", tmp_path / "orbax", "--format", "orbax")
    assert (done.code, done.err) == (0, "")
    commands.output("convert", "--src", tmp_path / "orbax", "--dst", tmp_path / "back", "--to_hf")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")


def test_choices_of_the_command_are_those_of_the_library() -> None:
    choices = {field.name: get_args(field.type) for field in flag_fields(ConvertRequest)}
    assert (choices["format"], choices["plan"]) == (FORMATS, KEEP)


def test_importing_the_command_defines_no_global_flag() -> None:
    assert "src" not in flags.FLAGS
    assert "dtype" not in flags.FLAGS


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--src and --dst must be given"),
        (["--src", "{tmp}/hf"], 2, "--dst must be given"),
        (["--src", "{tmp}/hf", "--dst", "{tmp}/x", "--fromat", "native"], 2, "did you mean --format?"),
        (["--src", "{tmp}/hf", "--dst", "{tmp}/x", "--format", "zip"], 2, "expected native or orbax"),
        (["--src", "{tmp}/hf", "--dst", "{tmp}/x", "--dtype", "int8"], 2, "'int8'; expected float32, "),
        (["--src", "{tmp}/hf", "--dst", "{tmp}/x", "more"], 2, "unexpected argument 'more'"),
        (["--src", "{tmp}/hf", "--dst", "{tmp}/x", "--to_hf", "--dtype", "float16"], 2, "--dtype cannot be"),
        (["--src", "{tmp}/hf", "--dst", "{tmp}/x", "--max_shard_bytes", "9"], 2, "needs --to_hf"),
        (["--src", "{tmp}/hf", "--dst", "{tmp}/x", "--to_hf", "--max_shard_bytes", "0"], 2, "1 or more"),
    ],
)  # fmt: skip
def test_wrong_usage(
    tmp_path: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    assert main(["convert", *(a.format(tmp=tmp_path) for a in arguments)]) == code
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def spoil(directory: Path, how: str) -> None:
    weights = directory / "model.safetensors"
    if how == "no directory":
        shutil.rmtree(directory)
    elif how == "a file":
        shutil.rmtree(directory)
        directory.write_text("x")
    elif how == "no config":
        (directory / "config.json").unlink()
    elif how == "config no JSON":
        (directory / "config.json").write_text("{")
    elif how == "unknown model":
        (directory / "config.json").write_text('{"model_type": "mamba"}')
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "wrong shape":
        tensors = load_file(weights)
        tensors["model.norm.weight"] = np.ones(3, np.float32)
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("no directory", 2, "no such model directory"),
        ("a file", 2, "not a directory"),
        ("no config", 1, "config.json: no such file"),
        ("config no JSON", 1, "not readable as JSON"),
        ("unknown model", 2, "model_type 'mamba' is not supported"),
        ("no weights", 1, "neither model.safetensors nor model.safetensors.index.json"),
        ("truncated", 1, "truncated: expected"),
        ("wrong shape", 1, "expected [24], found [3]"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(
    tmp_path: Path, commands: Commands, how: str, code: int, message: str
) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    spoil(tmp_path / "hf", how)
    assert message in commands.error(
        "convert", "--src", tmp_path / "hf", "--dst", tmp_path / "native", code=code
    )
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []


def test_damaged_orbax_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "orbax", format="orbax")
    for path in (tmp_path / "orbax/orbax").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")
    assert main(["convert", "--src", str(tmp_path / "orbax"), "--dst", str(tmp_path / "native")]) == 1
    stderr = capsys.readouterr().err
    assert "Orbax cannot read it" in stderr
    assert stderr.count("\n") == 1


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
runpy.run_path("tools/convert.py", run_name="__main__")
"""


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="needs a limit on the size of files")
    write_tiny_hf(tmp_path / "hf", "llama")
    done = command("--src", tmp_path / "hf", "--dst", tmp_path / "native", program=("-c", LIMITED))
    assert done.returncode == 1
    assert done.stderr == (
        f"jaxchat: error: {tmp_path / 'native'}: cannot be written (File too large); "
        "nothing was left behind\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_destination_that_cannot_be_created(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    (tmp_path / "file").write_text("x")
    arguments = ["convert", "--src", str(tmp_path / "hf"), "--dst", str(tmp_path / "file/native")]
    assert main(arguments) == 1
    assert "cannot be created: there is a file where a folder would be" in capsys.readouterr().err
