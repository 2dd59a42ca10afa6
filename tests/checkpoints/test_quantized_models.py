"""Quantized models: they compute what their dequantized weights do, and take the bytes they should."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxchat
from jaxchat import generate
from jaxchat.analysis import show
from jaxchat.checkpoints.load import load_params
from jaxchat.checkpoints.manifest import Manifest
from jaxchat.checkpoints.safetensors_file import SafetensorsFile
from jaxchat.checkpoints.write import convert, to_hf
from jaxchat.cli import model_flags
from jaxchat.config import ModelConfig
from jaxchat.engine.session import Engine
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import empty_cache
from jaxchat.layers.step import Params
from jaxchat.quant import QuantFormat, QuantizedTensor, dequantize, format_for, quantize
from jaxchat.sharding import shard_params
from tests.support.commands import Commands
from tests.support.memory import added, is_mapped, needs_counters, needs_mappings
from tests.support.parity_cases import run
from tests.support.products import diagonal
from tests.support.tiny import TINY_CONFIGS, write_tiny_hf
from tests.support.tiny_chat import write_tiny_chat
from tools import convert as convert_tool

ROOT = Path(__file__).resolve().parents[2]
TOKENS = np.random.default_rng(0).integers(3, 67, (2, 20))
LARGE = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""16 layers of 7.5 MiB; the largest tensor of a layer has 1.5 MiB."""

Directory = Callable[..., Path]


def parse(text: str) -> QuantFormat:
    fmt = QuantFormat.parse(text)
    assert fmt is not None
    return fmt


def logits(config: ModelConfig, params: Params) -> np.ndarray:
    """Of `TOKENS`, by the reference kernels in float32."""
    slots, (batch, length) = config.num_layers, TOKENS.shape
    cache = empty_cache(config, slots=slots, batch=batch, capacity=32, dtype=jnp.float32)
    plan = LayerPlan.identity(slots).arrays(slots)
    lengths = np.full(batch, length, np.int32)
    return np.asarray(run(config, params, cache, plan, TOKENS, 0 * lengths, lengths, lengths)[0])


