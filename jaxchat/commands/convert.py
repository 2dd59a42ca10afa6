"""`jaxchat convert`: models, from Hugging Face's layout or GGUF to native or Orbax, and back."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from jaxchat.adapter_use import Uses, read_uses, refuse_recipe
from jaxchat.cli.command_line import Command, Ended, catch_interrupts, complain
from jaxchat.cli.model_flags import DTYPES, KEEP, MODEL_PATH_NEEDS, ModelPaths, RecipeFile
from jaxchat.errors import UsageError
from jaxchat.options import Flag

if TYPE_CHECKING:
    from jaxchat.checkpoints.assembly import Assembly
    from jaxchat.checkpoints.directory import ModelDirectory
    from jaxchat.checkpoints.manifest import Manifest

_USAGE = """\
usage: {program} (--src DIR | --recipe FILE) --dst DIR [...]

Converts models: Hugging Face's layout, GGUF and others -> native (mapped,
starts at once) or Orbax, and back, or to GGUF; as they are, quantized, or under
a layer plan.

  {program} --src llama-3.2-1b --dst llama-1b --dtype bfloat16
  {program} --src llama-3.2-1b --dst llama-1b-int4 --quant int4
  {program} --src llama-3.2-1b --dst llama-1b-orbax --format orbax
  {program} --src llama-1b --dst llama-1b-hf --to_hf
  {program} --src llama-1b --dst llama-1b.gguf --to_gguf --quant q4_k_m
  {program} --src llama-3-8b --dst llama-13b --to_hf \\
      --layer_spec 0:8,4:12,8:16,12:
  {program} --src llama-3-8b --dst poet-hf --to_hf --adapter loras/poet
  {program} --recipe expanded.yaml --dst openchat-9b \\
      --model_path openchat=models/openchat
"""
_ONLY = {"max_shard_bytes": ("to_hf",), "dequantize": ("to_hf", "to_gguf")}
"""Flags that are of use with some others only."""
_NEVER = {
    "to_hf": ("dtype", "quant", "keep", "format", "plan", "to_gguf"),
    "to_gguf": ("dtype", "keep", "format", "plan"),
}
"""Flag -> those that make no sense beside it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """What to read, what to write, and how to store it."""

    src: Annotated[
        str | None,
        Flag(
            help="The model directory, or GGUF file, to read",
            example="--src Llama-3.2-1B-Instruct, --src model-Q4_K_M.gguf",
            value="DIR",
        ),
    ] = None
    base: Annotated[
        str | None,
        Flag(
            help="The model to which --src is the difference: some are published only so (Vicuna v0, Koala, "
            "StableVicuna); what is written is the sum of the two",
            example="--src vicuna-7b-delta-v1.1 --base llama-7b",
            elsewhere=("base_model_path", "base_model"),
            value="DIR",
        ),
    ] = None
    dst: Annotated[
        str | None, Flag(help="The directory to create", example="--dst llama-1b", value="DIR")
    ] = None
    layer_spec: Annotated[
        str | None,
        Flag(
            help="A layer plan: the layers of the result, in this order, in any notation that generate "
            "takes; it counts the slots of a recipe, or of the plan that --src records, if there is one",
            example="--layer_spec 0:8,4:12,8:",
            value="LAYERS",
        ),
    ] = None
    recipe: RecipeFile = None
    model_path: ModelPaths = dataclasses.field(default_factory=dict)
    plan: Annotated[
        Literal["record", "bake"],
        Flag(
            help="What becomes of the layer plan: record stores each layer once, and the plan, under which "
            "the result then runs; bake stores every slot as a layer of its own, an ordinary model, as "
            "--to_hf always does",
            example="--plan bake",
            value="HOW",
        ),
    ] = "record"
    dtype: Annotated[
        str | None,
        Flag(
            help="Store what is not quantized in this type instead of the one it has",
            example="--dtype bfloat16",
            value="TYPE",
            choices=DTYPES,
        ),
    ] = None
    quant: Annotated[
        str | None,
        Flag(
            help="Quantize the weights: int8 or int4, optionally with a group :32 :64 :128 :channel and "
            "with :affine (offsets, too), :plain (scales without a search) and :f32 (wider scales), or "
            "llama.cpp's q8_0 q4_0 q4_1 q5_0 q5_1 q4_k q5_k q6_k; norms stay as they are, and below 8 bits "
            "embedding and head get 8, of K-quants 6",
            example="--quant int4, --quant int8:channel",
            value="FORMAT",
        ),
    ] = None
    keep: Annotated[Literal["small", "exact"], KEEP] = "small"
    format: Annotated[
        Literal["native", "orbax"],
        Flag(
            help="native is mapped from disk without loading; orbax is for restoring onto many devices or "
            "hosts",
            example="--format orbax",
            value="FORMAT",
        ),
    ] = "native"
    to_hf: Annotated[
        bool,
        Flag(
            help="Write a converted directory, or a GGUF file, in Hugging Face's layout",
            example="--src llama-1b --dst hf --to_hf",
        ),
    ] = False
    to_gguf: Annotated[
        bool,
        Flag(
            help="Write one GGUF file, which llama.cpp and its kin load; --quant is then one of f32 f16 bf16 "
            "q8_0 q4_0 q4_1 q5_0 q5_1 q4_k_s q4_k_m q5_k_s q5_k_m q6_k, and what is stored if not given",
            example="--src llama-1b --dst llama-1b.gguf --to_gguf --quant q4_k_m",
        ),
    ] = False
    adapter: Annotated[
        Uses,
        Flag(
            help="Merge a LoRA adapter (PEFT's, or in GGUF) into the weights, in float32 and rounded once; "
            "=STRENGTH merges that much of it. May be given more than once. Of quantized weights the "
            "originals are gone: into those it merges only with --quant (or --to_hf --dequantize), which "
            "rounds them anew",
            example="--adapter loras/poet, --adapter loras/poet=0.5",
            elsewhere=("lora", "lora_path", "lora_scaled"),
            value="DIR[=STRENGTH]",
            many=True,
            read=lambda texts: read_uses(texts, "--adapter"),
        ),
    ] = ()
    max_shard_bytes: Annotated[
        int,
        Flag(
            help="With --to_hf: split the weights into files of at most this size",
            example="--max_shard_bytes 2000000000",
            low=1,
        ),
    ] = 5_000_000_000
    dequantize: Annotated[
        bool,
        Flag(
            help="With --to_hf: write quantized weights as the numbers they stand for; with --to_gguf: "
            "quantize them again",
            example="--to_hf --dequantize",
        ),
    ] = False
    overwrite: Annotated[
        bool, Flag(help="Replace --dst if it is a model directory already", example="--overwrite")
    ] = False


