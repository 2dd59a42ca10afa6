"""Matrix products over stacked weights on NVIDIA GPUs: Pallas kernels (Triton) for the few rows of decoding.

A decoding step is bound by reading weights. The kernels read one layer straight out of the stack, each weight
once, and multiply on the ordinary cores with float32 sums; the layer index is an operand, for Triton has no
prefetched scalars. More rows than `_MAX_ROWS` (prefill) are bound by arithmetic: there XLA's own product of
the dequantized layer serves. Checked against the reference in interpret mode and compiled ahead of time for
sm_90; NOT RUN ON HARDWARE YET, so the block sizes are reasoned, not tuned, and `--kernels auto` does not
choose them.

Triton, not Mosaic GPU: the same source runs under jax 0.10 and 0.11, and in the plain interpreter, where its
results can be checked without a GPU. JAX deprecates this backend from 0.11 on; the kernels use none of its
shared-memory or tensor-core features, so little of them would change with the backend.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxchat import quant
from jaxchat.config import Role
from jaxchat.errors import UsageError, option
from jaxchat.lengths import next_power_of_two
from jaxchat.pallas.stacked_matmul import reference
from jaxchat.quant import InParts, QuantizedTensor

Array = jax.Array

_MAX_ROWS = 8
"""Rows of x that the kernels multiply at once; each has its own accumulators in registers."""

_WEIGHTS_IN_FLIGHT = 8192
"""Bytes of weights a program reads in a step: 64 for each of its 128 threads.

