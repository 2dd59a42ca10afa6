"""llama.cpp beside us: a random GGUF of the same shape, and a child process that times it when asked to.

`Peer` starts the child, `python -m benchmarks.llama_cpp JOB`, in an interpreter that has `llama_cpp` and
`gguf`; that need not be ours, so this file imports neither JAX nor what needs it. The child loads the model
once, then times one run for each line of its standard input and otherwise sleeps.
"""

import contextlib
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxchat.errors import JaxchatError, UsageError

TYPES = {"int4": "Q4_0", "int8": "Q8_0", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""What llama.cpp stores the linear weights as, beside ours."""

FILES = ("Q4_K_M", "Q4_0", "Q8_0", "BF16")
"""Kinds of files that both sides can run."""

CHUNK = 512
"""Tokens of a prompt computed at a time: llama.cpp's default."""

_TILE = (1 << 15) + 7  # random blocks drawn; tensors repeat them
_ERROR = 4  # the log level of ggml


# --- this side


class Timing(NamedTuple):
    """One run of llama.cpp."""

    prefill_s: float
    step_s: float


class Peer:
    """A llama.cpp process with a random model of a shape; use it as a context manager.

    Args:
      python: an interpreter with `llama_cpp` and `gguf`.
      config: the `config.json` of the shape.
      kind: of the file, a value of `TYPES` or one of `FILES`.
      threads: of llama.cpp.
      batch: sequences decoded together.
      length: tokens of each sequence, the generated ones included.

    Raises:
      UsageError: the interpreter lacks a package, or llama.cpp has no such shape.
      JaxchatError: llama.cpp failed.
    """

    def __init__(
        self,
        python: str,
        config: Mapping[str, Any],
        kind: str,
        *,
        threads: int,
        batch: int,
        length: int,
    ):
        if config["model_type"] != "llama":
            raise UsageError(
                f"--peer llama.cpp compares shapes of model_type llama, not {config['model_type']}"
            )
        check_python(python)
        if os.sep in python:
            python = os.path.abspath(python)  # the child starts in another folder
        self.type, self.threads = kind, threads
        self.path = model_path(config, self.type)
        job = {
            "config": dict(config),
            "type": self.type,
            "threads": threads,
            "batch": batch,
            "length": length,
        }
        self._child = subprocess.Popen(
            [python, "-m", "benchmarks.llama_cpp", json.dumps(job)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self._answer()
        self.version, self.build, self.load_s = ready["version"], ready["build"], ready["load_s"]

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._child.kill()

    def time(self, prompt: int, new: int) -> Timing:
        """Prefills prompts of `prompt` tokens from nothing and decodes `new`, the first from the prefill."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the child has ended: there is no answer
            print(json.dumps({"prompt": prompt, "new": new}), file=self._child.stdin, flush=True)
        return Timing(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise JaxchatError(
                f"llama.cpp's process ended with status {self._child.wait()}; its messages are above"
            )
        return json.loads(line)


def check_python(python: str) -> None:
    """Raises UsageError unless the interpreter is there and has the packages."""
    hint = "pip install llama-cpp-python gguf, or name an interpreter that has them with --peer_python"
    try:
        done = subprocess.run(
            [python, "-c", "import gguf, llama_cpp"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise UsageError(f"--peer llama.cpp: cannot run {python}: {error.strerror}; {hint}") from error
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"status {done.returncode}"
        raise UsageError(f"--peer llama.cpp: {python}: {reason}; {hint}")


def model_path(config: Mapping[str, Any], kind: str) -> Path:
    """Where the GGUF of a shape is kept between runs."""
    checksum = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    return Path(tempfile.gettempdir()) / "jaxchat-benchmarks" / f"{checksum:08x}-{kind}.gguf"


# --- a random model


def random_model(config: Mapping[str, Any], kind: str) -> Path:
    """The random GGUF of a shape, written if it is not there yet."""
    path = model_path(config, kind)
    if not path.exists():
        write_model(path, config, kind)
    return path


def write_model(path: Path, config: Mapping[str, Any], kind: str) -> None:
    """Writes a random GGUF; the types of the tensors are those that llama.cpp's own quantizer picks."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    heads = config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_vocabulary(writer, config["vocab_size"])

    rng, layers = np.random.default_rng(0), config["num_hidden_layers"]
    table = [(name, shape, _storage(name, shape, kind, layers)) for name, shape in _tensors(config)]
    for name, shape, storage in table:
        type_ = gguf.GGMLQuantizationType[storage]
        block, nbytes = gguf.GGML_QUANT_SIZES[type_]
        total = math.prod(shape) // block * nbytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), total, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, storage in table:
        writer.write_tensor_data(_random_tensor(rng, shape, storage))
    writer.close()
    partial.replace(path)


def _tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, [out, in]."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "token_embd.weight", (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (
            ("attn_norm", (width,)),
            ("attn_q", (width, width)),
            ("attn_k", (kv, width)),
            ("attn_v", (kv, width)),
            ("attn_output", (width, width)),
            ("ffn_norm", (width,)),
            ("ffn_gate", (inner, width)),
            ("ffn_up", (inner, width)),
            ("ffn_down", (width, inner)),
        ):
            yield f"blk.{layer}.{name}.weight", shape
    yield "output_norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", (config["vocab_size"], width)


def _storage(name: str, shape: tuple[int, ...], kind: str, layers: int) -> str:
    """The type of a tensor in a file of a kind: norms F32, the head of a Q4_0 file Q6_K, the rest the kind.

    Rows that are no whole number of blocks get Q8_0 instead of K-quants, and F16 if even 32 does not divide
    them.
    """
    if len(shape) == 1:
        return "F32"
    if kind not in FILES[:-1]:
        return kind
    if shape[-1] % 32:
        return "F16"
    if kind == "Q8_0":
        return kind
    fallback = "Q8_0" if shape[-1] % 256 else None
    if name == "output.weight":
        return fallback or "Q6_K"
    if kind == "Q4_0":
        return kind
    return fallback or ("Q6_K" if _has_more_bits(name, layers) else "Q4_K")


def _has_more_bits(name: str, layers: int) -> bool:
    """Whether Q4_K_M has more bits of a tensor: of values and of what ends an MLP, in half of the layers."""
    parts = name.split(".")
    if parts[0] != "blk" or parts[2] not in ("attn_v", "ffn_down"):
        return False
    layer, eighth = int(parts[1]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


class _Blocks(NamedTuple):
    """A quantized type: weights in a block, its bytes, where its float16 scale is, typical size of a code."""

    weights: int
    layout: np.dtype
    code: float


_BLOCKS = {
    "Q4_0": _Blocks(32, np.dtype([("scale", "<f2"), ("codes", "u1", 16)]), 4.6),
    "Q8_0": _Blocks(32, np.dtype([("scale", "<f2"), ("codes", "u1", 32)]), 74),
    # Its parts' scales and minimums have 6 bits; the offset takes the codes' mean, 7.5, off.
    "Q4_K": _Blocks(
        256, np.dtype([("scale", "<f2"), ("offset", "<f2"), ("codes", "u1", 12 + 128)]), 32 * 4.6
    ),
    # The scales of its 16 parts are int8, so that a typical weight is 18 x 74 times the scale.
    "Q6_K": _Blocks(256, np.dtype([("codes", "u1", 208), ("scale", "<f2")]), 18 * 74),
}


def _random_tensor(rng: np.random.Generator, shape: tuple[int, ...], storage: str) -> np.ndarray:
    """The bytes of a tensor: weights of a size that keeps activations near 1, norms near 1."""
    size = 1 / math.sqrt(shape[-1])
    if storage in _BLOCKS:
        blocks = _BLOCKS[storage]
        tile = np.zeros(_TILE, blocks.layout)
        tile["codes"] = rng.integers(0, 256, tile["codes"].shape, np.uint8)
        sign = rng.choice([-1, 1], _TILE)  # the codes' mean is not 0
        tile["scale"] = rng.uniform(0.8, 1.2, _TILE) * sign * size / blocks.code
        if "offset" in (blocks.layout.names or ()):
            tile["offset"] = 7.5 * tile["scale"]
        return _bytes(tile, math.prod(shape) // blocks.weights)
    values = rng.standard_normal(32 * _TILE, np.float32)
    values = 1 + 0.1 * values if len(shape) == 1 else values * np.float32(size)
    if storage == "BF16":  # the upper half of a float32
        return _bytes((values.view(np.uint32) >> 16).astype(np.uint16), math.prod(shape))
    return _bytes(values.astype({"F16": np.float16, "F32": np.float32}[storage]), math.prod(shape))


def _bytes(tile: np.ndarray, count: int) -> np.ndarray:
    return np.resize(tile, count).view(np.uint8)


def _add_vocabulary(writer: Any, size: int) -> None:
    """A SentencePiece vocabulary of the right size that means nothing."""
    import gguf

    kinds = gguf.TokenType
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    pieces += [(f"token{number}", kinds.NORMAL) for number in range(size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece, _ in pieces[:size]])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([kind for _, kind in pieces[:size]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


# --- the child: running it


class Server:
    """llama.cpp with a loaded model, through its C API."""

    def __init__(self, path: str, *, threads: int, batch: int, length: int):
        import llama_cpp

        self.api = llama_cpp
        # Only errors; the callback must live as long as the library.
        self._log = llama_cpp.llama_log_callback(_print_errors)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        start = time.perf_counter()
        model_params = llama_cpp.llama_model_default_params()  # maps the file
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise JaxchatError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * -(-length // 256) * 256  # shared out evenly; its cache has rows by the 256
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise JaxchatError("llama.cpp cannot make a context")
        self.load_s = time.perf_counter() - start
        self.sequences = batch
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(max(CHUNK, batch), 0, 1)
        self.rng = np.random.default_rng(1)

    def run(self, prompt: int, new: int) -> Timing:
        """See `Peer.time`."""
        api, rows = self.api, range(self.sequences)
        prompts = self.rng.integers(0, self.vocab_size, (self.sequences, prompt)).tolist()
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        last = [0] * self.sequences
        for row in rows:
            for first in range(0, prompt, CHUNK):
                part = range(first, min(first + CHUNK, prompt))
                self._decode([(prompts[row][p], p, row, p == prompt - 1) for p in part])
            last[row] = self._choice(-1)
        prefilled = time.perf_counter()
        for position in range(prompt, prompt + new - 1):
            self._decode([(last[row], position, row, True) for row in rows])
            last = [self._choice(row) for row in rows]
        step_s = (time.perf_counter() - prefilled) / (new - 1)
        return Timing(prefilled - start, step_s)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Computes tokens, each an id, a position, a sequence and whether its logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, (token, position, row, logits) in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = logits
        if status := self.api.llama_decode(self.context, batch):
            raise JaxchatError(f"llama_decode failed with status {status}")

    def _choice(self, index: int) -> int:
        """The likeliest token after the batch's token `index`; waits for the computation."""
        logits = self.api.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


def _print_errors(level: int, text: bytes, _: object) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def main(argv: list[str]) -> int:
    """The child: `argv` is one JSON object, see `Peer`. Standard output is for the answers alone."""
    import llama_cpp

    job = json.loads(argv[0])
    try:
        path = random_model(job["config"], job["type"])
        server = Server(str(path), threads=job["threads"], batch=job["batch"], length=job["length"])
        server.run(min(job["length"] - 2, 16), 2)  # touches the weights and starts the threads
        build = llama_cpp.llama_print_system_info().decode().strip()
        ready = {"version": llama_cpp.__version__, "build": build, "load_s": server.load_s}
        print(json.dumps(ready), flush=True)
        for line in sys.stdin:
            print(json.dumps(server.run(**json.loads(line))._asdict()), flush=True)
    except JaxchatError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
