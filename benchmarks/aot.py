"""Compiles the engine's steps and its draw of tokens for a chip that is not here, and says what they need.

    python -m benchmarks.aot --target v5e --shape llama-3-8b --quant int4
    python -m benchmarks.aot --target v6e --shape llama-3-8b --quant int8 --mesh 2x2
    python -m benchmarks.aot --target sm_90 --shape llama-3-8b --quant int4

Nothing is run. TPU targets need `pip install "jaxchat[tpu]"` (libtpu compiles without a TPU), sm_90 (an H200)
needs `pip install "jaxchat[cuda]"` and CUDA's ptxas, but no driver. The last line is one JSON object. Its
roofline is bandwidth alone: the bytes of a decode step at the rate the chip reads memory.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import common
from jaxchat import quant, sharding
from jaxchat.analysis import cost
from jaxchat.config import ModelConfig
from jaxchat.engine import session, steps
from jaxchat.engine.sampling import SamplingParams
from jaxchat.engine.session import prepared
from jaxchat.errors import UsageError
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.cache import KVCache, cache_sharding, empty_cache
from jaxchat.layers.step import Params, Step
from jaxchat.pallas import Kernels
from jaxchat.pallas.backends import pallas_gpu, pallas_tpu


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
      chip: `--target`.
      device: the entry of `cost.DEVICES` it is.
      devices: gives the devices of a mesh, described by the compiler.
      kernels: what makes the implementations that run there.
    """

    chip: str
    device: str
    devices: Callable[[int], Sequence[Any]]
    kernels: Callable[[], Kernels]

    @property
    def bandwidth(self) -> float:
        """Bytes a second a device reads from its memory."""
        return cost.DEVICES[self.device].bandwidth


def _tpu_devices(one: str, four: str) -> Callable[[int], Sequence[Any]]:
    """What describes one TPU, and four of them, by their topologies' names."""

    def devices(count: int) -> Sequence[Any]:
        if importlib.util.find_spec("libtpu") is None:
            raise UsageError('--target needs libtpu to compile with: pip install "jaxchat[tpu]"')
        # Keeps libtpu from looking for a TPU, and for the cloud machine around it.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_WORKER_ID", "0")
        from jax.experimental import topologies

        options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
        name = one if count == 1 else four
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices[:count]

    return devices


_H200 = """
platform_name: "CUDA"
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  device_memory_size: 150754820096
}
"""
"""What XLA asks a GPU for, of an H200: NVIDIA's data sheet and the CUDA programming guide's limits of 9.0."""


def _h200_devices(count: int) -> Sequence[Any]:
    if count != 1:
        raise UsageError("--target sm_90 compiles for one GPU: leave --mesh out")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UsageError('--target sm_90 needs the CUDA compiler of JAX: pip install "jaxchat[cuda]"')
    if ptxas := shutil.which("ptxas"):
        flag = f"--xla_gpu_cuda_data_dir={Path(ptxas).parents[1]}"
        os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}"
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=_H200
    )
    return description.devices


TARGETS = {
    target.chip: target
    for target in (
        Target("v5e", "v5e", _tpu_devices("v5e:1x1", "v5e:2x2"), pallas_tpu),
        Target("v6e", "v6e", _tpu_devices("v6e:1x1", "v6e:2x2"), pallas_tpu),
        Target("tpu7x", "tpu7x", _tpu_devices("tpu7x:1x1x1", "tpu7x:2x2x1"), pallas_tpu),
        Target("sm_90", "h200", _h200_devices, pallas_gpu),
    )
}
"""What `--target` accepts."""

