"""What a layer plan costs: to switch to, in compilations and memory, and in decode time.

    python -m benchmarks.plan --shape tinyllama-1.1b --quant int4

The decode time of each plan is compared with the same runtime on a physically unrolled checkpoint (the stack
holds a copy of every slot's layer), in turn, and that of the whole model with plain XLA: a Python loop over
layers whose weights are separate arrays. Prints a table, and as the last line one JSON object.
"""

import argparse
import dataclasses
import functools
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks import common
from jaxchat.config import ModelConfig
from jaxchat.engine import steps
from jaxchat.engine.generation import generate
from jaxchat.engine.session import Engine, Session
from jaxchat.layer_plan import LayerPlan, Slot
from jaxchat.layers.rope import rope_cos_sin, rotate
from jaxchat.layers.step import Params
from jaxchat.pallas.embedding import embedding_rows
from jaxchat.pallas.storage import widen

SWITCHES = 1000
"""Plans that are switched to for the time of one."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.splitlines()[0])
    common.add_model_flags(parser)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=9, help="tokens to generate in each timed run")
    parser.add_argument("--plans", type=int, default=20, help="random plans to count compilations over")
    parser.add_argument(
        "--layer_spec",
        action="append",
        help="a plan to time, again for more; default: long, pruned, shuffled",
    )
    parser.add_argument("--bandwidth_mib", type=int, default=1024, help="buffer of the bandwidth measurement")
    args = parser.parse_args(argv)
    for name, least in (("prompt", 1), ("new", 2), ("plans", 1), ("bandwidth_mib", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    return args


def default_plans(num_layers: int) -> list[LayerPlan]:
    """Half as long again, every other layer, and all layers shuffled."""
    order = list(range(num_layers))
    random.Random(0).shuffle(order)
    specs = (f"0:{num_layers},{num_layers // 2}:{num_layers}", "::2", ",".join(map(str, order)))
    return [LayerPlan.parse(spec, num_layers) for spec in specs]


def random_plan(rng: random.Random, num_layers: int, most: int) -> LayerPlan:
    """Any layers in any order, 1 to `most` slots."""
    length = rng.randint(1, most)
    return LayerPlan(tuple(Slot(rng.randrange(num_layers)) for _ in range(length)), num_layers)


# --- switching


def measure_switching(engine: Engine, most: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to switch plans, and compilations and weight bytes over random plans in one session."""
    rng = random.Random(1)
    layers = engine.config.num_layers
    plans = [random_plan(rng, layers, most) for _ in range(args.plans)]
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(functools.partial(_note_compilation, compiled))
    before = _live_bytes()
    decodes, prefills = _executables(steps.decode), _executables(steps.prefill)
    session = engine.session(plans[0], max_slots=most)
    prompt = common.random_prompts(engine.config, 1, 8)
    first = 0
    for number, plan in enumerate(plans):
        session.set_plan(plan)
        common.set_prompts(session, prompt)
        for _ in generate(session, max_new_tokens=2):
            pass
        first = first if number else len(compiled)
    decodes = _executables(steps.decode) - decodes
    prefills = _executables(steps.prefill) - prefills

    times = []
    for number in range(SWITCHES):
        plan = plans[number % len(plans)]
        start = time.perf_counter()
        session.set_plan(plan)
        times.append(time.perf_counter() - start)
    cache_bytes = session.cache_bytes
    extra = _live_bytes() - before - cache_bytes
    return {
        "switch_us": statistics.median(times) * 1e6,
        "random_plans": len(plans),
        "decode_compilations": decodes,
        "prefill_compilations": prefills,
        "compilations_after_first_plan": len(compiled) - first,
        "cache_bytes": cache_bytes,
        # Small arrays (sampling parameters, a token) may live on; a layer would be megabytes.
        "extra_weight_bytes": extra if extra >= _layer_bytes(engine) else 0,
    }


def _note_compilation(compiled: list[float], event: str, duration_secs: float, **_: str | int) -> None:
    if event.endswith("backend_compile_duration"):
        compiled.append(duration_secs)


def _executables(jitted: Any) -> int:
    return jitted._cache_size()


def _live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def _layer_bytes(engine: Engine) -> int:
    stacks = [value.nbytes for name, value in engine.params.items() if name.startswith("layers.")]
    return min(stacks) // engine.config.num_layers


# --- decode time against an unrolled checkpoint


