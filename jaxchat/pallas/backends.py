"""Which implementation of each operation an engine uses: a table, chosen once."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxchat.config import Role
from jaxchat.errors import JaxchatError, UsageError, option
from jaxchat.mixed import MixedTensor, by_part
from jaxchat.pallas import cache_attention, embedding, low_rank, native, stacked_matmul
from jaxchat.pallas.cache_attention import Attend, WriteRows
from jaxchat.pallas.embedding import EmbeddingRows
from jaxchat.pallas.low_rank import AddDeltas
from jaxchat.pallas.stacked_matmul import StackedMatmul, StackedMatmuls
from jaxchat.quant import Reordered

NAMES = ("auto", "reference", "native", "pallas")
"""What `--kernels` accepts."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One implementation of every operation. Hashable: a static argument of the jitted steps.

    Attributes:
      name: `reference`, `native` or `pallas`.
      stacked_matmul: a product with one layer of a stack.
      decode_attention: attention of one new token a sequence over the cache.
      prefill_attention: the same for several new tokens.
      write_rows: appends keys or values to the cache.
      prepare: a loaded parameter, but a mixed one, in the layout the kernels read, by its role (`Param`), and
        whether the token embedding is the output head, too.
      stacked_matmuls: several products of one x in one call, x, stacks, layers -> list, also with mixed
        stacks; None where that is no faster than one after the other.
      add_deltas: what adapters add to products.
      embedding_rows: rows of the token embedding.
    """

    name: str
    stacked_matmul: StackedMatmul = stacked_matmul.reference.stacked_matmul
    decode_attention: Attend = cache_attention.reference.attend
    prefill_attention: Attend = cache_attention.reference.attend
    write_rows: WriteRows = cache_attention.reference.write_rows
    prepare: Callable[[Any, Role, bool], Any] = lambda value, role, tied: value
    stacked_matmuls: StackedMatmuls | None = None
    add_deltas: AddDeltas = low_rank.reference.add_deltas
    embedding_rows: EmbeddingRows = embedding.embedding_rows

    def matmuls(self, x: jax.Array, stacks: Sequence[Any], layers: Sequence[jax.Array]) -> list[jax.Array]:
        """`x @ stack[layer].T` for each stack and layer."""
        together = [number for number, stack in enumerate(stacks) if not _is_reordered(stack)]
        out: dict[int, jax.Array] = {}
        if self.stacked_matmuls is not None and together:
            ys = self.stacked_matmuls(x, [stacks[n] for n in together], [layers[n] for n in together])
            out = dict(zip(together, ys, strict=True))
        return [
            out[number] if number in out else by_part(stack, layer, functools.partial(self._matmul, x))
            for number, (stack, layer) in enumerate(zip(stacks, layers, strict=True))
        ]

    def _matmul(self, x: jax.Array, stack: Any, layer: jax.Array) -> jax.Array:
        """One product; with a reordered stack, of x in the same order."""
        if not isinstance(stack, Reordered):
            return self.stacked_matmul(x, stack, layer)
        return self.stacked_matmul(x[..., stack.order[layer]], stack.weight, layer)

    def prepared(self, value: Any, role: Role, tied: bool) -> Any:
        """A loaded parameter in the layout the kernels read; of a mixed stack, each part is."""
        if isinstance(value, MixedTensor):
            return value.map(lambda part: self.prepared(part, role, tied))
        if isinstance(value, Reordered):
            return dataclasses.replace(value, weight=self.prepare(value.weight, role, tied))
        return self.prepare(value, role, tied)


def _is_reordered(stack: Any) -> bool:
    parts = stack.parts if isinstance(stack, MixedTensor) else (stack,)
    return any(isinstance(part, Reordered) for part in parts)


REFERENCE = Kernels("reference")

DIFFERENTIABLE = Kernels(
    "differentiable",
    stacked_matmul=stacked_matmul.reference.dot_whole,
    decode_attention=cache_attention.dense.attend,
    prefill_attention=cache_attention.dense.attend,
    write_rows=cache_attention.dense.write_rows,
)
"""What training uses, over whole sequences: not to be selected by name."""


_AUTO = {
    "cpu": ("native", "reference"),
    "tpu": ("pallas", "reference"),
    "gpu": ("reference",),  # the Pallas kernels have not been measured there: they are to be asked for
}
"""What `auto` takes on each platform: the first that is available."""


@functools.cache
def native_cpu() -> Kernels:
    """The C++ kernels, where the installed library fits this machine."""
    return Kernels(
        "native",
        stacked_matmul=stacked_matmul.cpu.stacked_matmul,
        stacked_matmuls=stacked_matmul.cpu.stacked_matmuls,
        decode_attention=cache_attention.cpu.attend,
        prefill_attention=cache_attention.cpu.attend,
        add_deltas=low_rank.cpu.add_deltas,
    )


@functools.cache
def pallas_tpu() -> Kernels:
    """The Mosaic TPU kernels. Importing Pallas takes a third of a second, which no CPU should wait for."""
    from jaxchat.pallas.cache_attention import tpu as attention
    from jaxchat.pallas.embedding import tpu as embedding
    from jaxchat.pallas.stacked_matmul import tpu as matmul

    return Kernels(
        "pallas",
        stacked_matmul=matmul.stacked_matmul,
        decode_attention=attention.attend,
        prefill_attention=attention.attend,
        write_rows=attention.write_rows,
        prepare=matmul.prepare,
        embedding_rows=embedding.embedding_rows,
    )


@functools.cache
def pallas_gpu() -> Kernels:
    """The Triton kernels: attention, and products of few rows; those of many, and cache writes, are XLA's."""
    from jaxchat.pallas.cache_attention import gpu as attention
    from jaxchat.pallas.stacked_matmul import gpu as matmul

    return Kernels(
        "pallas",
        stacked_matmul=matmul.stacked_matmul,
        decode_attention=attention.attend,
        prefill_attention=attention.attend,
        prepare=matmul.prepare,
    )


