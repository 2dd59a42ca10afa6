"""Writing a model as one GGUF file, with its layer plan baked in: layer by layer, under a temporary name.

What the configuration becomes is in `families/gguf_export.py`, the tokenizer in `text/tokenizer_to_gguf.py`,
blocks of quantized weights in `pallas/gguf_blocks`. The container is the library `gguf`'s.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxchat.checkpoints.gguf_storage import file_type_of
from jaxchat.checkpoints.load import Meter, Progress
from jaxchat.checkpoints.source import Source
from jaxchat.config import EMBED, HEAD, LAYERS, ModelConfig, Param
from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.families.gguf_export import GgufDescription
from jaxchat.families.gguf_tensors import place_of, rotated_heads
from jaxchat.files import replaced
from jaxchat.pallas.gguf_blocks import LAYOUTS, blocks_of
from jaxchat.quant import QuantizedTensor, Reordered, dequantize, quantize
from jaxchat.visible import shown

# --- which tensor becomes what


class _Tensor(NamedTuple):
    """A tensor of the file: one below the other, one layer's tensors of some parameters."""

    name: str
    parts: tuple[Param, ...]
    layer: int
    type: str  # ggml's name of its type
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = int(np.prod(self.shape))
        if self.type in LAYOUTS:
            return count // LAYOUTS[self.type].elements * LAYOUTS[self.type].bytes
        return count * _PLAIN[self.type].itemsize


_PLAIN: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_OF_DTYPE = {dtype: name for name, dtype in _PLAIN.items()}
_NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp takes for rows that blocks of 256 do not divide."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Which type each matrix gets: as llama.cpp's llama-quantize does (src/llama-quant.cpp).

    Attributes:
      base: of most.
      head: of the output head, which may be the embedding.
      special: name of a parameter or of a fused tensor -> type in a layer, of so many.
    """

    base: str
    head: str
    special: Mapping[str, Callable[[int, int], str]] = dataclasses.field(default_factory=dict)

    def type_of(self, name: str, layer: int, layers: int, width: int) -> str:
        """The type of a matrix whose rows have so many numbers."""
        found = self.special[name](layer, layers) if name in self.special else self.base
        return fitting(self.head if name == HEAD else found, width)


def fitting(name: str, width: int) -> str:
    """A type, or the nearest one whose blocks divide a row."""
    if name in LAYOUTS and width % LAYOUTS[name].elements:
        name = _NARROWER.get(name, "F16")
    return "F16" if name in LAYOUTS and width % LAYOUTS[name].elements else name


def _more_bits(base: str, more: str) -> Callable[[int, int], str]:
    """llama.cpp's `use_more_bits`: in the first and last eighth, and in each third layer between."""

    def choose(layer: int, layers: int) -> str:
        eighth = layers // 8
        return more if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2 else base

    return choose


def _medium(base: str, more: str, fused: str) -> dict[str, Callable[[int, int], str]]:
    rule = _more_bits(base, more)
    return {"v": rule, "down": rule, "attn_qkv": lambda layer, layers: fused}


def _small(base: str, more: str) -> dict[str, Callable[[int, int], str]]:
    return {
        "v": lambda layer, layers: more if layer < 4 else base,
        "down": lambda layer, layers: more if layer < layers // 8 else base,
    }


MIXTURES: Mapping[str, Mixture] = {
    "f32": Mixture("F32", "F32"),
    "f16": Mixture("F16", "F16"),
    "bf16": Mixture("BF16", "BF16"),
    "q8_0": Mixture("Q8_0", "Q8_0"),
    "q4_0": Mixture("Q4_0", "Q6_K"),
    "q4_1": Mixture("Q4_1", "Q6_K"),
    "q5_0": Mixture("Q5_0", "Q6_K"),
    "q5_1": Mixture("Q5_1", "Q6_K"),
    "q4_k_s": Mixture("Q4_K", "Q6_K", _small("Q4_K", "Q5_K")),
    "q4_k_m": Mixture("Q4_K", "Q6_K", _medium("Q4_K", "Q6_K", "Q5_K")),
    "q5_k_s": Mixture("Q5_K", "Q6_K"),
    "q5_k_m": Mixture("Q5_K", "Q6_K", _medium("Q5_K", "Q6_K", "Q6_K")),
    "q6_k": Mixture("Q6_K", "Q6_K"),
}
"""What `--to_gguf --quant` takes."""


