"""What the benchmarks share: shapes, random weights, read bandwidth, byte counts, facts about the machine."""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

import jaxchat
from benchmarks.llama_cpp import FILES, random_model
from jaxchat import pallas
from jaxchat.analysis import cost
from jaxchat.checkpoints.load import aligned_storage
from jaxchat.config import LAYERS, ModelConfig, Param
from jaxchat.engine import steps
from jaxchat.engine.generation import generate
from jaxchat.engine.session import Engine, Session
from jaxchat.errors import JaxchatError
from jaxchat.families import parameter_table, read_config
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.step import Params
from jaxchat.pallas import native
from jaxchat.quant import QuantFormat, QuantizedTensor, format_for

REPEATS = 5
"""Every figure is the median of so many runs."""

_TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "tiny-80": {**_TINY, "num_hidden_layers": 80},
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
}
"""The `config.json` of each shape; the weights are random."""

_ALIGNMENT = 64  # bytes; an array that starts there becomes a CPU device array without a copy
_TILE = (1 << 20) + 7  # random values drawn; arrays repeat them, no two starting at the same place


# --- models


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `make_engine` reads."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama-1.1b", help="of the model")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the weights that are not quantized"
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--quant", default="none", help="of the weights, as in jaxchat.generate: int8, int4, int4:64, ..."
    )
    weights.add_argument("--gguf", choices=FILES, help="a file of this kind, the same for us and a peer")
    parser.add_argument(
        "--kernels", choices=pallas.NAMES, default="auto", help="which implementations of the operations run"
    )


def make_engine(args: argparse.Namespace) -> Engine:
    """An engine with random weights, as the flags say."""
    if args.gguf:
        path = random_model(SHAPES[args.shape], args.gguf)
        return jaxchat.load(path, kernels=args.kernels).engine
    config = shape_config(args.shape)
    return Engine(
        config, random_params(config, args.dtype, QuantFormat.parse(args.quant)), kernels=args.kernels
    )


