"""Llama in its makers' own files: Meta's `consolidated.*.pth`, and llama2.c's `.pt` and `.bin`. Needs no JAX.

All name the tensors alike, and store the rows of each query and key head in pairs that are rotated together.
Sources: meta-llama/llama (model.py, download.sh), karpathy/llama2.c (export.py, its versions 0 to 2).
"""

import abc
import functools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.checkpoints.open_file import OpenFile
from jaxchat.checkpoints.safetensors_file import DTYPES, SafetensorsFile
from jaxchat.checkpoints.torch_file import TorchFile
from jaxchat.config import MAX_LAYERS
from jaxchat.errors import JaxchatError
from jaxchat.files import read_json
from jaxchat.typed import INT32

PARAMS = "params.json"
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
NAMES: Mapping[str, str] = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attention.wq.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attention.wk.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attention.wv.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attention.wo.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.feed_forward.w1.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.feed_forward.w2.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.feed_forward.w3.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": OUTPUT,
}
"""Names in Hugging Face's layout -> here."""
_ADVICE = "download the file again, or take the model in Hugging Face's layout"


class LlamaFiles(abc.ABC):
    """A model's tensors by Meta's names.

    Attributes:
      where: names the files in messages.
      shapes: name -> shape of the whole tensor.
      config: the `config.json` of the model in Hugging Face's layout.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]

    @property
    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """See above."""

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """Of a tensor, as it is read."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A tensor."""

    def _count_layers(self) -> int:
        numbers = [int(name.split(".")[1]) for name in self.shapes if name.startswith("layers.")]
        return max(numbers, default=-1) + 1

    def _config(self, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
        """What shapes say, and the rest."""
        try:
            vocabulary, width = self.shapes[EMBEDDING]
            ffn = self.shapes["layers.0.feed_forward.w1.weight"][0]
        except (KeyError, ValueError):
            raise JaxchatError(f"{self.where}: holds no Llama; {_ADVICE}") from None
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": width,
            "intermediate_size": ffn,
            "vocab_size": vocabulary,
            "num_hidden_layers": self._count_layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": OUTPUT not in self.shapes,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            **more,
        }


def open_files(path: Path) -> LlamaFiles | None:
    """The files at a path, if they are of these layouts.

    Raises:
      JaxchatError: they are, and something is wrong with them.
    """
    if path.is_dir():
        return MetaFiles(path) if (path / PARAMS).exists() and _shards(path) else None
    if path.suffix.lower() in (".pt", ".pth"):
        file = TorchFile(path)
        return TorchLlama(file) if any(name.endswith(EMBEDDING) for name in file.entries) else None
    return BinFile(path) if path.suffix.lower() == ".bin" and _is_bin(path) else None


# --- Meta's


def _shards(directory: Path) -> list[Path]:
    found = sorted(directory.glob("consolidated*.pth")) or sorted(directory.glob("consolidated*.safetensors"))
    return [path for path in found if path.is_file()]