By Little's law 4.8 TB/s at 0.7 us of latency take 25 kB in flight on each of an H200's 132 multiprocessors:
about four programs of four warps.
"""

_PROGRAMS = 4 * 132
"""Programs to aim at; a product with fewer rows of weights splits the contraction."""

_SCALES = ("scales", "mins", "super_scales", "super_mins")
_WARPS = 4
_UNIT = 4
"""Words that a thread reads at a time: 16 bytes, the widest load there is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTensor(InParts):
    """A quantized weight [..., O, I] with its codes as 32-bit words: the bytes of `QuantizedTensor`.

    Words, because Pallas computes offsets into arrays of up to 4 GiB in signed 32 bits, which bytes of the
    stacks of a 13B model overflow. Indexing gives dequantized rows: an embedding is looked up in this form.

    Attributes:
      words: int32 [..., O, W]: four 8-bit or eight 4-bit codes, the first in the lowest bits; of codes of 5
        and 6 bits, the low 4.
      high: None, or what is above those: int32 [..., O, Ip/32] or [..., O, Ip/16].
      scales, mins, super_scales, super_mins: as in `QuantizedTensor`.
      bits, group, columns: static, as there.
    """

    words: Array
    scales: Array
    mins: Array | None = None
    high: Array | None = None
    super_scales: Array | None = None
    super_mins: Array | None = None
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})

    def __getitem__(self, ids: Array) -> Array:
        """Rows `ids` [...] of a matrix, float32 [..., I]."""
        return quant.dequantize(_unpacked(jax.tree.map(lambda part: part[ids], self)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight this stands for: [..., O, I]."""
        return (*self.words.shape[:-1], self.columns)

    @property
    def codes_per_word(self) -> int:
        """J: 4 or 8."""
        return _codes_per_word(self.bits)


def _codes_per_word(bits: int) -> int:
    return 4 if bits == 8 else 8  # of 5 and 6 bits, the low 4


def prepare(value: Any, role: Role, tied: bool) -> Any:
    """A parameter in the kernels' layout: quantized weights become words, once.

    Args:
      value: array or QuantizedTensor, of jax arrays or, to compile ahead of time, ShapeDtypeStructs.
      role, tied: make no difference here.

    Raises:
      UsageError: it is spread over several GPUs.
    """
    for part in jax.tree.leaves(value):
        sharding = getattr(part, "sharding", None)
        if sharding is not None and len(sharding.device_set) > 1:
            raise UsageError(
                f"{option('kernels', 'pallas')} runs on one GPU; on several give "
                f"{option('kernels', 'reference')}"
            )
    return _in_words(value) if isinstance(value, QuantizedTensor) else value


def stacked_matmul(x: Array, w: Any, layer: Array | int, *, interpret: bool = False) -> Array:
    """`x @ w[layer].T`; the definition is `reference.stacked_matmul`.

    Args:
      x: [..., I], float32 or bfloat16.
      w: [L, O, I]: prepared, or of a float type.
      layer: int scalar, traced.
      interpret: for tests without a GPU.

    Returns:
      float32 [..., O].
    """
    rows = math.prod(x.shape[:-1])
    if rows > _MAX_ROWS or not (isinstance(w, PreparedTensor) or jnp.issubdtype(w.dtype, jnp.floating)):
        return reference.stacked_matmul(x, *_definition(w, layer))
    flat = x.reshape(rows, x.shape[-1]).astype(jnp.float32)
    product = _word_product if isinstance(w, PreparedTensor) else _float_product
    out = product(flat, w, jnp.asarray(layer, jnp.int32).reshape(1), interpret=interpret)
    return out.reshape(*x.shape[:-1], w.shape[-2])


# --- layout


def _in_words(q: QuantizedTensor) -> PreparedTensor:
    def regroup(q: QuantizedTensor) -> PreparedTensor:
        return PreparedTensor(
            words=_as_words(q.codes),
            high=None if q.high is None else _as_words(q.high),
            **{name: jnp.asarray(part) for name in _SCALES if (part := getattr(q, name)) is not None},
            bits=q.bits,
            group=q.group,
            columns=q.columns,
        )

    if not isinstance(q.codes, jax.ShapeDtypeStruct):
        return jax.jit(regroup)(q)
    shapes, sharding = jax.eval_shape(regroup, q), q.codes.sharding
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def _as_words(part: Any) -> Array:
    return lax.bitcast_convert_type(part.reshape(*part.shape[:-1], -1, 4), jnp.int32)


def _as_bytes(words: Array, kind: Any) -> Array:
    return lax.bitcast_convert_type(words, kind).reshape(*words.shape[:-1], -1)


def _unpacked(w: PreparedTensor) -> QuantizedTensor:
    """What `w` was made of; for an embedding's rows or one layer, not for a stack: it makes a copy."""
    return QuantizedTensor(
        codes=_as_bytes(w.words, jnp.int8 if w.bits == 8 else jnp.uint8),
        high=None if w.high is None else _as_bytes(w.high, jnp.uint8),
        **{name: getattr(w, name) for name in _SCALES},
        bits=w.bits,
        group=w.group,
        columns=w.columns,
    )


def _definition(w: Any, layer: Array | int) -> tuple[Any, Array | int]:
    """(stack, layer) for the reference: of prepared weights, a stack of the one layer."""
    if not isinstance(w, PreparedTensor):
        return w, layer
    one = jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, layer, 0), w)
    return _unpacked(one), 0


