"""Which model, under which plan, loaded how: the flags that commands share, and the model they choose."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from jaxchat import demo
from jaxchat.cli.command_line import Need
from jaxchat.errors import UsageError
from jaxchat.options import KV_DTYPES, Flag

if TYPE_CHECKING:
    from jaxchat.adapter_use import Uses
    from jaxchat.checkpoints.load import Progress
    from jaxchat.cli.chosen_model import ChosenModel
    from jaxchat.runtime import Model

DTYPES = ("float32", "bfloat16", "float16")
KERNELS = ("auto", "reference", "native", "pallas")

_flag = functools.partial(Flag, group="Model")

MODEL = _flag(
    help="The model: a directory as on Hugging Face, or one that `jaxchat convert` wrote; a GGUF file, of "
    "several parts the first; a name on the Hub, as org/name, org/name@revision or, of GGUF files, "
    "org/name:Q4_K_M, which is fetched once; a short name, as :qwen2.5:1.5b; assistant, a small one that is "
    "fetched the first time; or box, the model in the box, unless there is a folder of that name",
    example="-m models/llama-3-8b, -m model-Q4_K_M.gguf, -m Qwen/Qwen2.5-0.5B-Instruct, -m assistant",
    elsewhere=("model_dir", "checkpoint", "hf", "hf_repo"),
    value="DIR",
    short="m",
)
LAYER_SPEC = _flag(
    help="The layers to run, in this order: numbers and Python slices, as 0:8,4:12,8: to repeat layers, "
    "0:10,10:20:2,20: to leave some out, ::-1 to reverse; or a JSON list with scales, as '[0, [1, 0.5, "
    "1.0], 2]'; or RYS '(4,8)' (layers 0 to 7, then from 4 on), exllamav2's '[(0,8),(4,12)]', whose "
    "last range runs on to the end of the model, or @FILE, "
    "which holds any of these",
    example="--layer_spec 0:8,4:12,8:",
    elsewhere=("layers",),
    value="LAYERS",
)
BASE = _flag(
    help="The model to which --model is the difference: some are published only so (Vicuna v0, Koala, "
    "StableVicuna), and are the sum of the two",
    example="-m vicuna-7b-delta-v1.1 --base llama-7b",
    elsewhere=("base_model_path", "base_model"),
    value="DIR",
)
BoxedModel = Annotated[str | None, dataclasses.replace(MODEL, help=f"{MODEL.help}. If not given, box")]
"""For commands that have a model of their own to fall back on, see `ModelFlags.or_boxed`."""

DTYPE = _flag(
    help="Convert the weights to float32, bfloat16 or float16; as stored if not given",
    example="--dtype bfloat16",
    elsewhere=("torch_dtype",),
    value="TYPE",
    choices=DTYPES,
)
QUANT = _flag(
    help="Quantize the weights while loading: int8 or int4, optionally with a group :32 :64 :128 :channel "
    "and with :affine (offsets, too), :plain (scales without a search) and :f32 (wider scales), or "
    "llama.cpp's q8_0 q4_0 q4_1 q5_0 q5_1 q4_k q5_k q6_k; as stored if not given. `jaxchat convert --quant` "
    "does it once and for all",
    example="--quant int4, --quant int8:channel",
    elsewhere=("load_in_4bit", "load_in_8bit", "q_bits", "quantize", "quantization"),
    value="FORMAT",
)
KEEP = _flag(
    help="What becomes of weights that another program quantized in a way that no format here is the same as "
    "(GGUF's IQ3_S or Q2_K, FP8, NF4, NVFP4, ...): small quantizes them again to the smallest format that is "
    "finer, exact keeps the numbers they stand for, at 32 bits",
    example="--keep exact",
    value="HOW",
)
KV_DTYPE = _flag(
    help="Keep the KV cache in float32, bfloat16 or int8 (codes with a scale for each row, about a quarter "
    "of float32); that of the activations if not given: float32 on CPU and with float32 weights, else "
    "bfloat16",
    example="--kv_dtype int8",
    elsewhere=("ctk", "ctv", "cache_type_k", "cache_type_v", "kv_bits", "kv_cache_dtype"),
    value="TYPE",
    choices=KV_DTYPES,
)
MAX_LENGTH = _flag(
    help="The longest context, prompt and output together: how far the KV cache may grow; the model's own if "
    "not given",
    example="-l 4096",
    elsewhere=("c", "ctx", "ctx_size", "n_ctx", "num_ctx", "context_length", "max_model_len", "max_kv_size"),
    short="l",
    low=1,
)

MODEL_PATH_NEEDS = Need("model_path", ("recipe",), "it says how to read one")
BASE_NEEDS = Need("base", ("model",), "it is what --model is added to")
RECIPE_NEEDS = (BASE_NEEDS, MODEL_PATH_NEEDS, Need("keep_identity", ("recipe",), "it says how to read one"))
"""What commands with `ModelFlags` refuse."""


def read_model_paths(texts: tuple[str, ...]) -> dict[str, str]:
    """`--model_path NAME=DIR` as name -> directory."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise UsageError(f"--model_path {text}: expected NAME=DIR, the recipe's name and a directory")
        if name in found:
            raise UsageError(f"--model_path {name} is given twice; give it once")
        found[name] = directory
    return found