def _run(request: ConvertRequest, given: frozenset[str]) -> int:
    _refuse(request, given)
    started = time.monotonic()
    try:
        manifest = _written(request)
    except (KeyboardInterrupt, Ended):
        complain(f"interrupted; nothing was left in {request.dst}; run the same command again to start over")
        raise
    dst = Path(str(request.dst))
    size = sum(path.stat().st_size for path in (dst, *dst.rglob("*")) if path.is_file())
    seconds = time.monotonic() - started
    print(f"{request.dst}: {manifest.parameters:,} parameters, {size:,} bytes, {seconds:.1f} s")
    return 0


def _refuse(request: ConvertRequest, given: frozenset[str]) -> None:
    if request.src and request.recipe:
        raise UsageError("both --src and --recipe are given; the recipe says which models it is made from")
    needed = ("dst",) if request.recipe else ("src", "dst")
    if missing := [f"--{name}" for name in needed if name not in given]:
        raise UsageError(f"{' and '.join(missing)} must be given; --help shows examples")
    for flag, names in _NEVER.items():
        if refused := [name for name in names if flag in given and name in given]:
            raise UsageError(f"--{refused[0]} cannot be combined with --{flag}")
    for name, flags in _ONLY.items():
        if name in given and not given & set(flags):
            raise UsageError(f"--{name} needs {' or '.join(f'--{flag}' for flag in flags)}")
    if request.adapter and request.recipe:
        raise refuse_recipe("--adapter")
    if request.base and request.recipe:
        raise UsageError("--base and --recipe are given; a base is what --src is added to")


def _written(request: ConvertRequest) -> "Manifest":
    # Imports JAX, which --help and usage errors need not wait for.
    from jaxchat.checkpoints import write
    from jaxchat.checkpoints.gguf_write import mixture_of
    from jaxchat.checkpoints.quantized import Quant
    from jaxchat.cli.progress_bar import copying_bar
    from jaxchat.quant import QuantFormat

    catch_interrupts()
    if request.to_gguf:
        mixture_of(request.quant)
    quant: Quant = "auto" if request.quant is None or request.to_gguf else QuantFormat.parse(request.quant)
    source = _source(request)
    with copying_bar("converting") as progress:
        if request.to_gguf:
            return write.to_gguf(
                source,
                str(request.dst),
                layer_spec=request.layer_spec,
                quant=request.quant,
                dequantize=request.dequantize,
                overwrite=request.overwrite,
                progress=progress,
            )
        if request.to_hf:
            return write.to_hf(
                source,
                str(request.dst),
                layer_spec=request.layer_spec,
                max_shard_bytes=request.max_shard_bytes,
                dequantize=request.dequantize,
                overwrite=request.overwrite,
                progress=progress,
            )
        return write.convert(
            source,
            str(request.dst),
            layer_spec=request.layer_spec,
            plan=request.plan,
            dtype=request.dtype,
            quant=quant,
            keep=request.keep,
            format=request.format,
            overwrite=request.overwrite,
            progress=progress,
        )


def _source(request: ConvertRequest) -> "Assembly | ModelDirectory":
    """What to convert: a directory, or what a recipe assembles; its remarks go to standard error."""
    from jaxchat.checkpoints.delta import model_at

    if request.recipe is None:
        source = model_at(str(request.src), request.base)
        if not request.adapter:
            return source
        from jaxchat.checkpoints.merged import merged_directory

        anew = request.quant is not None or request.dequantize
        return merged_directory(source, request.adapter, dequantized=anew)
    from jaxchat.recipes.recipe import read_recipe

    assembly = read_recipe(request.recipe, request.model_path)
    for note in assembly.notes:
        complain(f"note: {note}")
    return assembly


COMMAND = Command(
    usage=_USAGE,
    request=ConvertRequest,
    run=_run,
    stray="give directories as --src DIR --dst DIR",
    needs=(MODEL_PATH_NEEDS,),
)
