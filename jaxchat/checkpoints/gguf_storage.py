"""How the tensors of a GGUF file are held in memory: which types keep their bits, and what becomes of others.

As words, needing no JAX; the weights are read in `gguf.py`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from jaxchat.checkpoints.gguf_file import GgufEntry, GgufFile
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES, Keep, Manifest, Quantization
from jaxchat.config import ModelConfig, Param
from jaxchat.families import count_parameters
from jaxchat.families.gguf import Architecture
from jaxchat.families.gguf_tensors import Place, place_of, scale_of

KEPT: Mapping[str, str] = {
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q8_0": "q8_0",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
    "Q6_K": "q6_k",
}
"""Types whose codes and scales are a format of ours, bit for bit."""

_NEAREST: Mapping[str, str] = {
    "Q8_1": "q8_0",
    "Q8_K": "q8_0",
    "IQ4_NL": "q5_k",
    "IQ4_XS": "q5_k",
    "MXFP4": "q5_k",
    "NVFP4": "q5_k",
}
"""What other quantized types are quantized to again: the smallest format that is finer than they are."""
_FEWEST = "q4_k"

_FILE_TYPES: Mapping[int, str] = {
    2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k", 11: "q3_k_s", 12: "q3_k_m",
    13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s", 17: "q5_k_m", 18: "q6_k", 19: "iq2_xxs",
    20: "iq2_xs", 21: "q2_k_s", 22: "iq3_xs", 23: "iq3_xxs", 24: "iq1_s", 25: "iq4_nl", 26: "iq3_s",
    27: "iq3_m", 28: "iq2_s", 29: "iq2_m", 30: "iq4_xs", 31: "iq1_m", 36: "tq1_0", 37: "tq2_0", 38: "mxfp4",
}  # fmt: skip
"""`general.file_type` -> what people call such a file (llama.cpp's `llama_ftype`)."""


def file_type_of(name: str) -> int | None:
    """`general.file_type` of a mixture by its name; None where it has no number."""
    plain = {"f32": 0, "f16": 1, "bf16": 32}
    return next((number for number, found in _FILE_TYPES.items() if found == name), plain.get(name))


def dtype_of(entry: GgufEntry) -> str:
    """The dtype in which a tensor's numbers are handed on: its own of plain 16 bits, else float32."""
    own = entry.type.dtype
    return own.name if own is not None and own.name in WEIGHT_DTYPES else "float32"


def described(
    file: GgufFile, config: ModelConfig, table: Iterable[Param], architecture: Architecture, keep: Keep
) -> Manifest:
    """What the model is once it is loaded."""
    table = tuple(table)
    held = {param.name: _rows(file, param, config, keep) for param in table}
    quantized = {name: rows for name, rows in held.items() if not all(row in WEIGHT_DTYPES for row in rows)}
    quantization = None
    if quantized:
        formats = Counter(row for rows in quantized.values() for row in rows)
        label = _FILE_TYPES.get(file.metadata.get("general.file_type", -1), formats.most_common(1)[0][0])
        spelled = {name: rows[0] if len(set(rows)) == 1 else rows for name, rows in quantized.items()}
        quantization = Quantization(label, spelled)
    plain = {param.name: _plain_dtype(file, param, table, config, architecture) for param in table}
    return Manifest(
        format="native",
        dtypes={name: "float32" if name in quantized else dtype for name, dtype in plain.items()},
        tied_head="absent" if config.tied_embeddings else "untied",
        source=file.path.name,
        parameters=count_parameters(config),
        quantization=quantization,
    )


def changed(file: GgufFile, config: ModelConfig, table: Iterable[Param], keep: Keep) -> dict[str, str]:
    """Types of the file that are not held as they are -> what they become."""
    found = {}
    for param in table:
        for index, row in enumerate(_rows(file, param, config, keep)):
            entry = file.entries[place(file, param, index, config).tensor]
            if entry.type.dtype is None and entry.type.name not in KEPT:
                found[entry.type.name] = row
    return found


def place(file: GgufFile, param: Param, index: int, config: ModelConfig) -> Place:
    """Where a parameter is in a file."""
    return place_of(param, index, config, file.entries)


def _rows(file: GgufFile, param: Param, config: ModelConfig, keep: Keep) -> list[str]:
    """How each layer of a parameter is held: a format, or a dtype."""
    places = [place(file, param, index, config) for index in range(param.rows(config))]
    return [_held(file, param, found.tensor, keep) for found in places]


def _held(file: GgufFile, param: Param, tensor: str, keep: Keep) -> str:
    entry = file.entries[tensor]
    scaled = scale_of(tensor) in file.entries  # by a number beside, which no format has a place for
    if entry.type.dtype is not None or not param.quantizable:
        return dtype_of(entry)
    if entry.type.name in KEPT and not scaled:
        return KEPT[entry.type.name]
    return "float32" if keep == "exact" else _NEAREST.get(entry.type.name, _FEWEST)


def _plain_dtype(
    file: GgufFile, param: Param, table: tuple[Param, ...], config: ModelConfig, architecture: Architecture
) -> str:
    """That of all layers, and of all parts of what is fused in Hugging Face's layout: the widest."""
    together = [other for other in table if other.hf == param.hf]
    places = [place(file, p, i, config) for p in together for i in range(p.rows(config))]
    found = {dtype_of(file.entries[place.tensor]) for place in places}
    scaled = any(scale_of(place.tensor) in file.entries for place in places)
    plain = len(found) == 1 and not scaled and not is_shifted(param, architecture)
    return found.pop() if plain else "float32"


def is_shifted(param: Param, architecture: Architecture) -> bool:
    """Whether a number was added to what Hugging Face's layout has."""
    return param.role == "norm" and architecture.norm_offset != 0