def model_fields(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """What the flags came to, for the JSON object."""
    name = engine.kernels.name
    return {
        "shape": args.shape,
        "dtype": args.dtype,
        "quant": args.gguf or args.quant,
        "activations": engine.dtype.name,
        "layers": engine.config.num_layers,
        "kernels": name,
        "instruction_set": native.instruction_set() if name == "native" else "",
    }


def model_line(result: dict[str, Any]) -> str:
    """`model_fields` for a person."""
    weights = result["dtype"] if result["quant"] == "none" else result["quant"]
    kernels = " ".join(filter(None, (result["kernels"], result["instruction_set"])))
    return f"{result['shape']}, {weights}, {result['layers']} layers, {kernels} kernels"


def shape_config(name: str) -> ModelConfig:
    """The configuration of a named shape."""
    return read_config(SHAPES[name], source=f"shape {name}")


def random_params(config: ModelConfig, dtype: str, fmt: QuantFormat | None = None, seed: int = 0) -> Params:
    """Random parameters in the form that loading gives: on CPU, bfloat16 as its bits in uint16.

    Quantized ones are random codes and scales: nothing is quantized, which would take minutes.
    """
    values = random_values(config, dtype, fmt, seed)
    return {param.name: jax.tree.map(to_device, value) for param, value in values}


def random_values(
    config: ModelConfig, dtype: str, fmt: QuantFormat | None = None, seed: int = 0
) -> Iterator[tuple[Param, np.ndarray | QuantizedTensor]]:
    """The numbers of `random_params` as numpy arrays, one parameter at a time."""
    rng = np.random.default_rng(seed)
    tile = rng.standard_normal(_TILE, dtype=np.float32)
    for param in parameter_table(config):
        shape = param.stacked_shape(config)
        chosen = format_for(param, fmt)
        if chosen is not None:
            yield param, _random_quantized(rng, shape, chosen)
            continue
        values = tile / math.sqrt(shape[-1]) if param.quantizable else 0.1 * tile
        if param.init == "ones":
            values = values + 1
        yield param, _tiled(values.astype(DTYPES[dtype]), int(rng.integers(_TILE)), shape)


def gathered_params(params: Params, layers: Sequence[int]) -> Params:
    """The unrolled checkpoint of a plan: every stack holds copies of the plan's layers, in order."""

    def gathered(stack: jax.Array) -> jax.Array:
        return to_device(_gathered(np.asarray(stack), layers))

    return {
        name: jax.tree.map(gathered, value) if name.startswith(LAYERS) else value
        for name, value in params.items()
    }


def to_device(values: np.ndarray) -> jax.Array:
    """An array on the default device, without a copy on CPU if it is aligned."""
    if values.dtype == ml_dtypes.bfloat16 and jax.default_backend() == "cpu":
        values = values.view(np.uint16)
    return jax.device_put(values, may_alias=True)


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised array that starts at a multiple of 64 bytes."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _random_quantized(rng: np.random.Generator, shape: tuple[int, ...], fmt: QuantFormat) -> QuantizedTensor:
    """Weights of variance about 1 / I, centred on zero, as numpy arrays."""
    out = aligned_storage(shape, fmt)
    assert isinstance(out, QuantizedTensor)
    low, high = fmt.code_range
    if fmt.bits == 8:
        codes = rng.integers(low, high + 1, _TILE, np.int8)
    else:
        codes = rng.integers(0, 256, _TILE, np.uint8)
    _fill(out.codes, codes, int(rng.integers(_TILE)))
    out.codes[..., -(-shape[-1] // (1 if fmt.bits == 8 else 2)) :] = 0  # the padding of rows
    if out.high is not None:
        _fill(out.high, codes, int(rng.integers(_TILE)))
    size = math.sqrt(12 / shape[-1]) / (high - low)
    if fmt.two_level:
        _fill_two_levels(rng, out, size, (low + high) / 2)
        return out
    scales = (rng.uniform(0.8, 1.2, _TILE) * size).astype(out.scales.dtype)
    if fmt.bits == 4 and not fmt.affine:
        scales *= rng.choice(np.array([-1, 1], scales.dtype), _TILE)  # the codes' mean is not 0
    offset = int(rng.integers(_TILE))
    _fill(out.scales, scales, offset)
    if out.mins is not None:
        _fill(out.mins, scales * scales.dtype.type(-(low + high) / 2), offset)
    return out


def _fill_two_levels(rng: np.random.Generator, out: QuantizedTensor, size: float, middle: float) -> None:
    """Scales of about `size`, and offsets that centre the codes on zero, as K-quants have them."""
    levels = rng.integers(40, 60, _TILE, np.int8)
    if not out.affine:
        levels *= rng.choice(np.array([-1, 1], np.int8), _TILE)  # the codes' mean is not 0
    offset = int(rng.integers(_TILE))
    _fill(out.scales, levels, offset)
    outer = np.full(_TILE, size / 50, np.float16)
    _fill(out.super_scales, outer, 0)
    if out.mins is not None:
        _fill(out.mins, levels, offset)
        _fill(out.super_mins, -outer * np.float16(middle), 0)


def _tiled(tile: np.ndarray, offset: int, shape: Sequence[int]) -> np.ndarray:
    out = aligned_empty(shape, tile.dtype)
    _fill(out, tile, offset)
    return out


def _fill(out: Any, tile: np.ndarray, offset: int) -> None:
    flat, tile = out.reshape(-1), np.roll(tile, -offset)
    for start in range(0, flat.size, tile.size):
        part = flat[start : start + tile.size]
        part[:] = tile[: part.size]


def _gathered(stack: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    out = aligned_empty((len(layers), *stack.shape[1:]), stack.dtype)
    for position, layer in enumerate(layers):
        out[position] = stack[layer]
    return out


# --- bytes that must move


def weight_bytes_per_step(config: ModelConfig, params: Params, plan: LayerPlan) -> int:
    """`cost.weight_bytes_read` of the arrays that are loaded."""
    nbytes = {
        param.name: params[param.name].nbytes // param.rows(config) for param in parameter_table(config)
    }
    return cost.weight_bytes_read(config, plan, nbytes)


# --- measuring


@dataclass(frozen=True)
class Measured:
    """A figure measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """What is reported."""
        return statistics.median(self.values)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest: how disturbed the machine was."""
        return min(self.values), max(self.values)


def median_ratio(a: Measured, b: Measured) -> float:
    """The median of the ratios of neighbours in time, which slow drifts of the machine leave alone."""
    return statistics.median(x / y for x, y in zip(a.values, b.values, strict=True))


class ReadBandwidth:
    """How fast all cores together can read memory: the most that decoding could use.

    One thread a core takes the maximum of its part of a buffer far larger than any cache, as int32: numpy
    does that with vector loads and without the interpreter lock. It reads as fast here as memchr, BLAS dot
    and integer sums (within noise), and faster than XLA's reductions. Nothing is written.
    """

    def __init__(self, mebibytes: int = 1024):
        self._cores = available_cores()
        tile = np.random.default_rng(0).integers(0, 1 << 30, 1 << 18, dtype=np.int32)
        buffer = _tiled(tile, 0, (mebibytes << 18,))
        self._nbytes = buffer.nbytes
        self._parts = np.array_split(buffer, self._cores)
        self._pool = ThreadPoolExecutor(self._cores)
        self.gb_s()  # starts the threads

    def gb_s(self) -> float:
        """One reading, the median of three passes, in 1e9 bytes a second."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            list(self._pool.map(np.max, self._parts))
            times.append(time.perf_counter() - start)
        return self._nbytes / statistics.median(times) / 1e9


def compile_decode(session: Session) -> tuple[float, int]:
    """Compiles the session's decode step anew, as for the first token of a process without a cache.

    Returns:
      Seconds it takes to trace and compile, and the bytes of temporaries the executable needs.
    """
    rows = np.zeros(session.padded_batch, np.int32)
    start = time.perf_counter()
    compiled = steps.decode.lower(session.step(rows, rows, rows, rows), session._cache).compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    assert memory is not None
    return seconds, memory.temp_size_in_bytes


def set_prompts(session: Session, prompts: Sequence[Sequence[int]]) -> None:
    """Makes the prompts the sequences' contexts, with nothing cached."""
    for row, ids in enumerate(prompts):
        session.rollback(0, row)
        session.set_ids(ids, row)


def prefill_s(session: Session, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds to prefill the prompts from nothing."""
    set_prompts(session, prompts)
    start = time.perf_counter()
    session.prefill().block_until_ready()
    return time.perf_counter() - start


def decode_step_s(session: Session, prompt: int, new: int) -> float:
    """Seconds a greedy decode step takes, right after prompts of `prompt` tokens.

    Timed from the first of `new` tokens to the last, so that it is decode steps only.
    """
    for row in range(session.batch):
        session.rollback(prompt, row)
    times = [time.perf_counter() for token in generate(session, max_new_tokens=new) if token.row == 0]
    return (times[-1] - times[0]) / (len(times) - 1)


def random_prompts(config: ModelConfig, batch: int, length: int) -> list[list[int]]:
    """Random token ids, [batch][length]."""
    rng = np.random.default_rng(1)
    return rng.integers(0, config.vocab_size, (batch, length)).tolist()


# --- facts


def facts() -> dict[str, Any]:
    """The versions and the machine a run belongs to."""
    return {
        "jax": jax.__version__,
        "jaxlib": sys.modules["jaxlib"].__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
    }


def available_cores() -> int:
    """How many cores this process may use; only Linux says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name and, as some are vague, its family and model numbers."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", platform.machine())
    return f"{name} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else name


def peak_rss_bytes() -> int:
    """The most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report(measure: Callable[[], dict[str, Any]], print_report: Callable[[dict[str, Any]], None]) -> int:
    """Measures, then prints a table for people and a line of JSON; the exit code."""
    try:
        result = measure()
    except JaxchatError as error:
        print(error, file=sys.stderr)
        return 2
    print_report(result)
    print(json.dumps(result))
    return 0


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