RecipeFile = Annotated[
    str | None,
    _flag(
        help="The model and its layers as a mergekit recipe says: YAML with merge_method: passthrough, over "
        "one or several models",
        example="--recipe goliath.yml --model_path Xwin-LM/Xwin-LM-70B-V0.1=models/xwin",
        value="FILE",
    ),
]
ModelPaths = Annotated[
    Mapping[str, str],
    _flag(
        help="Where a model that the recipe names is; may be given more than once. Other names are "
        "directories, relative to the recipe or to the working directory",
        example="--model_path openchat/openchat-3.5-0106=oc",
        value="NAME=DIR",
        many=True,
        read=read_model_paths,
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """A model and the layers of it that run."""

    model: Annotated[str | None, MODEL] = None
    base: Annotated[str | None, BASE] = None
    layer_spec: Annotated[str | None, LAYER_SPEC] = None
    recipe: RecipeFile = None
    model_path: ModelPaths = dataclasses.field(default_factory=dict)
    keep_identity: Annotated[
        bool,
        _flag(
            help="Execute the recipe's layers that pass their input through (o_proj and down_proj scaled to "
            "0), with zeros for weights; otherwise they are counted, but take no time and no memory",
            example="--recipe seed.yml --keep_identity",
        ),
    ] = False

    @property
    def model_name(self) -> str:
        """What people call the model."""
        if self.recipe is not None:
            return Path(self.recipe).stem
        if self.model is None:
            return ""
        path = os.path.realpath(demo.place(self.model))
        return os.fsencode(os.path.basename(path)).decode(errors="replace")

    def or_boxed(self) -> Self:
        """The same, with the model in the box if it names none."""
        if self.model is not None or self.recipe is not None:
            return self
        return dataclasses.replace(self, model=str(demo.path()))

    def chosen(self) -> "ChosenModel":
        """The model that was asked for; see `chosen_model.choose`."""
        return self._chosen()

    def _chosen(self, adapters: "Uses" = ()) -> "ChosenModel":
        from jaxchat.cli.chosen_model import choose  # numpy and others, which --help need not wait for

        return choose(
            self.model,
            self.layer_spec,
            recipe=self.recipe,
            model_paths=self.model_path,
            keep_identity=self.keep_identity,
            name=self.model_name,
            base=self.base,
            adapters=adapters,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadFlags(ModelFlags):
    """A model, its layers, and how it is loaded."""

    dtype: Annotated[str | None, DTYPE] = None
    quant: Annotated[str | None, QUANT] = None
    keep: Annotated[Literal["small", "exact"], KEEP] = "small"
    kv_dtype: Annotated[str | None, KV_DTYPE] = None
    kernels: Annotated[
        str,
        _flag(
            help="What computes: reference is plain XLA, native the C++ of CPUs, pallas that of GPUs and "
            "TPUs, auto the fastest there is",
            example="--kernels reference",
            value="WHICH",
            choices=KERNELS,
        ),
    ] = "auto"
    compilation_cache_dir: Annotated[
        str | None,
        _flag(
            help="Where compiled programs are kept between runs; a user cache directory if not given, '' for "
            "none",
            example="--compilation_cache_dir /tmp/xla",
            value="DIR",
            or_none=True,
        ),
    ] = None

    def load(
        self,
        chosen: "ChosenModel",
        progress: "Progress | None" = None,
        *,
        max_length: int | None = None,
        max_slots: int = 0,
        chat_template: str | None = None,
        adapter: "Uses" = (),
        draft: str | None = None,
        draft_tree: str | None = None,
        draft_accept: str = "lossless",
    ) -> "Model":
        """Loads the model that `chosen` gave."""
        # Imports JAX, which --help and usage errors need not wait for.
        from jaxchat.pallas.backends import use_32_bits
        from jaxchat.runtime import load

        use_32_bits()
        return load(
            **chosen.location(),
            plan=chosen.plan,
            dtype=self.dtype,
            quant=self.quant,
            keep=self.keep,
            kv_dtype=self.kv_dtype,
            kernels=self.kernels,
            max_length=max_length,
            max_slots=max_slots,
            chat_template=chat_template,
            adapter=adapter,
            draft=draft,
            draft_tree=draft_tree,
            draft_accept=draft_accept,
            compilation_cache_dir=self.compilation_cache_dir,
            progress=progress,
        )