def mixture_of(name: str | None) -> Mixture | None:
    """The mixture of a name; None of None.

    Raises:
      UsageError: there is none of that name.
    """
    if name is not None and name not in MIXTURES:
        raise UsageError(
            f"{option('quant')} is {shown(name)}; with {option('to_gguf')} it is one of {', '.join(MIXTURES)}"
        )
    return None if name is None else MIXTURES[name]


# --- writing


def write_gguf(
    source: Source,
    description: GgufDescription,
    words: Mapping[str, Any],
    dst: Path,
    *,
    quant: str | None,
    progress: Progress | None,
) -> None:
    """Writes the file.

    Args:
      source: of the weights, every layer in its place.
      description: of the configuration.
      words: the keys of the tokenizer.
      dst: the file.
      quant: a name in `MIXTURES`; None keeps what is stored.
      progress: called after every tensor.

    Raises:
      JaxchatError: GGUF has no type for what is stored, or a number is too large for its type.
    """
    import gguf  # a tenth of a second

    tensors = _tensors(source, description, mixture_of(quant))
    kinds = gguf.GGMLQuantizationType
    with replaced(dst) as temporary:
        writer = gguf.GGUFWriter(temporary, description.architecture.name)
        file_type = file_type_of(quant) if quant is not None else None
        metadata = {**description.metadata, "general.file_type": file_type, **words}
        for key, value in metadata.items():
            if value is not None and key != "general.architecture":  # which the library writes itself
                _add(writer, key, value)
        for name, values in description.factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for tensor in tensors:
            plain = _PLAIN.get(tensor.type, np.dtype(np.int8))  # of blocks, any that is not taken for bytes
            writer.add_tensor_info(tensor.name, tensor.shape, plain, tensor.nbytes, kinds[tensor.type])
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in description.factors.values():
            writer.write_tensor_data(values)
        meter = Meter(source, progress)
        meter.add(0)
        for tensor, data in _written(source, description, tensors, meter):
            if data.nbytes != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {data.nbytes} bytes, not {tensor.nbytes}")
            writer.write_tensor_data(data)
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType as Type

    kinds = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING, list: Type.ARRAY}
    item = None
    if isinstance(value, list):
        if not value:
            return
        item = kinds[type(value[0])] if type(value[0]) is not int else Type.INT32
    writer.add_key_value(key, value, kinds[type(value)], item)


def _tensors(source: Source, description: GgufDescription, mixture: Mixture | None) -> list[_Tensor]:
    config, found = source.config, []
    fused = {part: (name, parts) for name, parts in description.fused.items() for part in parts}
    by_name = {param.name: param for param in source.table}
    for param in source.table:
        stem, _, kind = param.layer_name.rpartition(".")
        group, first = fused.get(stem, (None, (stem,))) if param.per_layer else (None, (stem,))
        if stem != first[0]:
            continue  # written with the first of them
        parts = tuple(by_name[f"{LAYERS}{part}.{kind}"] for part in first) if group else (param,)
        for layer in range(param.rows(config)):
            place = place_of(param, layer, config, {})
            name = f"blk.{layer}.{group}.{kind}" if group else place.tensor
            shape = (sum(part.layer_shape(config)[0] for part in parts), *place.shape[1:])
            type_name = _type(source, parts, group or _called(param, config), layer, mixture)
            found.append(_Tensor(name, parts, layer, type_name, shape))
    return found


def _called(param: Param, config: ModelConfig) -> str:
    """A parameter's name for `Mixture`: an embedding that is also the head counts as that."""
    if param.name == EMBED and config.tied_embeddings:
        return HEAD
    return param.layer_name.rpartition(".")[0] if param.per_layer else param.name