def assert_same(a: Params, b: Params) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def error_of(action: Callable[[], Any], kind: type[JaxchatError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a quantized model computes.


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("model_type", "fmt"), diagonal(TINY_CONFIGS, ["int4", "int8:channel"]))
def test_quantized_logits_are_those_of_the_dequantized_weights(
    tmp_path: Path, tiny_directory: Directory, model_type: str, fmt: str
) -> None:
    source = tiny_directory(model_type)
    config, params = load_params(source, quant=parse(fmt))
    _, plain = load_params(source)
    for name, value in params.items():
        if isinstance(value, QuantizedTensor):
            once = quantize(np.asarray(plain[name]), parse(value.format_name), name=name)
            plain[name] = dequantize(once)
    np.testing.assert_allclose(logits(config, params), logits(config, plain), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("fmt", ["q4_1", "int8:64:affine:f32"])
def test_formats_with_offsets_run_too(tiny_directory: Directory, fmt: str) -> None:
    config, params = load_params(tiny_directory("llama"), quant=parse(fmt))
    assert params["layers.q.weight"].affine
    plain = {
        name: dequantize(value) if isinstance(value, QuantizedTensor) else value
        for name, value in params.items()
    }
    np.testing.assert_allclose(logits(config, params), logits(config, plain), rtol=0, atol=1e-5)


def test_library_generates_under_any_plan(tiny_directory: Directory) -> None:
    model = jaxchat.load(tiny_directory("qwen3"), quant="int4", plan="0,1,1,2", kernels="reference")
    result = model.generate(token_ids=[[1, 5, 7], [4]], max_new_tokens=5, ignore_eos=True)
    assert [len(r.token_ids) for r in result] == [5, 5]


def test_unknown_kernels_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    assert "kernels is 'magic'" in error_of(lambda: jaxchat.load(tmp_path, kernels="magic"))


# Conversion and loading.


@pytest.mark.parametrize(("model_type", "dtype"), diagonal(TINY_CONFIGS, ["float32", "bfloat16"]))
def test_quantizing_at_conversion_equals_quantizing_at_load(
    tmp_path: Path, tiny_directory: Directory, model_type: str, dtype: str
) -> None:
    source = tiny_directory(model_type, dtype=dtype)
    fmt = parse("int4:64")
    convert(source, tmp_path / "int4", quant=fmt)
    config, at_load = load_params(source, quant=fmt)
    for wanted in ("auto", fmt):
        found_config, found = load_params(tmp_path / "int4", quant=wanted)  # type: ignore[arg-type]
        assert found_config == config
        assert_same(found, at_load)


def test_every_source_quantizes_to_the_same(tmp_path: Path, tiny_directory: Directory) -> None:
    source = tiny_directory("phi3", dtype="bfloat16")
    convert(source, tmp_path / "native")
    convert(source, tmp_path / "orbax", format="orbax")
    expected = load_params(source, quant=parse("int8"))[1]
    for directory in ("native", "orbax"):
        assert_same(load_params(tmp_path / directory, quant=parse("int8"))[1], expected)
        convert(tmp_path / directory, tmp_path / f"{directory}-int8", quant=parse("int8"))
        assert_same(load_params(tmp_path / f"{directory}-int8")[1], expected)


def test_dtype_is_of_what_is_not_quantized(tmp_path: Path, tiny_directory: Directory) -> None:
    source = tiny_directory("llama")
    convert(source, tmp_path / "int8", quant=parse("int8"), dtype="float16")
    params = load_params(tmp_path / "int8")[1]
    assert params["norm.weight"].dtype == np.float16
    assert_same(params, load_params(source, quant=parse("int8"), dtype="float16")[1])
    assert_same(params["embed.weight"], load_params(source, quant=parse("int8"))[1]["embed.weight"])


def test_description_names_the_format_of_every_quantized_parameter(
    tmp_path: Path, tiny_directory: Directory
) -> None:
    convert(tiny_directory("gpt2"), tmp_path / "int4", quant=parse("int4:affine"))
    quantization = Manifest.read(tmp_path / "int4").quantization
    assert quantization is not None
    assert quantization.format == "int4:affine"
    assert quantization.parameters == {
        "embed.weight": "int8",
        **{f"layers.{name}.weight": "int4:affine" for name in ("q", "k", "v", "o", "up", "down")},
    }


def test_tensors_are_aligned_and_named_after_their_parameter(
    tmp_path: Path, tiny_directory: Directory
) -> None:
    convert(tiny_directory("llama"), tmp_path / "q4_1", quant=parse("q4_1"))
    entries = SafetensorsFile(tmp_path / "q4_1/model.safetensors").entries
    assert all(entry.start % 64 == 0 for entry in entries.values())
    found = {name: (e.dtype, e.shape) for name, e in entries.items() if name.startswith("layers.down.")}
    assert found == {  # 44 columns are two groups of 32, so 64 codes, two a byte
        "layers.down.weight.codes": ("U8", (3, 24, 32)),
        "layers.down.weight.scales": ("F16", (3, 24, 2)),
        "layers.down.weight.mins": ("F16", (3, 24, 2)),
    }


def test_another_format_than_the_stored_one_says_how_to_get_it(
    tmp_path: Path, tiny_directory: Directory
) -> None:
    convert(tiny_directory("llama"), tmp_path / "int4", quant=parse("int4"))
    for wanted in (parse("int8"), parse("int4:64"), None):
        name = wanted or "none"
        expected = f"{tmp_path / 'int4'}: holds int4 weights, not {name}; leave quant out, or take the "
        assert error_of(lambda w=wanted: load_params(tmp_path / "int4", quant=w)).startswith(expected)
        assert "--to_hf --dequantize" in error_of(
            lambda w=wanted: convert(tmp_path / "int4", tmp_path / "x", quant=w)
        )
    assert not (tmp_path / "x").exists()


def test_quantized_checkpoint_is_copied_as_it_is(tmp_path: Path, tiny_directory: Directory) -> None:
    convert(tiny_directory("llama"), tmp_path / "int4", quant=parse("int4"))
    convert(tmp_path / "int4", tmp_path / "again")
    assert Manifest.read(tmp_path / "again") == Manifest.read(tmp_path / "int4")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("int4", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("model_type", "dtype"), [("gpt2", "float32"), ("phi3", "bfloat16")])
def test_hugging_face_layout_holds_the_numbers_quantized_weights_stand_for(
    tmp_path: Path, tiny_directory: Directory, model_type: str, dtype: str
) -> None:
    convert(tiny_directory(model_type, dtype=dtype), tmp_path / "int8", quant=parse("int8"))
    assert "add --dequantize" in error_of(lambda: to_hf(tmp_path / "int8", tmp_path / "hf"))
    to_hf(tmp_path / "int8", tmp_path / "hf", dequantize=True)
    quantized, plain = load_params(tmp_path / "int8")[1], load_params(tmp_path / "hf", dtype=dtype)[1]
    for name, value in quantized.items():
        if isinstance(value, QuantizedTensor):
            value = dequantize(value)
            if dtype == "bfloat16":  # loaded as its bits
                value = value.astype(jnp.bfloat16).view(np.uint16)
        np.testing.assert_array_equal(np.asarray(value), np.asarray(plain[name]), err_msg=name)


def test_orbax_refuses_quantized_weights(tmp_path: Path, tiny_directory: Directory) -> None:
    def act() -> object:
        return convert(tiny_directory("llama"), tmp_path / "x", quant=parse("int4"), format="orbax")

    assert "use --format native" in error_of(act)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "jaxchat.json: quantization.format is 3; expected a text"),
        ({"parameters": None}, "jaxchat.json: quantization.parameters is None; expected an object"),
        ({"parameters": {"embed.weight": "int9"}}, "jaxchat.json: 'int9' is no quantization format"),
        ({"parameters": {}}, "missing tensors: embed.weight [67, 24]"),
        ({"parameters": {"embed.weight": "int4"}}, "wrong dtypes: embed.weight.codes: expected U8, found I8"),
    ],
)
def test_damaged_description_is_one_line(
    tmp_path: Path, tiny_directory: Directory, changes: dict[str, Any], message: str
) -> None:
    convert(tiny_directory("llama"), tmp_path / "int4", quant=parse("int4"))
    path = tmp_path / "int4/jaxchat.json"
    values = json.loads(path.read_text())
    values["quantization"] |= changes
    path.write_text(json.dumps(values))
    assert message in error_of(lambda: load_params(tmp_path / "int4"), JaxchatError)


