"""What a model's directory may hold that is not read here, told in one line: other formats and quantizations.

Knows names only: of files, of `config.json`'s keys, of tensors. Opens nothing.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxchat.errors import JaxchatError, option

_ORIGINAL = "not read; take the model's original *.safetensors files"
_TORCH = "not read; convert it to safetensors with transformers' save_pretrained"
_FORMATS = {
    ".gguf": "of the format GGUF, which is read if you give the file itself",
    ".ggml": f"of the format GGML, {_ORIGINAL}, or a GGUF file",
    ".onnx": f"of the format ONNX, {_ORIGINAL}",
    ".bin": f"a file of PyTorch's, {_TORCH}",
    ".pth": f"a file of PyTorch's, without Meta's params.json beside it {_TORCH}",
    ".pt": f"a file of PyTorch's, if it is llama2.c's give the file itself; any other is {_TORCH}",
    ".h5": f"a file of TensorFlow's, {_ORIGINAL}",
    ".msgpack": f"a file of Flax', {_ORIGINAL}",
}
QUANTIZATION_KEYS = ("quantization_config", "quantization")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def advice_on(path: Path) -> str | None:
    """What a file is that is no model directory, and what to do; None where its name tells nothing."""
    return _FORMATS.get(path.suffix.lower())


def found_in(directory: Path) -> str | None:
    """A file of another format in a directory, and what to do; None if there is none."""
    for suffix, advice in _FORMATS.items():
        files = sorted(
            file.name
            for file in directory.glob(f"*{suffix}")
            if file.is_file() and file.name not in _NO_WEIGHTS
        )
        if files:
            return f"{files[0]} is there, {advice}"
    return None


def quantization_section(config: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    """What a `config.json` says of another program's quantization: method, key and value; None if nothing."""
    text = config.get("text_config")
    for place, values in (("", config), ("text_config.", text if isinstance(text, Mapping) else {})):
        for key in QUANTIZATION_KEYS:
            if values.get(key):
                return _method(values[key]), place + key, values[key]
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that says nothing of it."""
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key not in QUANTIZATION_KEYS}
    return plain


def fail_quantized(where: Path | str, method: str) -> NoReturn:
    """Raises the error about a checkpoint that is quantized by another program's method."""
    raise JaxchatError(
        f"{where}: quantized with {method}, which is not read; take the original model, and quantize it "
        f"here with {option('quant', 'int8')} or int4"
    )


def fail_unstated(where: Path | str, method: str, *, known: bool) -> NoReturn:
    """Raises the error about tensors that are quantized, of which `config.json` says nothing."""
    if not known:
        fail_quantized(where, method)
    raise JaxchatError(
        f"{where}: holds tensors quantized with {method}, but config.json has no quantization_config that "
        "says how; download the whole repository again"
    )


def _method(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return str(entry)[:40]
    named = entry.get("quant_method") or entry.get("quant_type") or entry.get("quant_algo")
    if isinstance(named, str):
        return named[:40]
    if any(str(key).lstrip("_").startswith(("load_in_", "bnb_")) for key in entry):
        return "bitsandbytes"
    return "MLX" if {"group_size", "bits"} <= entry.keys() else "an unnamed method"


_BY_TENSORS = (
    ("gptq", r"\.g_idx$"),
    ("awq", r"\.qzeros$"),
    ("compressed-tensors", r"\.weight_(packed|zero_point|shape)$"),
    ("bitsandbytes", r"\.(SCB|absmax|quant_map|quant_state\..+)$"),
    ("mxfp4", r"_blocks$"),
    ("MLX", r"_proj\.biases$"),
    ("fp8", r"\.(weight_scale(_inv)?|input_scale|activation_scale)$"),
    ("an unnamed method", r"\.qweight$"),
)


def quantization_of(tensors: Iterable[str]) -> str | None:
    """The method that tensors of these names were quantized with; None where they are plain."""
    names = "\n".join(tensors)
    return next((method for method, name in _BY_TENSORS if re.search(name, names, re.MULTILINE)), None)
