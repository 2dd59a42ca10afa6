"""Quantized weights: formats, layout, error bounds, the search, exactness against the `gguf` package."""

import math
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax import lax

from jaxchat import quant
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table, read_config
from jaxchat.quant import QuantFormat, dequantize, quantize, unpack_codes
from tests.support.tiny import TINY_CONFIGS

FORMATS = [
    f"int{bits}{group}{affine}{plain}{wide}"
    for bits in (8, 4)
    for group in ("", ":64", ":128", ":channel")
    for affine in ("", ":affine")
    for plain in ("", ":plain")
    for wide in ("", ":f32")
]
FORMATS += ["int5", "int5:64:affine", "int5:channel", "int5:plain:f32", "q4_k", "q5_k", "q6_k"]
SEARCHED = [text for text in FORMATS if "plain" not in text and "_k" not in text]


def parse(text: str) -> QuantFormat:
    fmt = QuantFormat.parse(text)
    assert fmt is not None
    return fmt


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def group_sums(values: np.ndarray, group: int) -> np.ndarray:
    """Sums [..., Ip/G] of values [..., I] by group."""
    return np.add.reduceat(values.astype(np.float64), np.arange(0, values.shape[-1], group), axis=-1)


def per_weight(q: quant.QuantizedTensor, parameter: np.ndarray) -> np.ndarray:
    """A group parameter [..., Ip/G] repeated for each weight, [..., I], float64."""
    return np.repeat(parameter.astype(np.float64), q.group, axis=-1)[..., : q.columns]


def signal_to_noise_db(w: np.ndarray, fmt: str) -> float:
    noise = dequantize(quantize(w, parse(fmt), name="w")) - w
    return 10 * math.log10(np.square(w, dtype=np.float64).sum() / np.square(noise, dtype=np.float64).sum())


# Formats


def test_format_names_mean_what_they_say():
    assert parse("int8") == QuantFormat(bits=8, group=32, affine=False, search=True, scale_dtype="float16")
    assert parse("int4:128:affine").group == 128
    assert parse("int4:128:affine").affine
    assert parse("int8:channel").group == 0
    assert parse("q4_0") == parse("int4:plain")
    assert QuantFormat.parse("none") is None


@pytest.mark.parametrize("text", FORMATS)
def test_printing_and_parsing_a_format_round_trips(text):
    fmt = parse(text)
    assert QuantFormat.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    "text", ["", "int3", "int4:", "int4:48", "int4:32:64", "int8:32:32", "q4_0:64", "INT4"]
)
def test_an_unknown_format_is_an_error_that_lists_the_forms(text):
    with pytest.raises(UsageError, match=r"int5 or int4.*:channel"):
        QuantFormat.parse(text)


def test_norms_stay_and_embedding_and_head_get_8_bits_under_int4():
    config = read_config({"model_type": "llama", **TINY_CONFIGS["llama"]})
    formats = {p.name: str(quant.format_for(p, parse("int4:64"))) for p in parameter_table(config)}
    assert formats["layers.q.weight"] == "int4:64"
    assert formats["embed.weight"] == formats["lm_head.weight"] == "int8:64"
    assert formats["norm.weight"] == formats["layers.attn_norm.weight"] == "None"


def test_every_family_quantizes_matrices_only_and_never_positions():
    for model_type, hf in TINY_CONFIGS.items():
        for p in parameter_table(read_config({"model_type": model_type, **hf})):
            fmt = quant.format_for(p, parse("int8"))
            keeps = p.name.endswith((".bias", "norm.weight")) or p.name == "positions.weight"
            assert fmt == (None if keeps else parse("int8")), p.name
            assert quant.format_for(p, None) is None


# Layout and size


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", [(5, 64), (3, 5, 172), (2, 3, 4, 33), (1, 1), (2, 700)])
def test_any_leading_axes_and_any_number_of_columns(text, shape):
    fmt = parse(text)
    q = quantize(normal(*shape), fmt, name="w")
    group = fmt.group or math.ceil(shape[-1] / 32) * 32
    unit = 256 if fmt.two_level else group
    groups = math.ceil(shape[-1] / unit) * unit // group
    assert q.shape == shape
    assert q.ndim == len(shape)
    packed = [part for part in (q.codes, q.high) if part is not None]
    assert sum(part.shape[-1] for part in packed) == groups * group * fmt.bits // 8
    assert q.codes.shape[:-1] == shape[:-1]
    assert q.scales.shape == (*shape[:-1], groups)
    assert (q.mins is not None) == q.affine == fmt.affine
    assert dequantize(q).shape == shape
    assert dequantize(q).dtype == np.float32
    assert not unpack_codes(q)[..., shape[-1] :].any(), "padding codes are 0"
    assert quant.QuantFormat.parse(q.format_name).bits == fmt.bits