def test_weights_that_cannot_be_quantized_name_the_tensor(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path, "llama", dtype="bfloat16")
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    entry = SafetensorsFile(tmp_path / "model.safetensors").entries["model.layers.1.mlp.up_proj.weight"]
    data[entry.start : entry.start + 2] = b"\x80\x7f"  # infinity
    (tmp_path / "model.safetensors").write_bytes(data)
    message = error_of(lambda: load_params(tmp_path, quant=parse("int4")), JaxchatError)
    assert message.startswith("layers.up.weight[1]: holds NaN or infinite weights")


# What it takes.


def test_show_counts_the_bytes_that_are_loaded(tmp_path: Path, tiny_directory: Directory) -> None:
    source = tiny_directory("gemma3_text")
    for fmt in ("int4", "int8:64", "int4:128:affine"):
        convert(source, tmp_path / fmt, quant=parse(fmt))
        loaded = sum(value.nbytes for value in load_params(tmp_path / fmt)[1].values())
        stored = show.describe_directory(tmp_path / fmt)
        asked = show.describe_directory(source, quant=fmt)
        assert stored.quantized_bytes == asked.quantized_bytes
        assert stored.quantization == asked.quantization == stored.stored_dtype == fmt
        assert stored.quantized_bytes is not None
        assert stored.quantized_bytes["total"] == loaded
        assert f"{fmt} {show.short_bytes(loaded)} (as stored)" in show.render(stored)
        assert f"{fmt} {show.short_bytes(loaded)}, scales included" in show.render(asked)