class MetaFiles(LlamaFiles):
    """A folder with `params.json` and as many files as GPUs the model was split over."""

    def __init__(self, directory: Path):
        self.where = str(directory)
        paths = _shards(directory)
        self._files = [SafetensorsFile(p) if p.suffix == ".safetensors" else TorchFile(p) for p in paths]
        self._values = read_json(directory / PARAMS)
        first = self._files[0].entries
        for path, file in zip(paths, self._files, strict=True):
            if file.entries.keys() != first.keys():
                raise JaxchatError(f"{path}: holds other tensors than {paths[0].name}; {_ADVICE}")
        names = [name for name in first if not name.endswith("rope.freqs")]
        self._axes = {name: self._axis(name) for name in names}
        self.shapes = {name: self._whole(name) for name in names}

    def _axis(self, name: str) -> int | None:
        """Along which a tensor is split; None where each file has all of it."""
        shape = self._files[0].entries[name].shape
        if len(self._files) == 1 or len(shape) < 2:
            return None
        if name == EMBEDDING:  # by columns in Llama 1 and 2, by rows in 3
            return 0 if shape[1] == self._number("dim") else 1
        return 1 if name.endswith((".wo.weight", ".w2.weight")) else 0

    def _whole(self, name: str) -> tuple[int, ...]:
        shape, axis = list(self._files[0].entries[name].shape), self._axes[name]
        if axis is not None:
            shape[axis] = sum(file.entries[name].shape[axis] for file in self._files)
        return tuple(shape)

    def _number(self, key: str, default: Any = None, kind: type = int) -> Any:
        found: Any = self._values.get(key, default)
        if type(found) not in (int, kind) or not 0 < found <= INT32:
            raise JaxchatError(
                f"{self.where}/{PARAMS}: {key} is {str(found)[:40]}; expected a number above 0; {_ADVICE}"
            )
        return found

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """See `LlamaFiles`."""
        heads = self._number("n_heads")
        values = self._config(
            heads,
            self._number("n_kv_heads", heads),
            rms_norm_eps=self._number("norm_eps", 1e-5, float),
            rope_theta=self._number("rope_theta", 10000.0, float),
            head_dim=self._number("head_dim", self._number("dim") // heads),
            max_position_embeddings=self._number(
                "max_seq_len", 8192 if "rope_theta" in self._values else 2048
            ),
        )
        if self._values.get("use_scaled_rope") is True:  # Llama 3.1 and later
            values |= {"max_position_embeddings": 131072, "rope_scaling": _LLAMA31}
        if "sliding_window" in self._values:
            values |= {"model_type": "mistral", "sliding_window": self._values["sliding_window"]}
        return values

    def dtype(self, name: str) -> np.dtype:
        """See `LlamaFiles`."""
        return DTYPES[self._files[0].entries[name].dtype]

    def read(self, name: str) -> np.ndarray:
        """See `LlamaFiles`."""
        axis = self._axes[name]
        parts = [file.read(name) for file in (self._files if axis is not None else self._files[:1])]
        return np.concatenate(parts, axis) if axis is not None else parts[0]


_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


# --- llama2.c's


class TorchLlama(LlamaFiles):
    """What llama2.c's train.py saves: the tensors, and the arguments of the model beside them."""

    def __init__(self, file: TorchFile):
        self._file, self.where = file, str(file.path)
        self._names = {name.removeprefix("_orig_mod."): name for name in file.entries}
        known = {pattern.split(".")[-2] for pattern in NAMES.values()}
        self._names = {n: full for n, full in self._names.items() if n.split(".")[-2:-1][0] in known}
        self.shapes = {name: file.entries[full].shape for name, full in self._names.items()}
        if self._is_copy():
            del self.shapes[OUTPUT]

    def _is_copy(self) -> bool:
        """Whether the output head is the embedding, saved twice."""
        entries = self._file.entries
        names = [self._names.get(name) for name in (EMBEDDING, OUTPUT)]
        return None not in names and entries[str(names[0])] == entries[str(names[1])]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """See `LlamaFiles`."""
        arguments = self._file.numbers("model_args")
        heads = arguments.get("n_heads")
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
            raise JaxchatError(
                f"{self.where}: its model_args say no number of heads (n_heads); a Llama in such a file is "
                "one that llama2.c has trained"
            )
        return self._config(
            heads,
            int(arguments.get("n_kv_heads") or heads),
            rms_norm_eps=arguments.get("norm_eps") or 1e-5,
            rope_theta=10000.0,
            max_position_embeddings=arguments.get("max_seq_len") or 2048,
        )

    def dtype(self, name: str) -> np.dtype:
        """See `LlamaFiles`."""
        return DTYPES[self._file.entries[self._names[name]].dtype]

    def read(self, name: str) -> np.ndarray:
        """See `LlamaFiles`."""
        return self._file.read(self._names[name])


_MAGIC = b"24ka"  # 0x616b3432 in little endian
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_HEADER = 256  # bytes, of versions 1 and 2


def _is_bin(path: Path) -> bool:
    """Whether a file is of llama2.c: by its first bytes or, of version 0, by sizes that fit its size."""
    try:
        with path.open("rb") as file:
            start = file.read(28)
    except OSError:
        return False
    return start.startswith(_MAGIC) or (
        len(start) == 28 and _Layout.of(path, start).size == path.stat().st_size
    )


class _Layout:
    """Where the tensors of a `.bin` are: name -> (shape, first byte); of version 2 matrices as int8."""

    def __init__(self, path: Path, version: int, fields: tuple[int, ...], shared: bool, group: int):
        self.fields = dict(zip(_FIELDS, fields, strict=True))
        self.version, self.group, self.places = version, group, dict[str, tuple[tuple[int, ...], int]]()
        self.size = _HEADER if version else 28
        if not all(0 < n <= INT32 for n in fields) or self.fields["n_layers"] > MAX_LAYERS:
            self.size = -1
            return
        dim, hidden, layers, heads, kv_heads, vocabulary, length = fields
        if dim % heads or heads % kv_heads:
            self.size = -1
            return
        kv_dim = dim // heads * kv_heads
        norms = ("attention_norm", "ffn_norm")
        matrices = {
            "attention.wq": (dim, dim), "attention.wk": (kv_dim, dim), "attention.wv": (kv_dim, dim),
            "attention.wo": (dim, dim), "feed_forward.w1": (hidden, dim), "feed_forward.w2": (dim, hidden),
            "feed_forward.w3": (hidden, dim),
        }  # fmt: skip
        if version == 0:
            self._add(EMBEDDING, (vocabulary, dim))
            order = [norms[0], *list(matrices)[:4], norms[1], *list(matrices)[4:]]
            for name in order:
                for layer in range(layers):
                    self._add(f"layers.{layer}.{name}.weight", matrices.get(name, (dim,)))
            self._add("norm.weight", (dim,))
            self.size += 4 * length * (dim // heads)  # tables of cosines and sines
        else:
            for name in norms:
                for layer in range(layers):
                    self._add(f"layers.{layer}.{name}.weight", (dim,))
            self._add("norm.weight", (dim,))
            self._add(EMBEDDING, (vocabulary, dim))
            for name, shape in matrices.items():
                for layer in range(layers):
                    self._add(f"layers.{layer}.{name}.weight", shape)
        if not shared:
            self._add(OUTPUT, (vocabulary, dim))

    @classmethod
    def of(cls, path: Path, start: bytes) -> "_Layout":
        """Reads the beginning of a file."""
        if not start.startswith(_MAGIC):
            fields = struct.unpack("<7i", start[:28])
            *others, vocabulary, length = fields
            return cls(path, 0, (*others, abs(vocabulary), length), vocabulary > 0, 0)
        if len(start) < 41:
            return cls(path, 1, (0,) * 7, True, 0)
        (version,) = struct.unpack("<i", start[4:8])
        group = struct.unpack("<i", start[37:41])[0] if version == 2 else 0
        return cls(path, version, struct.unpack("<7i", start[8:36]), bool(start[36]), group)

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        self.places[name] = (shape, self.size)
        self.size += self.bytes_of(shape)

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Of a tensor of this shape."""
        count = math.prod(shape)
        if self.version < 2 or len(shape) == 1:
            return 4 * count
        return count + 4 * (count // self.group) if self.group > 0 else 0


class BinFile(LlamaFiles):
    """llama2.c's own file, of its versions 0, 1 and 2: float32, or bytes with a scale for a few of them."""

    def __init__(self, path: Path):
        self.where = str(path)
        try:
            self._file = OpenFile(path, _ADVICE)
            start = self._file.file.read(64)
        except OSError as error:
            raise JaxchatError(f"{path}: cannot be read ({error.strerror or error})") from None
        layout = self._layout = _Layout.of(path, start)
        if layout.version not in (0, 1, 2):
            raise JaxchatError(f"{path}: is of llama2.c's version {layout.version}; expected 0, 1 or 2")
        if layout.version == 2 and any(
            layout.group < 1 or math.prod(shape) % layout.group
            for shape, _ in layout.places.values()
            if len(shape) > 1
        ):
            raise JaxchatError(
                f"{path}: groups of {layout.group} weights do not divide its tensors; {_ADVICE}"
            )
        if layout.size != self._file.size:
            raise JaxchatError(
                f"{path}: is {self._file.size:,} bytes long, and its header says {layout.size:,}; {_ADVICE}"
            )
        self.shapes = {name: shape for name, (shape, _) in layout.places.items()}

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """See `LlamaFiles`."""
        fields = self._layout.fields
        return self._config(
            fields["n_heads"],
            fields["n_kv_heads"],
            rope_theta=10000.0,
            max_position_embeddings=fields["max_seq_len"],
        )

    def dtype(self, name: str) -> np.dtype:
        """See `LlamaFiles`."""
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        """See `LlamaFiles`; bytes as the numbers that they stand for."""
        shape, first = self._layout.places[name]
        raw = np.empty(self._layout.bytes_of(shape), np.uint8)
        self._file.read(raw, first)
        if self._layout.version < 2 or len(shape) == 1:
            return raw.view("<f4").reshape(shape)
        count = math.prod(shape)
        scales = raw[count:].copy().view("<f4")
        codes = raw[:count].view(np.int8).reshape(len(scales), -1)
        return (codes.astype(np.float32) * scales[:, None]).reshape(shape)