def test_four_bits_are_counted_as_four_bits():
    # 64 * 128 codes; 4 scales of 2 bytes a row.
    assert quantize(normal(64, 128), parse("int4"), name="w").nbytes == 64 * 128 // 2 + 64 * 4 * 2
    assert quantize(normal(64, 128), parse("int8:128:affine"), name="w").nbytes == 64 * 128 + 64 * 2 * 2
    abstract = jax.eval_shape(
        lambda: jax.tree.map(jnp.asarray, quantize(normal(2, 32), parse("int4"), name="w"))
    )
    assert abstract.nbytes == 2 * 16 + 2 * 2


def test_packed_codes_are_int4_in_jax_memory_order():
    q = quantize(normal(6, 96), parse("int4"), name="w")
    as_int4 = lax.bitcast_convert_type(jnp.asarray(q.codes), jnp.int4)
    np.testing.assert_array_equal(as_int4.reshape(6, 96).astype(jnp.int8), unpack_codes(q))
    assert set(np.unique(unpack_codes(q))) <= set(range(-8, 8))


def test_symmetric_8_bit_codes_never_hold_minus_128():
    for text in ("int8", "q8_0", "int8:channel"):
        assert unpack_codes(quantize(normal(64, 256), parse(text), name="w")).min() == -127


@pytest.mark.parametrize("text", ["int4:affine", "int8:affine"])
def test_min_is_the_value_of_code_0(text):
    q = quantize(normal(4, 64) + 3, parse(text), name="w")
    codes = unpack_codes(q).astype(np.float64)
    np.testing.assert_allclose(
        codes * per_weight(q, q.scales) + per_weight(q, q.mins), dequantize(q), rtol=1e-6
    )
    assert codes.min() == (0 if q.bits == 4 else -128)
    assert codes.max() == (15 if q.bits == 4 else 127)


# Accuracy


@pytest.mark.parametrize("text", FORMATS)
def test_every_weight_is_rounded_to_the_nearest_value_of_its_grid(text):
    fmt = parse(text)
    w = normal(16, 172) * 0.03
    q = quantize(w, fmt, name="w")
    low, high = fmt.code_range
    scale = per_weight(q, quant.group_scales(q))
    offset = per_weight(q, quant.group_mins(q)) if q.affine else 0.0
    ends = np.sort([low * scale + offset, high * scale + offset], axis=0)
    clipped = np.maximum(0, np.maximum(ends[0] - w, w - ends[1]))
    # Plain codes are rounded before the scale is, as ggml does: its float16 rounding adds up to 2^-11 a step.
    slack = 1e-6 + (0 if fmt.search else 2**-11 * (high - low) + 2e-3)
    assert (np.abs(dequantize(q) - w) <= np.abs(scale) * (0.5 + slack) + clipped + 1e-7).all()


@pytest.mark.parametrize("text", SEARCHED)
def test_the_search_is_never_worse_than_plain_rounding_in_any_group(text):
    rng = np.random.default_rng(7)
    w = np.concatenate([normal(32, 172), rng.laplace(size=(32, 172)), rng.uniform(-1, 2, (32, 172))])
    w = w.astype(np.float32) * 0.02
    searched, plain = (quantize(w, parse(t), name="w") for t in (text, f"{text}:plain"))
    errors = [group_sums(np.square(dequantize(q) - w), q.group) for q in (searched, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-4) + 1e-12).all()
    assert errors[0].sum() < errors[1].sum()


def test_signal_to_noise_on_normal_weights():
    w = normal(256, 1024) * 0.02
    assert signal_to_noise_db(w, "int4") > signal_to_noise_db(w, "q4_0") + 0.4
    assert signal_to_noise_db(w, "int4:channel") > signal_to_noise_db(w, "int4:channel:plain") + 1.2
    assert signal_to_noise_db(w, "int8") > signal_to_noise_db(w, "q8_0") + 0.5
    assert signal_to_noise_db(w, "int4") > 21.7


def test_an_offset_pays_on_skewed_weights():
    w = np.random.default_rng(3).exponential(size=(64, 256)).astype(np.float32) + 0.5
    for text in ("int4", "int4:128", "int8:channel"):
        assert signal_to_noise_db(w, f"{text}:affine") > signal_to_noise_db(w, text) + 3


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (3, 45), elements=st.floats(-1000, 1000, width=32)),
    st.sampled_from(FORMATS),
)
def test_any_finite_weights_come_back_within_their_group_s_range(w, text):
    d = dequantize(quantize(w, parse(text), name="w"))
    assert np.isfinite(d).all()
    largest = np.abs(w).max(-1, keepdims=True)
    assert (np.abs(d - w) <= largest * 0.52 + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["q8_0", "q4_0", "int8:64:plain", "int4:channel:plain"]))