def measure_plan(engine: Engine, plan: LayerPlan, args: argparse.Namespace) -> dict[str, Any]:
    """Decode time of a plan and of the same runtime on the unrolled checkpoint, in turn."""
    layers = [slot.layer for slot in plan.slots]
    unrolled = Engine(
        unrolled_config(engine.config, layers),
        common.gathered_params(engine.params, layers),
        kernels=engine.kernels.name,
    ).session()
    planned = engine.session(plan)
    prompts = common.random_prompts(engine.config, 1, args.prompt)
    for session in (planned, unrolled):
        common.prefill_s(session, prompts)
    steps = _in_turn(
        lambda: common.decode_step_s(planned, args.prompt, args.new),
        lambda: common.decode_step_s(unrolled, args.prompt, args.new),
    )
    return {
        "layer_spec": str(plan),
        "slots": len(plan.executed()),
        "decode_ms": steps[0].median * 1e3,
        "unrolled_ms": steps[1].median * 1e3,
        "ratio": common.median_ratio(*steps),
        "ratio_of_best": steps[0].range[0] / steps[1].range[0],
        "decode_ms_range": [seconds * 1e3 for seconds in steps[0].range],
        "unrolled_ms_range": [seconds * 1e3 for seconds in steps[1].range],
        "same_tokens": planned.ids == unrolled.ids,
    }


def unrolled_config(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[layer] for layer in layers)

    return dataclasses.replace(
        config,
        num_layers=len(layers),
        layer_ropes=pick(config.layer_ropes),
        layer_windows=pick(config.layer_windows),
        layer_attn_scales=pick(config.layer_attn_scales),
    )


def _in_turn(*functions: Callable[[], float]) -> list[common.Measured]:
    """Calls the functions in turn: once to compile, then `REPEATS` times, the first in turn last."""
    values: list[list[float]] = [[function()] for function in functions]
    for repeat in range(common.REPEATS):
        order = list(enumerate(functions))
        for index, function in order if repeat % 2 == 0 else reversed(order):
            values[index].append(function())
    return [common.Measured(tuple(each[1:])) for each in values]


# --- the plain XLA baseline