# --- products


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """How a product is cut up: program (i, j) does rows block i, and `steps` column blocks from j * steps on.

    Attributes:
      rows, columns: of the weight, in the units that the kernel counts columns in.
      row_block, column_block: powers of two, as Triton wants them; the edges are clamped or masked.
      splits, steps: parts of the contraction, and column blocks in each.
    """

    rows: int
    columns: int
    row_block: int
    column_block: int
    splits: int
    steps: int

    @classmethod
    def choose(cls, rows: int, columns: int, column_bytes: int, x_rows: int) -> "_Sizes":
        # With more rows of x there are more accumulators: the block shrinks in proportion beyond two.
        room = _WEIGHTS_IN_FLIGHT // column_bytes // max(next_power_of_two(x_rows) // 2, 1)
        row_block = 8 if x_rows <= 4 else 4
        column_block = min(max(room // row_block, 1), next_power_of_two(columns))
        blocks = -(-columns // column_block)
        splits = min(max(-(-_PROGRAMS // -(-rows // row_block)), 1), blocks)
        steps = -(-blocks // splits)
        return cls(
            rows=rows,
            columns=columns,
            row_block=row_block,
            column_block=column_block,
            splits=-(-blocks // steps),
            steps=steps,
        )

    @property
    def ragged(self) -> bool:
        """Whether the last column block reaches beyond the columns."""
        return self.splits * self.steps * self.column_block != self.columns

    def row_indices(self) -> Array:
        """Rows of this program, those beyond the last replaced by it: their results are cut off."""
        return jnp.minimum(pl.program_id(0) * self.row_block + jnp.arange(self.row_block), self.rows - 1)

    def column_indices(self, block: Array) -> tuple[Array, Array]:
        """Columns of a block, clamped like the rows, and which of them are there."""
        columns = block * self.column_block + jnp.arange(self.column_block)
        if not self.ragged:
            return columns, columns >= 0
        return jnp.minimum(columns, self.columns - 1), columns < self.columns


def _whole_blocks(x: Array) -> Array:
    """x [M, ...] with its rows padded to a power of two."""
    return jnp.pad(x, [(0, next_power_of_two(x.shape[0]) - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _call(kernel: Any, sizes: _Sizes, x: Array, w: Any, operands: tuple[Any, ...], interpret: bool) -> Array:
    """Runs a kernel over the grid and adds up the parts of the contraction: float32 [M, O]."""
    m, blocks = next_power_of_two(x.shape[0]), -(-sizes.rows // sizes.row_block)
    layer_bytes = w.nbytes // w.shape[0]
    parts = pl.pallas_call(
        functools.partial(kernel, sizes=sizes),
        grid=(blocks, sizes.splits),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY) for _ in operands],
        out_specs=pl.BlockSpec((1, m, sizes.row_block), lambda i, j: (j, 0, i)),
        out_shape=jax.ShapeDtypeStruct((sizes.splits, m, blocks * sizes.row_block), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * w.size // w.shape[0],
            bytes_accessed=layer_bytes + x.nbytes,
            transcendentals=0,
        ),
        interpret=interpret,
        name="stacked_matmul",
    )(*operands)
    return parts.sum(0)[: x.shape[0], : sizes.rows]


def _float_product(x: Array, w: Array, layer: Array, *, interpret: bool) -> Array:
    sizes = _Sizes.choose(w.shape[1], w.shape[2], w.dtype.itemsize, x.shape[0])
    return _call(_float_kernel, sizes, x, w, (layer, _whole_blocks(x), w), interpret)


def _float_kernel(layer_ref: Any, x_ref: Any, w_ref: Any, out_ref: Any, *, sizes: _Sizes) -> None:
    """x [M, I], w [L, O, I] -> out [1, M, rows of a block]."""
    layer, rows, first = layer_ref[0], sizes.row_indices(), pl.program_id(1) * sizes.steps
    m = jnp.arange(x_ref.shape[0])

    def step(i: Array, total: Array) -> Array:
        columns, there = sizes.column_indices(first + i)
        w = w_ref[layer, rows[:, None], columns[None, :]].astype(jnp.float32)
        x = jnp.where(there[None, :], x_ref[m[:, None], columns[None, :]], 0.0)
        return total + w[None] * x[:, None]

    total = jnp.zeros((len(m), sizes.row_block, sizes.column_block), jnp.float32)
    out_ref[0] = lax.fori_loop(0, sizes.steps, step, total).sum(2)


def _word_product(x: Array, w: PreparedTensor, layer: Array, *, interpret: bool) -> Array:
    units = w.words.shape[-1] // _UNIT
    sizes = _Sizes.choose(w.shape[1], units, 4 * _UNIT, x.shape[0])
    # x as the words have it: code j of word k of unit u meets x[:, j, u, k].
    padded = jnp.pad(x, ((0, 0), (0, w.words.shape[-1] * w.codes_per_word - x.shape[1])))
    turned = padded.reshape(x.shape[0], units, _UNIT, w.codes_per_word).transpose(0, 3, 1, 2)
    words = w.words.reshape(*w.words.shape[:-1], units, _UNIT)
    parts = {name: part for name in ("high", *_SCALES) if (part := getattr(w, name)) is not None}
    kernel = functools.partial(_word_kernel, names=tuple(parts), bits=w.bits)
    return _call(kernel, sizes, x, w, (layer, _whole_blocks(turned), words, *parts.values()), interpret)


def _word_kernel(
    layer_ref: Any, x_ref: Any, words_ref: Any, *refs: Any, sizes: _Sizes, names: tuple[str, ...], bits: int
) -> None:
    """x [M, J, U, 4], words [L, O, U, 4], parts by name as in `PreparedTensor` -> out [1, M, row block]."""
    *parts, out_ref = refs
    ref = dict(zip(names, parts, strict=True))
    layer, rows, first = layer_ref[0], sizes.row_indices(), pl.program_id(1) * sizes.steps
    word, m = jnp.arange(_UNIT), jnp.arange(x_ref.shape[0])
    affine = "mins" in ref

    def step(i: Array, total: Array) -> Array:
        units, there = sizes.column_indices(first + i)

        def at(name: str, columns: Array) -> Array:
            """Numbers of a part in columns [U or 1, 4 or 1] of each row: [rows, U, 4 or 1]."""
            return ref[name][layer, rows[:, None, None], columns[None]]

        groups = _group_of(units, word, ref["scales"].shape[-1], sizes.columns)

        def both_levels(inner: str, outer: str) -> Array:
            value = at(inner, groups).astype(jnp.float32)
            if outer in ref:
                per_outer = ref[inner].shape[-1] // ref[outer].shape[-1]
                value = value * at(outer, lax.div(groups, jnp.int32(per_outer))).astype(jnp.float32)
            return value[None]

        words = words_ref[layer, rows[:, None, None], units[None, :, None], word[None, None, :]]
        high = at("high", _high_word_of(units, word, bits)) if "high" in ref else None
        part = jnp.zeros_like(total)
        x_sum = jnp.zeros((len(m), 1, sizes.column_block, _UNIT), jnp.float32)
        for j in range(_codes_per_word(bits)):
            x = x_ref[m[:, None, None], j, units[None, :, None], word[None, None, :]]
            x = jnp.where(there[None, :, None], x, 0.0)[:, None]
            part = part + _code(words, high, word, j, bits, affine)[None] * x
            x_sum = x_sum + x
        total = total + part * both_levels("scales", "super_scales")
        return total + x_sum * both_levels("mins", "super_mins") if affine else total

    total = jnp.zeros((len(m), sizes.row_block, sizes.column_block, _UNIT), jnp.float32)
    out_ref[0] = lax.fori_loop(0, sizes.steps, step, total).sum(3).sum(2)


def _group_of(units: Array, word: Array, groups: int, columns: int) -> Array:
    """The group of scales of each unit [U, 1], or, where a unit has several, of each word [U, 4]."""
    if groups <= columns:
        return lax.div(units, jnp.int32(columns // groups))[:, None]
    several = groups // columns
    return units[:, None] * several + lax.div(word * several, jnp.int32(_UNIT))[None]


def _high_word_of(units: Array, word: Array, bits: int) -> Array:
    """Which word has the high bits: one for a unit, which is a run of `packing`, or one for two words."""
    return units[:, None] if bits == 5 else 2 * units[:, None] + lax.div(word, jnp.int32(2))[None]


def _code(words: Array, high: Array | None, word: Array, j: int, bits: int, affine: bool) -> Array:
    """Code j of each word [rows, U, 4], float32: as `QuantizedTensor` says what codes stand for."""
    if bits == 8 or (bits == 4 and not affine):  # two's complement
        code = lax.shift_right_arithmetic(words << (32 - bits * (j + 1)), jnp.int32(32 - bits))
        return code.astype(jnp.float32)
    code = lax.shift_right_logical(words, jnp.int32(4 * j)) & 15
    if high is not None:
        wide = bits - 4
        field = lax.rem(
            2 * word + j % 2, jnp.int32(8 // wide)
        )  # see `packing`: k = j // 2, v = word, i = j % 2
        shift = jnp.broadcast_to((8 * (j // 2) + wide * field)[None, None], words.shape)
        code = (
            code
            | (lax.shift_right_logical(jnp.broadcast_to(high, words.shape), shift) & ((1 << wide) - 1)) << 4
        )
        code = code if affine else code - (1 << (bits - 1))
    return code.astype(jnp.float32)