MESHES = {"1x1": 1, "2x2": 4}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="v5e", help=f"chip: {', '.join(TARGETS)}")
    parser.add_argument("--shape", choices=sorted(common.SHAPES), default="llama-3-8b", help="model shape")
    parser.add_argument(
        "--quant", default="int4", help="of the weights, as in jaxchat.generate; none: bfloat16"
    )
    parser.add_argument("--kv_dtype", default="bfloat16", help="of the KV cache, as in jaxchat.generate")
    parser.add_argument("--mesh", choices=sorted(MESHES), default="1x1", help="2x2: four devices, one model")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--context", type=int, default=2048, help="rows of the KV cache")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prefill step")
    parser.add_argument("--layers", type=int, help="only so many layers; default the shape's own")
    args = parser.parse_args(argv)
    for name in ("batch", "context", "prompt"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    return args


def devices_of(target: Target, mesh: str) -> Sequence[Any]:
    """The devices to compile for.

    Raises:
      UsageError: their compiler is not installed, or they make no such mesh.
    """
    return target.devices(MESHES[mesh])


class Steps:
    """The abstract arguments of the engine's steps: shapes, dtypes and where they lie; no data."""

    def __init__(
        self,
        config: ModelConfig,
        target: Target,
        mesh: str,
        fmt: quant.QuantFormat | None,
        kv_dtype: str = "bfloat16",
    ):
        devices = np.array(devices_of(target, mesh)).reshape(1, -1)
        self.config = config
        self.mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        self.kernels = target.kernels()
        self.dtype = jnp.dtype(jnp.bfloat16)
        self.kv_dtype = session.read_kv_dtype(kv_dtype)
        loaded = {param.name: self._parameter(param, fmt) for param in parameter_table(config)}
        self.params: Params = prepared(self.kernels, self.config, loaded)

    def _parameter(self, param: Any, fmt: quant.QuantFormat | None) -> Any:
        where = sharding.param_sharding(param, self.config, self.mesh)
        shape = param.stacked_shape(self.config)
        chosen = quant.format_for(param, fmt)
        if chosen is None:
            return jax.ShapeDtypeStruct(shape, self.dtype, sharding=where)
        return jax.tree.map(lambda part: self._part(part, where), quant.empty(shape, chosen))

    def _part(self, part: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        # A scale a row cannot be split along the row.
        spec = (*where.spec, *(None,) * (part.ndim - len(where.spec)))
        spec = tuple(
            axis if axis and size % self.mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, part.shape, strict=True)
        )
        placed = NamedSharding(self.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=placed)

    def cache(self, batch: int, capacity: int) -> KVCache:
        """The KV cache [P, B, K, S, H], sharded as the engine does."""
        make = functools.partial(
            empty_cache, self.config, slots=self.config.num_layers, batch=batch, capacity=capacity
        )
        where = cache_sharding(self.config, self.mesh, batch)
        return self._placed(jax.eval_shape(lambda: make(dtype=self.kv_dtype)), where)

    def everywhere(self, tree: Any) -> Any:
        """Small state: whole on each device."""
        return self._placed(tree, NamedSharding(self.mesh, PartitionSpec()))

    def _placed(self, tree: Any, where: NamedSharding) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)

    def compile_decode(self, batch: int, capacity: int) -> Any:
        """The executable that appends one token to each sequence."""
        ints = np.zeros(batch, np.int32)
        return self._compile(steps.decode, self.cache(batch, capacity), ints, ints)

    def compile_prefill(self, batch: int, capacity: int, tokens: int) -> Any:
        """The executable that appends a chunk of a prompt."""
        ids = np.zeros((batch, tokens), np.int32)
        return self._compile(steps.prefill, self.cache(batch, capacity), ids, np.zeros(batch, np.int32))

    def compile_draw(self, batch: int) -> Any:
        """The executable that draws each sequence's next token."""
        shape = batch, self.config.vocab_size
        # Split over the vocabulary where the head is, as the steps leave them.
        split = "model" if self.config.vocab_size % self.mesh.shape["model"] == 0 else None
        where = NamedSharding(self.mesh, PartitionSpec(None, split))
        logits = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        mask, counts = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (bool, jnp.int32))
        seeds, positions = np.zeros(batch, np.uint32), np.zeros(batch, np.int32)
        state = (SamplingParams.make(batch), seeds, positions, mask, counts, mask)
        return steps.sample.lower(logits, *self.everywhere(state)).compile()

    def _plan(self) -> Any:
        return LayerPlan.identity(self.config.num_layers).arrays(self.config.num_layers)

    def _compile(self, run: Any, cache: KVCache, tokens: np.ndarray, rows: np.ndarray) -> Any:
        plan, ids, ints = self.everywhere((self._plan(), tokens, rows))
        step = Step(
            config=self.config,
            dtype=self.dtype,
            kernels=self.kernels,
            params=self.params,
            plan=plan,
            tokens=ids,
            lengths=ints,
            new=ints,
            context=ints,
        )
        return run.lower(step, cache).compile()


def large_copies(compiled: Any, least_bytes: int) -> list[str]:
    """Instructions of an executable that copy, or lay out anew, arrays of at least so many bytes."""
    found = []
    for match in _COPY.finditer(compiled.as_text()):
        kind, dims = match["type"], [int(n) for n in match["dims"].split(",") if n]
        bits = int(re.sub(r"\D", "", kind.replace("bf16", "16").replace("pred", "8"))[-2:] or 8)
        if int(np.prod(dims, dtype=np.int64)) * bits // 8 >= least_bytes:
            found.append(match[0])
    return found