def test_four_bits_of_an_8b_model_are_four_bits(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = show.describe_directory(tmp_path, quant="int4").quantized_bytes
    # 18 bytes for 32 weights at 4 bits, 34 at 8.
    embedding = 128256 * 4096 // 32 * 34
    attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096) // 32 * 18
    mlp = 32 * 3 * 4096 * 14336 // 32 * 18
    norms = 65 * 4096 * 2
    assert sizes == {
        "embedding": embedding,
        "norms and biases": norms,
        "attention": attention,
        "MLP": mlp,
        "output head": embedding,
        "total": 2 * embedding + attention + mlp + norms,
    }


@needs_mappings
def test_native_codes_and_scales_are_the_mapped_file(tmp_path: Path, tiny_directory: Directory) -> None:
    convert(tiny_directory("phi3", dtype="bfloat16"), tmp_path / "native", quant=parse("q4_1"))
    _, params = load_params(tmp_path / "native")
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        assert is_mapped(value.unsafe_buffer_pointer(), tmp_path / "native/model.safetensors"), path


IMPORTS = """
from jaxchat.checkpoints.load import load_params
from jaxchat.checkpoints.write import convert
from jaxchat.quant import QuantFormat
"""
MEASURED = """
if sys.argv[1] == "convert":
    convert(sys.argv[2], sys.argv[3], quant=QuantFormat.parse("int4"))
else:
    params = load_params(sys.argv[2], quant="auto" if sys.argv[1] == "map" else QuantFormat.parse("int4"))[1]
"""


@needs_counters
def test_peak_memory_is_the_quantized_model_and_a_few_megabytes(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "llama", **LARGE)
    convert(tmp_path / "hf", tmp_path / "plain")
    assert (tmp_path / "hf/model.safetensors").stat().st_size > 90 << 20
    # A layer, and for each of a few threads what quantizing takes.
    working = 24
    assert added(IMPORTS, MEASURED, "convert", tmp_path / "hf", tmp_path / "int4") < working
    size = (tmp_path / "int4/model.safetensors").stat().st_size / 2**20
    assert size < 18  # of 120: 4.5 bits a weight
    assert added(IMPORTS, MEASURED, "load", tmp_path / "hf") < size + working
    assert added(IMPORTS, MEASURED, "load", tmp_path / "plain") < size + working
    assert added(IMPORTS, MEASURED, "map", tmp_path / "int4") < 12


# Onto meshes.