def _type(source: Source, parts: Sequence[Param], called: str, layer: int, mixture: Mixture | None) -> str:
    param, config = parts[0], source.config
    if not param.quantizable:
        return "F32"
    if mixture is not None:
        return mixture.type_of(called, layer, config.num_layers, param.layer_shape(config)[-1])
    found = {_stored_type(source, part, layer) for part in parts}
    return found.pop() if len(found) == 1 else "F32"


def _stored_type(source: Source, param: Param, layer: int) -> str:
    """The type that holds a stored tensor exactly."""
    values = source.layer(param, layer)
    if isinstance(values, np.ndarray):
        return _OF_DTYPE[values.dtype]
    for name, layout in LAYOUTS.items():
        fmt = layout.format
        if isinstance(values, Reordered):
            break
        same = (fmt.bits, fmt.affine, fmt.two_level) == (values.bits, values.affine, values.two_level)
        if same and values.columns % layout.elements == 0 and values.group % layout.format.group == 0:
            half = values.two_level or values.scales.dtype == np.float16
            if half and not (values.bits == 8 and values.affine):
                return name
    raise UsageError(
        f"{param.name}: GGUF has no type for weights that are quantized as {values.format_name}; add "
        f"{option('dequantize')} and {option('quant', 'q8_0')} to quantize them again"
    )


def _written(
    source: Source, description: GgufDescription, tensors: Sequence[_Tensor], meter: Meter
) -> Iterator[tuple[_Tensor, np.ndarray]]:
    for tensor in tensors:
        pieces = []
        for param in tensor.parts:
            values = source.layer(param, tensor.layer)
            pieces.append(_rows(values, param, tensor, source.config, description))
            meter.add(values.nbytes)
        yield tensor, np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def _rows(
    values: Any, param: Param, tensor: _Tensor, config: ModelConfig, description: GgufDescription
) -> np.ndarray:
    """One parameter as the rows of its tensor: bytes of blocks, or numbers."""
    label = f"{param.name}[{tensor.layer}]"
    if tensor.type in LAYOUTS:
        fmt = LAYOUTS[tensor.type].format
        if not isinstance(values, QuantizedTensor) or not _holds(values, tensor.type):
            numbers = values if isinstance(values, np.ndarray) else dequantize(values)
            values = quantize(np.asarray(numbers, np.float32), fmt, name=label)
        rows = blocks_of(tensor.type, _in_groups(values, fmt.group))
    else:
        numbers = values if isinstance(values, np.ndarray) else dequantize(values)
        if param.role == "norm":
            numbers = numbers.astype(np.float32) + np.float32(description.architecture.norm_offset)
        rows = _converted(numbers, _PLAIN[tensor.type], label)
    heads = rotated_heads(param, config) if description.architecture.permuted else 0
    return np.ascontiguousarray(_in_pairs(rows, heads) if heads else rows)


def _holds(values: QuantizedTensor, type_name: str) -> bool:
    fmt = LAYOUTS[type_name].format
    half = values.two_level or values.scales.dtype == np.float16
    return half and (fmt.bits, fmt.affine, fmt.two_level) == (values.bits, values.affine, values.two_level)


def _in_groups(values: QuantizedTensor, group: int) -> QuantizedTensor:
    """The same weights with scales for smaller groups, repeated."""
    times = values.group // group
    if times == 1 or values.two_level:
        return values
    parts = {
        name: np.repeat(np.asarray(part), times, axis=-1)
        for name in ("scales", "mins")
        if (part := getattr(values, name)) is not None
    }
    columns = -(-values.columns // group) * group
    cut: dict[str, Any] = {name: part[..., : columns // group] for name, part in parts.items()}
    codes = values.codes[..., : columns * (2 if values.bits == 8 else 1) // 2]
    high = None if values.high is None else values.high[..., : columns * (values.bits - 4) // 8]
    return dataclasses.replace(values, **cut, codes=codes, high=high, group=group)


def _in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head in pairs of what is rotated together: the inverse of `unpermuted`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _converted(numbers: np.ndarray, dtype: np.dtype, label: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = numbers.astype(dtype)
    if dtype == np.float16 and (np.isinf(out) & ~np.isinf(numbers)).any():
        raise JaxchatError(f"{label}: a number is too large for float16 (largest 65504); give bf16")
    return out