def measure_plain(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Decode time of the whole model, and of plain XLA on separate arrays of the same weights, in turn."""
    session = engine.session()
    prompts = common.random_prompts(engine.config, 1, args.prompt)
    common.prefill_s(session, prompts)
    for _ in generate(session, max_new_tokens=args.new):
        pass
    ids = list(session.ids[0])
    plain = _PlainDecoder(engine, session)
    same = plain.tokens(ids, args.prompt) == ids[args.prompt + 1 :]
    steps = _in_turn(
        lambda: common.decode_step_s(session, args.prompt, args.new),
        lambda: plain.step_s(ids, args.prompt),
    )
    return {
        "decode_ms": steps[0].median * 1e3,
        "decode_ms_range": [seconds * 1e3 for seconds in steps[0].range],
        "plain_xla_ms": steps[1].median * 1e3,
        "plain_xla_ms_range": [seconds * 1e3 for seconds in steps[1].range],
        "ratio": common.median_ratio(*steps),
        "ratio_of_best": steps[0].range[0] / steps[1].range[0],
        "same_tokens": same,
    }


class _PlainDecoder:
    """What one writes first: a Python loop over layers, each with its own arrays and its own cache.

    Only what the llama and qwen2 shapes need. The activations are float32, as the runtime's are on CPU;
    quantized weights are dequantized where they are used.
    """

    def __init__(self, engine: Engine, session: Session):
        config, cache = engine.config, session._cache
        assert cache is not None
        arrays = jax.tree.map(lambda array: _as_float(np.asarray(array)), engine.params)
        self.top = {n: jax.device_put(v, may_alias=True) for n, v in arrays.items() if "layers." not in n}
        self.layers = [
            {
                name.removeprefix("layers."): jax.tree.map(functools.partial(_layer_on_device, layer), stack)
                for name, stack in arrays.items()
                if name.startswith("layers.")
            }
            for layer in range(config.num_layers)
        ]
        self.caches = [(jnp.array(cache.k[p]), jnp.array(cache.v[p])) for p in range(config.num_layers)]
        self.step = jax.jit(functools.partial(_plain_step, config), donate_argnums=2)

    def tokens(self, ids: Sequence[int], prompt: int) -> list[int]:
        """The greedy choice after each token from the first generated one to the last but one."""
        out = []
        for position in range(prompt, len(ids) - 1):
            token, self.caches = self.step(self.layers, self.top, self.caches, ids[position], position)
            out.append(int(token))
        return out

    def step_s(self, ids: Sequence[int], prompt: int) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        count = len(self.tokens(ids, prompt))
        return (time.perf_counter() - start) / count


def _as_float(values: np.ndarray) -> np.ndarray:
    return values.view(ml_dtypes.bfloat16) if values.dtype == np.uint16 else values


def _layer_on_device(layer: int, stack: np.ndarray) -> jax.Array:
    out = common.aligned_empty(stack.shape[1:], stack.dtype)
    out[...] = stack[layer]
    return jax.device_put(out, may_alias=True)


def _plain_step(
    config: ModelConfig,
    layers: list[Params],
    top: Params,
    caches: list[tuple[jax.Array, jax.Array]],
    token: jax.Array,
    position: jax.Array,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """One token of one sequence: its id and position -> the next id."""
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps)
        return x * weight.astype(jnp.float32)

    def linear(w: Params, name: str, x: jax.Array) -> jax.Array:
        weight = widen(w[f"{name}.weight"])
        y = jnp.dot(x, weight.T.astype(x.dtype), preferred_element_type=jnp.float32)
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    cos, sin = rope_cos_sin(config.ropes, jnp.reshape(position, (1, 1)), jnp.reshape(position + 1, (1,)))
    x = embedding_rows(top["embed.weight"], token)[None].astype(jnp.float32)
    new_caches = []
    for w, (keys, values) in zip(layers, caches, strict=True):
        y = norm(x, w["attn_norm.weight"])
        q = rotate(linear(w, "q", y).reshape(1, 1, n, h), cos[0], sin[0]).reshape(k, n // k, h)
        new = (
            rotate(linear(w, "k", y).reshape(1, 1, k, h), cos[0], sin[0]),
            linear(w, "v", y).reshape(1, 1, k, h),
        )
        keys, values = (
            jax.lax.dynamic_update_slice(c, r.transpose(0, 2, 1, 3).astype(c.dtype), (0, 0, position, 0))
            for c, r in zip((keys, values), new, strict=True)
        )
        new_caches.append((keys, values))
        scores = jnp.einsum("kgh,ksh->kgs", q, keys[0]) / h**0.5
        scores = jnp.where(jnp.arange(scores.shape[-1]) <= position, scores, -jnp.inf)
        mixed = jnp.einsum("kgs,ksh->kgh", jax.nn.softmax(scores), values[0])
        x = x + linear(w, "o", mixed.reshape(1, n * h))
        y = norm(x, w["mlp_norm.weight"])
        x = x + linear(w, "down", jax.nn.silu(linear(w, "gate", y)) * linear(w, "up", y))
    head = top["embed.weight" if config.tied_embeddings else "lm_head.weight"]
    logits = jnp.dot(norm(x, top["norm.weight"]), widen(head).T.astype(x.dtype))
    return jnp.argmax(logits[0]), new_caches


# --- the command


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark; the result is the JSON object."""
    num_layers = common.shape_config(args.shape).num_layers
    plans = [LayerPlan.parse(spec, num_layers) for spec in args.layer_spec or ()]
    plans = plans or default_plans(num_layers)
    engine = common.make_engine(args)
    bandwidth = common.ReadBandwidth(args.bandwidth_mib)
    read = [bandwidth.gb_s()]
    switching = measure_switching(engine, max(len(plan) for plan in plans), args)
    cases = []
    for plan in plans:
        cases.append(measure_plan(engine, plan, args))
        read.append(bandwidth.gb_s())
    plain = measure_plain(engine, args)
    read.append(bandwidth.gb_s())
    return {
        **common.model_fields(engine, args),
        "prompt": args.prompt,
        "new": args.new,
        "weight_bytes": sum(value.nbytes for value in engine.params.values()),
        **switching,
        "plans": cases,
        "plain_xla": plain,
        "read_bandwidth_gb_s": statistics.median(read),
        "peak_rss_bytes": common.peak_rss_bytes(),
        **common.facts(),
    }


def print_report(result: dict[str, Any]) -> None:
    """The result for a person."""
    r = result
    rows = [
        ("model", f"{common.model_line(r)}, {r['weight_bytes'] / 1e9:.2f} GB"),
        ("to switch", f"{r['switch_us']:.0f} microseconds"),
        (
            "compilations",
            f"{r['decode_compilations']} decode, {r['prefill_compilations']} prefill over "
            f"{r['random_plans']} random plans; {r['compilations_after_first_plan']} after the first plan",
        ),
        ("extra weights", f"{r['extra_weight_bytes']} bytes"),
    ]
    for case in r["plans"]:
        same = "same tokens" if case["same_tokens"] else "OTHER TOKENS"
        rows.append(
            (
                f"{case['slots']} slots",
                f"{case['decode_ms']:.1f} ms a step, unrolled checkpoint {case['unrolled_ms']:.1f} ms, "
                f"ratio {case['ratio']:.3f} (of the best {case['ratio_of_best']:.3f}), {same}: "
                f"{case['layer_spec']}",
            )
        )
    plain = r["plain_xla"]
    rows += [
        (
            "plain XLA",
            f"{plain['plain_xla_ms']:.1f} ms a step, this runtime {plain['decode_ms']:.1f} ms, "
            f"ratio {plain['ratio']:.3f} (of the best {plain['ratio_of_best']:.3f})",
        ),
        ("read bandwidth", f"{r['read_bandwidth_gb_s']:.1f} GB/s"),
        ("machine", f"{r['cpu']}, {r['cores']} cores; {r['device']}; jax {r['jax']}"),
    ]
    common.print_table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return common.report(lambda: measure(args), print_report)


if __name__ == "__main__":
    sys.exit(main())
