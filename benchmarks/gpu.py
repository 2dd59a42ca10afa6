"""Everything to be known on a GPU, in one call of some minutes, beside what the GPU and torch can do.

    python -m benchmarks.gpu --out gpu.json

Parts, each a process of its own, so that one that fails or hangs loses only itself: what the device can do
(copy bandwidth, bfloat16 product), the kernels against float64, decode at batch 1 and prefill with bfloat16,
int8 and int4 weights under each set of kernels and of XLA flags, a looped plan beside unrolled layers, and
torch (transformers with a static cache and torch.compile; a compiled loop of its own). The last line is one
JSON object: part -> its figures, or its error. On a CPU, with `--shape tiny`, it is a dry run, in which the
Pallas kernels are interpreted in the second part and missing elsewhere. It has not been run on a GPU yet.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.plan import unrolled_config
from jaxchat import model
from jaxchat.engine.session import Engine
from jaxchat.errors import JaxchatError
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.step import Step
from jaxchat.pallas.cache_attention import cases as attentions
from jaxchat.pallas.stacked_matmul import cases as products
from jaxchat.quant import QuantFormat

QUANTS = ("none", "int8", "int4")

XLA_FLAGS = {
    "default": "",
    # Loops and conditionals run on the device, without a round trip to the host at every slot.
    "graphs": "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE,CONDITIONAL "
    "--xla_gpu_graph_min_graph_size=1",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(common.SHAPES), default="llama-3-8b", help="of the model")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the decode steps")
    parser.add_argument("--new", type=int, default=64, help="tokens of a timed decode")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the timed prompt")
    parser.add_argument("--copy_mib", type=int, default=4096, help="buffer of the copy")
    parser.add_argument("--matmul", type=int, default=8192, help="side of the bfloat16 product")
    parser.add_argument("--timeout_s", type=int, default=180, help="for each part")
    parser.add_argument("--only", default="", help="run only parts whose names contain this")
    parser.add_argument("--torch_python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--out", help="also write the JSON object here, after each part")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def seconds(function: Callable[[], Any], repeats: int = common.REPEATS) -> float:
    """Median seconds of a call, after one to compile."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# --- parts: each takes the flags and gives a dict


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes read and written by a copy, and operations of a bfloat16 product on random data, a second."""
    buffer = jnp.arange(args.copy_mib << 18, dtype=jnp.uint32)
    copy = jax.jit(lambda x: x ^ 1)  # a plain copy may be a memcpy, which other engines than the cores do
    side = jax.random.normal(jax.random.key(0), (args.matmul, args.matmul), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return {
        "copy_gb_s": 2 * buffer.nbytes / seconds(lambda: copy(buffer)) / 1e9,
        "matmul_tflop_s": 2 * args.matmul**3 / seconds(lambda: product(side)) / 1e12,
        **common.facts(),
    }


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """The largest error of every kernel against float64, on the device: of the tests' cases, and large ones.

    Of products relative to the norms of both sides, of attention absolute: its results are about 1.
    """
    interpret = jax.default_backend() == "cpu"
    rng = np.random.default_rng(0)
    errors: dict[str, Any] = {}

    def note(name: str, compute: Callable[[], float]) -> None:
        try:
            errors[name] = compute()
        except Exception as error:  # a kernel that does not compile must not hide the others
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    chosen = products.sample(rng, ("bfloat16", "int4", "int8"), each=1) if interpret else products.FOR_GPU
    for case in chosen:
        note(f"product {case}", functools.partial(_product_error, rng, case, interpret))
    for name, shape in list(attentions.NAMED.items())[: 3 if interpret else None]:
        for cache in ("bfloat16",) if interpret else ("bfloat16", "float32", "int8"):
            run = functools.partial(_attention_error, rng, shape, cache, interpret)
            note(f"attention {name}, {cache}", run)
    return {
        "errors": errors,
        "wrong": [n for n, e in errors.items() if isinstance(e, str) or not e <= 3e-2],
    }


def _product_error(rng: np.random.Generator, case: products.Case, interpret: bool) -> float:
    from jaxchat.pallas.stacked_matmul import gpu  # Pallas takes a third of a second to import

    stack = products.stack(rng, case.weights, case.shape)
    w = gpu.prepare(jax.tree.map(jnp.asarray, stack.w), "weight", False)
    x = products.normal(rng, (*case.lead, case.shape[1]), case.dtype)
    run = jax.jit(functools.partial(gpu.stacked_matmul, interpret=interpret))
    return products.error(run(x, w, jnp.int32(1)), x, stack, 1)


def _attention_error(rng: np.random.Generator, case: attentions.Case, cache: str, interpret: bool) -> float:
    from jaxchat.pallas.cache_attention import gpu

    given = attentions.inputs(rng, case, cache, np.nan, "float32" if cache == "float32" else "bfloat16")
    run = functools.partial(gpu.attend, softcap=case.softcap, interpret=interpret)
    arrays = jax.tree.map(jnp.asarray, (given.q, given.k, given.v))
    scalars = {"scale": jnp.float32(attentions.SCALE), "window": jnp.int32(case.window)}
    y = jax.jit(run)(*arrays, jnp.int32(attentions.SLOT), jnp.asarray(given.lengths), **scalars)
    return float(np.abs(np.asarray(y, np.float64) - attentions.expected(given, case)).max())


def _engine(args: argparse.Namespace, weights: str, kernels: str) -> Engine:
    config = common.shape_config(args.shape)
    params = common.random_params(config, "bfloat16", QuantFormat.parse(weights))
    return Engine(config, params, kernels=kernels, dtype=jnp.bfloat16)


def decode(args: argparse.Namespace, weights: str, kernels: str) -> dict[str, Any]:
    """Decode at batch 1 and prefill, through the engine."""
    engine = _engine(args, weights, kernels)
    session, config = engine.session(), engine.config
    prompts = common.random_prompts(config, 1, args.prompt)
    common.prefill_s(session, prompts)
    common.decode_step_s(session, args.prompt, args.new)
    step = statistics.median(
        common.decode_step_s(session, args.prompt, args.new) for _ in range(common.REPEATS)
    )
    compile_s, temp_bytes = common.compile_decode(session)
    plan = LayerPlan.identity(config.num_layers)
    nbytes = common.weight_bytes_per_step(config, engine.params, plan)
    long = common.random_prompts(config, 1, min(args.prefill, config.max_position_embeddings - 1))
    common.prefill_s(session, long)
    prefill = statistics.median(common.prefill_s(session, long) for _ in range(common.REPEATS))
    multiplied = sum(v.size for n, v in engine.params.items() if n.startswith("layers.") and v.ndim == 3)
    return {
        "decode_tok_s": 1 / step,
        "weight_gb_s": nbytes / step / 1e9,
        "weight_bytes": nbytes,
        "temp_bytes": temp_bytes,
        "compile_s": compile_s,
        "prefill_tok_s": len(long[0]) / prefill,
        "prefill_tflop_s": 2 * multiplied * len(long[0]) / prefill / 1e12,
    }


def unrolled(args: argparse.Namespace) -> dict[str, Any]:
    """The looped plan beside a Python loop over layers with arrays and caches of their own, bfloat16."""
    engine = _engine(args, "none", "pallas" if jax.default_backend() == "gpu" else "reference")
    config, session = engine.config, engine.session()
    prompts = common.random_prompts(config, 1, args.prompt)
    common.prefill_s(session, prompts)
    common.decode_step_s(session, args.prompt, args.new)
    looped = statistics.median(
        common.decode_step_s(session, args.prompt, args.new) for _ in range(common.REPEATS)
    )
    ids = list(session.ids[0])
    cache = session._cache
    assert cache is not None
    top = {n: v for n, v in engine.params.items() if not n.startswith("layers.")}
    layers, caches = [], []
    for p in range(config.num_layers):
        own = {n: v for n, v in engine.params.items() if n.startswith("layers.")}
        layers.append(jax.tree.map(lambda a, p=p: jnp.copy(a[p : p + 1]), own))
        caches.append(jax.tree.map(lambda a, p=p: jnp.copy(a[p : p + 1]), cache))
    step = jax.jit(functools.partial(_unrolled_step, engine), donate_argnums=2)

    def run() -> list[int]:
        nonlocal caches
        drawn = []
        for position in range(args.prompt, len(ids) - 1):
            token, caches = step(layers, top, caches, jnp.int32([[ids[position]]]), jnp.int32([position]))
            drawn.append(int(token[0]))
        return drawn

    same = run() == ids[args.prompt + 1 :]
    times = []
    for _ in range(common.REPEATS):
        start = time.perf_counter()
        steps = len(run())
        times.append((time.perf_counter() - start) / steps)
    return {
        "looped_ms": looped * 1e3,
        "unrolled_ms": statistics.median(times) * 1e3,
        "ratio": looped / statistics.median(times),
        "same_tokens": same,
    }


def _unrolled_step(
    engine: Engine, layers: Any, top: Any, caches: Any, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, Any]:
    config, one = engine.config, jax.tree.map(jnp.asarray, LayerPlan.identity(1).arrays(1))
    step = Step(
        config=config,
        dtype=engine.dtype,
        kernels=engine.kernels,
        params=top,
        plan=one,
        tokens=tokens,
        lengths=lengths,
        new=jnp.ones_like(lengths),
        context=lengths + 1,
    )
    x = model.embed(step)
    done = []
    for p, (own, cache) in enumerate(zip(layers, caches, strict=True)):
        alone = dataclasses.replace(step, config=unrolled_config(config, [p]), params={**top, **own})
        x, cache = model.run_plan(alone, x, cache)
        done.append(cache)
    return model.logits(step, model.final_norm(step, x)[:, 0]).argmax(-1), done


def parts(args: argparse.Namespace) -> dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]]:
    """Name -> the XLA flags it runs under, and what it does."""
    found: dict[str, Any] = {"limits": ("", limits), "kernels": ("", kernels)}
    for flags, value in XLA_FLAGS.items():
        for weights in QUANTS:
            for which in ("pallas", "reference"):
                run = functools.partial(decode, weights=weights, kernels=which)
                found[f"decode {weights} {which} {flags}"] = (value, run)
        found[f"unrolled {flags}"] = (value, unrolled)
    return found


# --- torch, in its own interpreter


def torch_command(args: argparse.Namespace) -> list[str]:
    """Runs `torch_peer.py`, which needs neither JAX nor this package."""
    numbers = json.dumps(common.SHAPES[args.shape])
    script = os.path.join(os.path.dirname(__file__), "torch_peer.py")
    return [args.torch_python, script, numbers, str(args.prompt), str(args.new), str(args.prefill)]


# --- running


def run_part(command: Sequence[str], flags: str, timeout_s: int) -> dict[str, Any]:
    """The JSON object a process prints last, or how it failed."""
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout_s} s"}
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        return {"error": f"exit code {done.returncode}", "stderr": done.stderr[-2000:]}
    return {**result, "part_s": round(time.perf_counter() - started, 1)}


def measure(args: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """Every part in a process of its own."""
    commands = {
        name: ([sys.executable, "-m", "benchmarks.gpu", *rest, "--part", name], flags)
        for name, (flags, _) in parts(args).items()
    }
    commands["torch"] = (torch_command(args), "")
    results: dict[str, Any] = {}
    for name, (command, flags) in commands.items():
        if args.only not in name:
            continue
        results[name] = run_part(command, flags, args.timeout_s)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(with_fractions(results), file, indent=1)
    return with_fractions(results)


def with_fractions(results: dict[str, Any]) -> dict[str, Any]:
    """Adds what share of the device's measured limits each part reached."""
    limit = results.get("limits", {})
    out = {}
    for name, result in results.items():
        more = {}
        if "weight_gb_s" in result and "copy_gb_s" in limit:
            more["share_of_copy_bandwidth"] = result["weight_gb_s"] / limit["copy_gb_s"]
        if "prefill_tflop_s" in result and "matmul_tflop_s" in limit:
            more["prefill_share_of_matmul"] = result["prefill_tflop_s"] / limit["matmul_tflop_s"]
        out[name] = {**result, **more}
    return out


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(argv)
    if args.part is None:
        results = measure(args, argv)
        print(json.dumps(results))
        return 0 if results and not any("error" in result for result in results.values()) else 1
    try:
        result = parts(args)[args.part][1](args)
    except JaxchatError as error:
        result = {"error": str(error)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