def test_plain_rounding_is_idempotent(seed, text):
    w = normal(3, 172, seed=seed) * 10.0 ** -(seed % 4)
    q = quantize(w, parse(text), name="w")
    again = quantize(dequantize(q), parse(text), name="w")
    np.testing.assert_array_equal(again.codes, q.codes)
    np.testing.assert_array_equal(again.scales, q.scales)


@pytest.mark.parametrize("text", FORMATS)
def test_groups_of_zeros_have_scale_0_and_come_back_as_zeros(text):
    w = normal(4, 256)
    w[:, :128] = 0
    w[2] = 0
    q = quantize(w, parse(text), name="w")
    assert not q.scales[2].any()
    assert not dequantize(q)[2].any()
    if parse(text).group and not parse(text).two_level:
        assert not q.scales[:, : 128 // q.group].any()
        assert not dequantize(q)[:, :128].any()


@pytest.mark.parametrize("text", ["int4:affine", "int8:affine", "q4_1", "int8", "int4"])
def test_a_constant_group_and_tiny_values_survive(text):
    np.testing.assert_allclose(
        dequantize(quantize(np.full((2, 64), 0.7), parse(text), name="w")), 0.7, rtol=1e-3
    )
    assert np.abs(dequantize(quantize(np.full((2, 64), 1e-42), parse(text), name="w"))).max() < 1e-6


# Exactness against ggml's own Python package


def gguf_codes_and_parameters(w: np.ndarray, kind: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """`gguf`'s codes, one a byte in the order of the weights, and its float16 d (and m), [..., I/32]."""
    gguf = pytest.importorskip("gguf")
    from gguf import quants

    kind_parameters = {"q8_0": 1, "q4_0": 1, "q4_1": 2}[kind]
    raw = quants.quantize(w, gguf.GGMLQuantizationType[kind.upper()])
    blocks = raw.reshape(*w.shape[:-1], w.shape[-1] // 32, -1)
    parameters = [
        blocks[..., 2 * i : 2 * i + 2].copy().view(np.float16)[..., 0] for i in range(kind_parameters)
    ]
    codes = blocks[..., 2 * kind_parameters :]
    if kind != "q8_0":  # low nibbles are a block's first 16 weights, high nibbles its last 16
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
    codes = codes.view(np.int8) - np.int8(8 if kind == "q4_0" else 0)
    return codes.reshape(w.shape), parameters


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("factor", [1.0, 1e-3, 3e-6, 200.0])
def test_compatible_formats_equal_gguf_bit_for_bit(kind, factor):
    w = normal(2, 96, 320, seed=5) * np.float32(factor)
    w[0, 3, :32] = 0
    w[0, 4, 32:64] = np.float32(factor) / 4
    w[0, 5, :64] = np.tile([1, -1, 0.5, -0.5], 16) * np.float32(factor)  # ties of magnitude and of rounding
    w[1] = np.round(w[1] / np.float32(factor) * 8) / 8 * np.float32(factor)
    q = quantize(w, parse(kind), name="w")
    codes, parameters = gguf_codes_and_parameters(w, kind)
    np.testing.assert_array_equal(unpack_codes(q), codes)
    ours = [q.scales] if q.mins is None else [q.scales, q.mins]
    for mine, theirs in zip(ours, parameters, strict=True):
        np.testing.assert_array_equal(mine.view(np.uint16), theirs.view(np.uint16))


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float16, (2, 64), elements=st.floats(-8, 8, width=16)),
    st.sampled_from(["q8_0", "q4_0", "q4_1"]),
)
def test_compatible_formats_equal_gguf_on_adversarial_values(w, kind):
    w = w.astype(np.float32)
    q = quantize(w, parse(kind), name="w")
    codes, parameters = gguf_codes_and_parameters(w, kind)
    np.testing.assert_array_equal(unpack_codes(q), codes)
    np.testing.assert_array_equal(q.scales, parameters[0])


# Input


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_every_float_type_quantizes_like_its_float32_values(dtype):
    w = normal(8, 96).astype(dtype)
    q = quantize(w, parse("int4"), name="w")
    expected = quantize(w.astype(np.float32), parse("int4"), name="w")
    jax.tree.map(np.testing.assert_array_equal, q, expected)


def test_uint16_is_bfloat16_bits_only_when_said_so():
    w = normal(8, 96).astype(ml_dtypes.bfloat16)
    q = quantize(w.view(np.uint16), parse("int4"), name="w", bfloat16_bits=True)
    jax.tree.map(np.testing.assert_array_equal, q, quantize(w, parse("int4"), name="w"))
    with pytest.raises(JaxchatError, match="head: cannot quantize uint16"):
        quantize(w.view(np.uint16), parse("int4"), name="head")
    with pytest.raises(JaxchatError, match="head: cannot quantize float32"):
        quantize(normal(2, 32), parse("int4"), name="head", bfloat16_bits=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("text", ["int4", "q8_0", "int8:channel:affine"])
def test_nan_and_infinity_are_errors_naming_the_tensor(bad, text):
    w = normal(40, 4096).astype(ml_dtypes.bfloat16)
    w[37, 4001] = bad
    with pytest.raises(JaxchatError, match=r"layers\.q\.weight: holds NaN or infinite"):
        quantize(w, parse(text), name="layers.q.weight")


def test_weights_beyond_float16_scales_are_an_error_with_a_way_out():
    w = normal(2, 32) * 1e8
    with pytest.raises(JaxchatError, match=r"w: .*append :f32"):
        quantize(w, parse("int8"), name="w")
    assert np.isfinite(dequantize(quantize(w, parse("int8:f32"), name="w"))).all()


def test_vectors_and_integers_are_errors_naming_the_tensor():
    with pytest.raises(JaxchatError, match="norm: only matrices"):
        quantize(normal(8), parse("int8"), name="norm")
    with pytest.raises(JaxchatError, match="ids: cannot quantize int32"):
        quantize(np.ones((2, 32), np.int32), parse("int8"), name="ids")


# Streaming


@pytest.mark.parametrize("text", ["int4", "int8:channel", "int4:128:affine"])
def test_a_stack_filled_layer_by_layer_equals_the_stack_quantized_at_once(text):
    w = normal(3, 70, 172)
    stack = quant.empty(w.shape, parse(text))
    for layer in range(3):
        quantize(w[layer], parse(text), name="w", out=quant.layer_slice(stack, layer))
    jax.tree.map(np.testing.assert_array_equal, stack, quantize(w, parse(text), name="w"))


def test_the_result_does_not_depend_on_threads_or_memory_order():
    w = normal(300, 520)
    one = quantize(w, parse("int4"), name="w", threads=1)
    for other in (
        quantize(w, parse("int4"), name="w", threads=3),
        quantize(np.asfortranarray(w), parse("int4"), name="w"),
    ):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("text", ["int4", "int8:channel"])
def test_beside_the_output_quantizing_takes_a_few_megabytes(text):
    w = normal(1024, 2048).astype(ml_dtypes.bfloat16).T  # a transposed view is not copied either
    out = quant.empty(w.shape, parse(text))
    tracemalloc.start()
    quantize(w, parse(text), name="w", out=out, threads=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6


# In jax


@pytest.mark.parametrize("text", FORMATS)
def test_a_layer_of_a_stack_dequantizes_under_jit_to_what_numpy_gives(text):
    q = quantize(normal(3, 5, 172), parse(text), name="w")
    expected = dequantize(q)
    device = jax.tree.map(jnp.asarray, q)

    @jax.jit
    def layer(q: quant.QuantizedTensor, index: jax.Array) -> jax.Array:
        return dequantize(quant.layer_slice(q, index))

    for index in range(3):
        # Affine: XLA may fuse the multiplication and the addition, which rounds once instead of twice.
        np.testing.assert_allclose(
            layer(device, index), expected[index], rtol=0, atol=1e-6 if q.affine else 0
        )
    assert layer._cache_size() == 1


def test_a_tensor_is_a_pytree_with_static_format():
    q = quantize(normal(2, 64), parse("int4:64"), name="w")
    leaves, tree = jax.tree.flatten(q)
    assert [leaf.dtype for leaf in leaves] == [np.uint8, np.float16]
    back = jax.tree.unflatten(tree, leaves)
    assert (back.bits, back.group, back.columns, back.mins) == (4, 64, 64, None)
    assert jax.tree.structure(quantize(normal(2, 64), parse("int4"), name="w")) != tree
    passed = jax.jit(lambda q: q)(q)
    assert passed.shape == (2, 64)
    np.testing.assert_array_equal(passed.codes, q.codes)


def test_embedding_rows_are_rows_of_the_dequantized_table():
    q = quantize(normal(67, 24), parse("int8"), name="embed")
    ids = np.array([[0, 66, 5], [5, 5, 1]])
    np.testing.assert_array_equal(quant.rows(q, ids), dequantize(q)[ids])
    device = jax.tree.map(jnp.asarray, q)
    np.testing.assert_array_equal(jax.jit(quant.rows)(device, ids), dequantize(q)[ids])