def test_codes_and_scales_are_split_as_the_weight_and_between_groups(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", "llama", hidden_size=128, intermediate_size=192)
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((1, 4), ("data", "model"), (AxisType.Auto, AxisType.Auto), devices=devices)
    fmt = parse("int4")
    convert(tmp_path / "hf", tmp_path / "native", quant=fmt)
    config, single = load_params(tmp_path / "hf", quant=fmt)

    def scores(params: Params, mesh: jax.sharding.Mesh | None) -> np.ndarray:
        session = Engine(config, params, kernels="reference", mesh=mesh).session()
        session.set_ids([1, 5, 7, 9, 4, 8])
        return session.score_rows([0])[0].logprobs

    expected = scores(single, None)
    for sharded in (
        load_params(tmp_path / "hf", quant=fmt, mesh=mesh)[1],
        load_params(tmp_path / "native", mesh=mesh)[1],
        shard_params(single, config, mesh),
    ):
        assert_same(single, sharded)
        specs = {key: {part.sharding.spec for part in jax.tree.leaves(sharded[key])} for key in sharded}
        assert specs["layers.q.weight"] == {PartitionSpec(None, "model", None)}
        assert specs["layers.o.weight"] == {PartitionSpec(None, None, "model")}  # a group of 32 a device
        assert specs["layers.down.weight"] == {PartitionSpec(None, None, None)}  # 6 groups, 4 devices
        assert specs["layers.up.weight"] == {PartitionSpec(None, "model", None)}
        assert sharded["layers.o.weight"].codes.addressable_shards[0].data.shape == (3, 128, 16)
        assert sharded["layers.o.weight"].scales.addressable_shards[0].data.shape == (3, 128, 1)
        np.testing.assert_allclose(scores(sharded, mesh), expected, atol=1e-4)


# The commands.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--src", "{tmp}/hf", "--quant", "int3"], "unknown quantization 'int3'"),
        (["--src", "{tmp}/hf", "--quant", "int4", "--format", "orbax"], "use --format native"),
        (["--src", "{tmp}/hf", "--dequantize"], "--dequantize needs --to_hf"),
        (["--src", "{tmp}/int4", "--to_hf", "--quant", "none"], "--quant cannot be combined with --to_hf"),
        (["--src", "{tmp}/int4", "--to_hf"], "add --dequantize"),
        (["--src", "{tmp}/int4", "--quant", "int8"], "holds int4 weights, not int8"),
        (["--src", "{tmp}/int4", "--quant", "none"], "holds int4 weights, not none"),
    ],
)
def test_wrong_conversions(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_hf(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "int4", quant=parse("int4"))
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert convert_tool.main(["convert", *given, "--dst", str(tmp_path / "x")]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same converted by the tool to int4."""
    root = tmp_path_factory.mktemp("chat")
    write_tiny_chat(root / "plain")
    arguments = ["--src", str(root / "plain"), "--dst", str(root / "int4"), "--quant", "int4"]
    assert convert_tool.main(["convert", *arguments]) == 0
    return root / "plain", root / "int4"


def test_quantizing_while_loading_gives_the_text_of_the_converted_model(
    chat_models: tuple[Path, Path], commands: Commands
) -> None:
    plain, int4 = chat_models
    common = ["-p", "hello", "--max_new_tokens", 8, "--ignore_eos", "--json", "--kernels", "reference"]
    at_load = commands.output("generate", "-m", plain, "--quant", "int4", *common)
    converted = commands.output("generate", "-m", int4, *common)
    ids = [json.loads(text)["token_ids"] for text in (at_load, converted)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 8


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (0, ["--quant", "int3"], "unknown quantization 'int3'"),
        (1, ["--quant", "int8"], "holds int4 weights, not int8"),
        (1, ["--quant", "none"], "holds int4 weights, not none"),
        (0, ["--kernels", "fast"], "expected auto, reference, native or pallas"),
        (0, ["--kernels", "pallas"], "--kernels pallas is not available on cpu"),
    ],
)
def test_wrong_flags_of_generate(
    chat_models: tuple[Path, Path],
    model: int,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["-m", str(chat_models[model]), "-p", "hello", *arguments]
    assert generate.main(["generate", *given]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1


def test_show_json_has_the_bytes_by_group(
    chat_models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["generate", "-m", str(chat_models[0]), "--show", "--quant", "int8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantization"] == "int8"
    sizes = report["quantized_bytes"]
    assert sizes.pop("total") == sum(sizes.values())


def test_kernels_and_dtypes_the_commands_know_are_those_there_are() -> None:
    from jaxchat.checkpoints.manifest import WEIGHT_DTYPES
    from jaxchat.pallas import backends

    assert model_flags.KERNELS == backends.NAMES
    assert tuple(WEIGHT_DTYPES) == model_flags.DTYPES


def test_format_for_is_what_loading_applies(tiny_directory: Directory) -> None:
    config, params = load_params(tiny_directory("mistral"), quant=parse("int4:128"))
    found = {n: v.format_name for n, v in params.items() if isinstance(v, QuantizedTensor)}
    from jaxchat.families import parameter_table

    expected = {p.name: format_for(p, parse("int4:128")) for p in parameter_table(config)}
    assert found == {
        n: str(dataclasses.replace(f, search=True)) for n, f in expected.items() if f is not None
    }
