"""From nothing to the first token: a new process, a converted checkpoint, a warm compilation cache.

    python -m benchmarks.start --shape tinyllama-1.1b --quant int4 --prompt 16 --new 32

Writes a random native checkpoint of the shape once (it is kept), then starts a process that loads it,
answers and ends, several times. Reports the seconds from the start of the process to the first token, the
decode rate after it, and the memory it held beside what it has to hold: weights, KV cache and 600 MB.
`--peer llama.cpp` does the same with llama.cpp in turn. `--gguf Q4_K_M` starts from a file of that kind on
both sides, `--converted` from what `jaxchat convert` makes of it on ours. Prints a table, and as the last
line one JSON object.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import JaxchatError, UsageError

ALLOWANCE = 600_000_000
"""Bytes a process may hold beside weights (x 1.1) and KV cache: Python, XLA, executables, activations."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from benchmarks import common

    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__.splitlines()[0])
    common.add_model_flags(parser)
    parser.set_defaults(quant="int4")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--max_length", type=int, default=1024, help="the longest context")
    parser.add_argument("--converted", action="store_true", help="with --gguf: start from its conversion")
    parser.add_argument("--peer", choices=("llama.cpp",), help="what to compare with, in the same run")
    parser.add_argument(
        "--peer_python",
        default=sys.executable,
        help="interpreter with llama_cpp, gguf and lazy_loader; default this one",
    )
    args = parser.parse_args(argv)
    if args.converted and not args.gguf:
        parser.error("--converted is of a --gguf file")
    for name, least in (("prompt", 1), ("new", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    return args


# --- the checkpoint


def checkpoint(shape: str, dtype: str, quant: str) -> Path:
    """A random native checkpoint, written if it is not there yet."""
    from benchmarks import common
    from jaxchat.checkpoints.manifest import MANIFEST, NATIVE_FILE, Manifest
    from jaxchat.checkpoints.quantized import named_arrays, quantization_entry, tensor_specs
    from jaxchat.checkpoints.safetensors_file import ALIGNMENT, SafetensorsWriter
    from jaxchat.families import parameter_table
    from jaxchat.quant import QuantFormat, format_for

    config, fmt = common.shape_config(shape), QuantFormat.parse(quant)
    table = parameter_table(config)
    name = "-".join([shape, dtype, quant]).replace(":", "_")
    path = Path(tempfile.gettempdir()) / "jaxchat-benchmarks" / name
    if (path / MANIFEST).exists():
        return path
    partial = path.with_name(f"{name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        specs: dict[str, Any] = {}
        for param in table:
            storage = format_for(param, fmt) or common.np.dtype(common.DTYPES[dtype])
            specs |= tensor_specs(param.name, param.stacked_shape(config), storage)
        with SafetensorsWriter(
            partial / NATIVE_FILE, specs, metadata={"format": "jaxchat"}, alignment=ALIGNMENT
        ) as writer:
            for param, values in common.random_values(config, dtype, fmt):
                for tensor, array in named_arrays(param.name, values).items():
                    writer.write(tensor, array)
        (partial / "config.json").write_text(json.dumps(common.SHAPES[shape]))
        Manifest(
            format="native",
            dtypes={param.name: dtype for param in table},
            tied_head="absent" if config.tied_embeddings else "untied",
            quantization=quantization_entry(fmt, table),
        ).write(partial)
        partial.rename(path)
    return path


def gguf_model(args: argparse.Namespace) -> Path:
    """A random GGUF file, or what it is converted to."""
    from benchmarks import common
    from benchmarks.llama_cpp import random_model
    from jaxchat.checkpoints.write import convert

    path = random_model(common.SHAPES[args.shape], args.gguf)
    if not args.converted:
        return path
    native = path.with_suffix("")
    if not native.exists():
        convert(path, native)
    return native


# --- the processes


def ours(job: Mapping[str, Any]) -> dict[str, Any]:
    """The child: loads, answers, and says what it took."""
    import jaxchat
    from jaxchat.engine.generation import generate

    started = job["started"]
    model = jaxchat.load(job["path"], max_length=job["max_length"], kernels=job["kernels"])
    loaded = time.time()
    session = model.engine.session()
    session.set_ids(list(range(3, 3 + job["prompt"])))
    times = [time.time() for _ in generate(session, max_new_tokens=job["new"])]
    from benchmarks import common

    return {
        "first_token_s": times[0] - started,
        "load_s": loaded - started,
        "decode_tok_s": (len(times) - 1) / (times[-1] - times[0]),
        "peak_rss_bytes": common.peak_rss_bytes(),
        "kv_bytes": session.cache_bytes,
        "weight_bytes": sum(value.nbytes for value in model.engine.params.values()),
        "kernels": model.engine.kernels.name,
    }


def llama_cpp(job: Mapping[str, Any]) -> dict[str, Any]:
    """The child: the same with llama.cpp."""
    from benchmarks.llama_cpp import Server

    started = job["started"]
    server = Server(job["path"], threads=job["threads"], batch=1, length=job["max_length"])
    loaded = time.time()
    timing = server.run(job["prompt"], job["new"])
    ended = time.time()
    return {
        "first_token_s": ended - started - (job["new"] - 1) * timing.step_s,
        "load_s": loaded - started,
        "decode_tok_s": 1 / timing.step_s,
    }


CHILDREN = {"ours": ours, "llama_cpp": llama_cpp}


def run_child(python: str, side: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Starts a process for one side and returns what it prints."""
    command = [python, "-m", "benchmarks.start", "--child", side, json.dumps({**job, "started": time.time()})]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise JaxchatError(f"the {side} process ended with status {done.returncode}; its messages are above")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark; the result is the JSON object."""
    from benchmarks import common
    from benchmarks.llama_cpp import TYPES, check_python, random_model
    from jaxchat.quant import QuantFormat

    fmt = QuantFormat.parse(args.quant)
    job = {"prompt": args.prompt, "new": args.new, "max_length": args.max_length, "kernels": args.kernels}
    path = gguf_model(args) if args.gguf else checkpoint(args.shape, args.dtype, args.quant)
    sides = {"ours": (sys.executable, {**job, "path": str(path)})}
    if args.peer:
        check_python(args.peer_python)
        kind = args.gguf or TYPES[f"int{fmt.bits}" if fmt else args.dtype]
        gguf = random_model(common.SHAPES[args.shape], kind)
        sides["llama_cpp"] = (
            os.path.abspath(args.peer_python) if os.sep in args.peer_python else args.peer_python,
            {**job, "path": str(gguf), "threads": common.available_cores()},
        )
    for side, (python, task) in sides.items():
        run_child(python, side, task)  # compiles, and brings the file into memory
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for repeat in range(common.REPEATS):
        for side in sorted(sides, reverse=repeat % 2 == 1):
            runs[side].append(run_child(sides[side][0], side, sides[side][1]))

    def figures(side: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("first_token_s", "load_s", "decode_tok_s"):
            measured = common.Measured(tuple(run[name] for run in runs[side]))
            found |= {name: measured.median, f"{name}_range": measured.range}
        return found

    last = runs["ours"][-1]
    allowed = 1.1 * last["weight_bytes"] + last["kv_bytes"] + ALLOWANCE
    result = {
        "shape": args.shape,
        "dtype": args.dtype,
        "quant": args.gguf or args.quant,
        "converted": args.converted,
        "kernels": last["kernels"],
        "prompt": args.prompt,
        "new": args.new,
        **figures("ours"),
        "weight_bytes": last["weight_bytes"],
        "kv_bytes": last["kv_bytes"],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs["ours"]),
        "allowed_rss_bytes": round(allowed),
    }
    if args.peer:
        result["peer"] = {"name": args.peer, **figures("llama_cpp")}
    return {**result, **common.facts()}


def print_report(result: dict[str, Any]) -> None:
    """The result for a person."""
    from benchmarks import common

    def seconds(figures: Mapping[str, Any]) -> str:
        low, high = figures["first_token_s_range"]
        loaded = f"loaded after {figures['load_s']:.2f} s"
        return f"{figures['first_token_s']:.2f} s ({low:.2f} to {high:.2f}), {loaded}"

    gb = {name: result[f"{name}_bytes"] / 1e9 for name in ("peak_rss", "weight", "kv", "allowed_rss")}
    rows = [
        ("model", f"{result['shape']}, {result['quant']}, {result['kernels']} kernels"),
        ("to the first token", seconds(result)),
        ("decode", f"{result['decode_tok_s']:.2f} tokens/s"),
        (
            "memory",
            f"{gb['peak_rss']:.2f} GB at most; weights {gb['weight']:.2f}, KV {gb['kv']:.2f}, "
            f"allowed {gb['allowed_rss']:.2f} GB",
        ),
    ]
    if "peer" in result:
        peer = result["peer"]
        rows += [
            (f"{peer['name']}, to the first", seconds(peer)),
            (f"{peer['name']}, decode", f"{peer['decode_tok_s']:.2f} tokens/s"),
        ]
    common.print_table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["--child"]:  # imports as little as the side it measures
            print(json.dumps(CHILDREN[arguments[1]](json.loads(arguments[2]))))
            return 0
        result = measure(parse_args(arguments))
    except (UsageError, JaxchatError) as error:
        print(error, file=sys.stderr)
        return 2
    print_report(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
