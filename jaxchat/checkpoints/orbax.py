"""Orbax checkpoints: the stacked parameters for sharded and multi-host restores.

They hold the same flat tree as the native file, name -> [L, ...] or [...], in true bfloat16. Importing Orbax
takes half a second, so nothing imports this module before it meets such a checkpoint.
"""

import functools
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxchat.checkpoints.manifest import NATIVE_FILE, ORBAX_FOLDER, Manifest, config_of
from jaxchat.checkpoints.native import NativeSource
from jaxchat.checkpoints.safetensors_file import NAMES
from jaxchat.checkpoints.source import verify
from jaxchat.config import ModelConfig, Param
from jaxchat.errors import JaxchatError
from jaxchat.families import parameter_table
from jaxchat.misplaced import refuse_misplaced
from jaxchat.pallas import backends
from jaxchat.pallas.storage import stored, stored_dtype
from jaxchat.sharding import param_sharding

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError:
    raise JaxchatError(
        "Orbax checkpoints need orbax-checkpoint, which is not installed; pip install 'jaxchat[orbax]'"
    ) from None

_CHUNK_BYTES = 1 << 26  # so that a device which needs a part of an array reads little more than that part


class OrbaxSource:
    """An Orbax checkpoint as a `Source`; one parameter at a time is in host memory."""

    def __init__(self, directory: Path, config: ModelConfig, manifest: Manifest):
        """Reads the checkpoint's metadata and verifies names, shapes and dtypes.

        Raises:
          JaxchatError: the checkpoint is missing, damaged or not the model's.
        """
        self.manifest = manifest
        self.config = config_of(manifest, config)
        self.table = parameter_table(self.config)
        self._path = (directory / ORBAX_FOLDER).resolve()
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._stacks: dict[str, np.ndarray] = {}
        if not self._path.is_dir():
            raise JaxchatError(f"{self._path}: no such directory; convert the model again")
        _hear_errors_once()
        try:
            metadata = self._checkpointer.metadata(self._path).item_metadata
            found = {name: (np.dtype(m.dtype), tuple(m.shape)) for name, m in dict(metadata.tree).items()}
        except Exception as error:  # Orbax promises no error types
            raise self._damaged(error) from None
        self._dtypes = {name: dtype for name, (dtype, _) in found.items()}
        verify(
            str(self._path),
            {p.name: p.stacked_shape(self.config) for p in self.table},
            {name: (NAMES.get(dtype, str(dtype)), shape) for name, (dtype, shape) in found.items()},
        )

    def dtype(self, param: Param) -> np.dtype:
        """See `Source`."""
        return self._dtypes[param.name]

    def layer(self, param: Param, index: int) -> np.ndarray:
        """See `Source`."""
        if param.name not in self._stacks:
            arguments = {param.name: ocp.RestoreArgs(restore_type=np.ndarray)}
            self._stacks = {}  # one at a time is enough
            self._stacks = self._restore({param.name: 0}, arguments)
        stack = self._stacks[param.name]
        return stack[index] if param.per_layer else stack

    def mapped(self, param: Param) -> None:
        """See `Source`: nothing is mapped."""

    def load(self, target: np.dtype | None, mesh: Mesh | None) -> dict[str, jax.Array]:
        """Restores every parameter straight into its place, as `load_params` describes."""
        item, arguments = {}, {}
        for param in self.table:
            sharding = (
                SingleDeviceSharding(backends.devices()[0])
                if mesh is None
                else param_sharding(param, self.config, mesh)
            )
            shape = param.stacked_shape(self.config)
            item[param.name] = jax.ShapeDtypeStruct(shape, self.dtype(param), sharding=sharding)
            arguments[param.name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape)
        restored = self._restore(item, arguments)
        return {name: _finish(name, restored.pop(name), target) for name in item}

    def _restore(self, item: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
        what = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        try:
            return dict(self._checkpointer.restore(self._path, args=what))
        except Exception as error:  # Orbax promises no error types
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> JaxchatError:
        for file in sorted(self._path.rglob("*")):
            refuse_misplaced(file)
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        return JaxchatError(f"{self._path}: Orbax cannot read it ({reason}); convert the model again")


@functools.cache
def _hear_errors_once() -> None:
    """Keeps threads of Orbax from printing tracebacks about an error that it has raised already.

    At the first error it closes its event loop, and every read that is still going on then fails by itself.
    """

    def is_echo(error: BaseException | None) -> bool:
        return str(error).startswith(("Event loop is closed", "Encountered error while reading array index"))

    unraisable, uncaught = sys.unraisablehook, sys.excepthook

    def quiet_unraisable(what: Any) -> None:
        if not is_echo(what.exc_value):
            unraisable(what)

    def quiet_uncaught(kind: Any, error: BaseException, trace: Any) -> None:
        if threading.current_thread() is threading.main_thread() or not is_echo(error):
            uncaught(kind, error, trace)

    sys.unraisablehook, sys.excepthook = quiet_unraisable, quiet_uncaught


def replace_native_file(directory: Path, config: ModelConfig, manifest: Manifest) -> None:
    """Turns the native file of a directory into an Orbax checkpoint; it is mapped, not loaded."""
    source = NativeSource(directory, config, manifest)
    tree = {param.name: source.mapped(param) for param in source.table}
    save = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in tree}
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    checkpointer.save((directory / ORBAX_FOLDER).resolve(), args=ocp.args.PyTreeSave(tree, save_args=save))
    (directory / NATIVE_FILE).unlink()


def _finish(name: str, values: jax.Array, target: np.dtype | None) -> jax.Array:
    """Converts a restored array and, on the CPU, gives bfloat16 as its bits; see `load_params`."""
    if target is not None and values.dtype != target:
        converted = values.astype(target)
        if target == np.float16 and bool(jnp.any(jnp.isinf(converted) & ~jnp.isinf(values))):
            raise JaxchatError(f"{name}: a value is too large for float16 (largest 65504); use bfloat16")
        values = converted
    device: Any = next(iter(values.sharding.device_set))
    kept = stored_dtype(values.dtype, device.platform)
    return values if values.dtype == kept else _stored(values, kept)


_stored = jax.jit(stored, static_argnames="dtype", donate_argnums=0)