def _available(platform: str) -> dict[str, Callable[[], Kernels]]:
    """Name -> what makes the kernels that can run on a platform; only a CPU loads the native library."""
    found: dict[str, Callable[[], Kernels]] = {"reference": lambda: REFERENCE}
    if platform == "cpu":
        return found | ({"native": native_cpu} if native.available() else {})
    return found | {"pallas": pallas_tpu if platform == "tpu" else pallas_gpu}


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("jaxchat").warning("%s; plain XLA serves, which is slower", message)


def use_32_bits() -> None:
    """Has JAX make 32-bit numbers whatever JAX_ENABLE_X64 says: for programs of ours, which need no others.

    The library leaves that to the program that it is part of.
    """
    jax.config.update("jax_enable_x64", False)


_INSTALLS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}
"""Platform -> the extra of jaxchat that brings what JAX needs for it."""


@functools.cache
def devices() -> tuple[jax.Device, ...]:
    """JAX's devices, those of the platform that it prefers or that JAX_PLATFORMS names.

    Raises:
      JaxchatError: there are none; the message says what is asked for, and how to get it or do without.
    """
    try:
        return tuple(jax.devices())
    except Exception as error:  # of any type: an AssertionError, a RuntimeError
        raise JaxchatError(_no_devices(" ".join(str(error).split()))) from None


def _no_devices(reason: str) -> str:
    wanted = jax.config.values.get("jax_platforms") or ""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    known = [name for name in names if name in ("cpu", "rocm", *_INSTALLS)]
    if names and not known:
        return f"JAX_PLATFORMS is {wanted!r}; expected cpu, cuda or tpu; without it JAX takes what there is"
    if not names:
        return f"JAX finds no device ({reason[:300] or 'it says no more'}); try JAX_PLATFORMS=cpu"
    extras = dict.fromkeys(_INSTALLS[name] for name in known if name in _INSTALLS)
    install = "".join(f"install its software with pip install 'jaxchat[{extra}]', or " for extra in extras)
    hidden = "CUDA_VISIBLE_DEVICES"
    hint = f", and {hidden} is {os.environ[hidden]!r}" if "cuda" in extras and hidden in os.environ else ""
    reason = reason.partition(" (set JAX_PLATFORMS")[0].removeprefix("Unable to initialize backend ")
    why = f" ({reason[:200]})" if reason else ""
    return (
        f"JAX_PLATFORMS is {wanted!r}{hint}, but JAX finds no such device here{why}; {install}"
        "do without JAX_PLATFORMS, or with JAX_PLATFORMS=cpu"
    )


def select(name: str, platform: str) -> Kernels:
    """The kernels for a platform (`cpu`, `gpu`, `tpu`); `auto` takes the fastest set there is.

    Raises:
      UsageError: no such name, or not on this platform.
    """
    if name not in NAMES:
        raise UsageError(f"{option('kernels')} is {name!r}; expected one of {', '.join(NAMES)}")
    available = _available(platform)
    wanted = _AUTO[platform] if name == "auto" else (name,)
    if platform == "cpu" and name != "reference" and not native.available():
        _warn_once(native.why_not())
    for candidate in wanted:
        if candidate in available:
            return available[candidate]()
    raise UsageError(
        f"{option('kernels', name)} is not available on {platform}; available: {', '.join(available)}"
    )