_COPY = re.compile(
    r"%\S+ = \(?(?P<type>[a-z]+\d*)\[(?P<dims>[\d,]*)\]\S* (?:copy|copy-start|transpose|all-gather)\("
)


def figures(compiled: Any, seconds: float) -> dict[str, Any]:
    """What `memory_analysis` says of an executable, in bytes on each device."""
    memory = compiled.memory_analysis()
    return {
        "compile_s": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "large_copies": len(large_copies(compiled, 1 << 24)),
    }


def timed(compile_step: Callable[[], Any]) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = compile_step()
    return figures(compiled, time.perf_counter() - start)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles both steps and the draw; the result is the JSON object."""
    if args.target not in TARGETS:
        raise UsageError(f"--target {args.target} is not supported; choose one of {', '.join(TARGETS)}")
    target, config = TARGETS[args.target], common.shape_config(args.shape)
    if args.layers:
        config = dataclasses.replace(
            config,
            num_layers=args.layers,
            layer_ropes=config.layer_ropes[: args.layers],
            layer_windows=config.layer_windows[: args.layers],
            layer_attn_scales=config.layer_attn_scales[: args.layers],
        )
    steps = Steps(config, target, args.mesh, quant.QuantFormat.parse(args.quant), args.kv_dtype)
    decode = timed(lambda: steps.compile_decode(args.batch, args.context))
    prefill = timed(lambda: steps.compile_prefill(args.batch, args.context, args.prompt))
    draw = timed(lambda: steps.compile_draw(args.batch))

    plan = LayerPlan.identity(config.num_layers)
    weight_bytes = common.weight_bytes_per_step(config, _with_nbytes(steps.params), plan)
    kv_bytes = cost.kv_bytes_read(config, plan, args.context, steps.kv_dtype.name)
    step_bytes = weight_bytes + args.batch * kv_bytes
    devices = MESHES[args.mesh]
    return {
        "ok": True,
        "target": args.target,
        "shape": args.shape,
        "layers": config.num_layers,
        "quant": args.quant,
        "kv_dtype": args.kv_dtype,
        "mesh": args.mesh,
        "batch": args.batch,
        "context": args.context,
        "prompt": args.prompt,
        "argument_bytes": decode["argument_bytes"],
        "temp_bytes": decode["temp_bytes"],
        "weight_bytes_per_token": weight_bytes // args.batch,
        "bytes_per_token": step_bytes // args.batch,
        "bandwidth_gb_s": devices * target.bandwidth / 1e9,
        "roofline_tok_s": args.batch * devices * target.bandwidth / step_bytes,
        "decode": decode,
        "prefill": prefill,
        "draw": draw,
        "run_on_hardware": False,
        "jax": jax.__version__,
    }


def _with_nbytes(params: Params) -> Params:
    """The parameters as zero-stride numpy arrays: abstract ones do not say how many bytes they take."""
    return jax.tree.map(lambda part: np.broadcast_to(np.zeros((), part.dtype), part.shape), params)


def print_report(result: dict[str, Any]) -> None:
    """The result for a person."""
    r = result
    rows = [
        ("model", f"{r['shape']}, {r['quant']}, {r['layers']} layers, batch {r['batch']}"),
        ("target", f"{r['target']}, mesh {r['mesh']}; compiled, not run"),
        (
            "bytes per token",
            f"{r['bytes_per_token'] / 1e6:.1f} MB, {r['weight_bytes_per_token'] / 1e6:.1f} of them weights "
            f"({r['kv_dtype']} KV cache of {r['context']} rows)",
        ),
        ("roofline", f"{r['roofline_tok_s']:.1f} tokens/s at {r['bandwidth_gb_s']:.0f} GB/s"),
    ]
    for name, label in (("decode", "decode step"), ("prefill", "prefill step"), ("draw", "draw of tokens")):
        step = r[name]
        rows.append(
            (
                label,
                f"{step['argument_bytes'] / 1e6:.1f} MB arguments and {step['temp_bytes'] / 1e6:.1f} MB "
                f"temporaries a device, {step['large_copies']} large copies, "
                f"compiles in {step['compile_s']:.1f} s",
            )
        )
    common.print_table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # The CPU is where arrays of this process live; another plugin would look for its hardware.
    jax.config.update("jax_platforms", "cpu")
    return common.report(lambda: measure(args), print_report)


if __name__ == "__main__":
    sys.exit(main())
