"""The checkpoints of a run: the last few, the best one, and what run it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import read_json, write_atomically

RUN = "run.json"
LAST, BEST = "checkpoints", "best"


class Saved:
    """See above.

    Args:
      directory: of the run; it is there.
      identity: what makes it this run: name -> a JSON value.
      keep: how many of the last checkpoints stay.
      resume: go on with the run that is there, if there is one.

    Raises:
      UsageError: there is a run, and it is another, or it is not to be gone on with.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, keep: int, resume: bool):
        self._directory = directory
        path = directory / RUN
        self._last = self._manager(LAST, keep)
        self._best = self._manager(BEST, 1)
        if path.exists() and self._last.latest_step() is not None:
            self._check(path, identity, resume)
        else:  # nothing, or a run that failed before its first checkpoint
            write_atomically(path, (json.dumps(dict(identity), indent=1) + "\n").encode())

    def _manager(self, name: str, keep: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        return ocp.CheckpointManager((self._directory / name).resolve(), options=options)

    @staticmethod
    def _check(path: Path, identity: Mapping[str, Any], resume: bool) -> None:
        if not resume:
            raise UsageError(
                f"{path.parent}: a run is there already; go on with it with --resume, or give another "
                "--output_dir"
            )
        before = read_json(path)
        for name, value in identity.items():
            if before.get(name) != json.loads(json.dumps(value)):
                raise UsageError(
                    f"{path}: {name} was {before.get(name)!r} and is {value!r} now; resume with the same "
                    "command, or give another --output_dir"
                )

    def put(self, step: int, state: Mapping[str, Any], position: Mapping[str, Any]) -> None:
        """Writes a checkpoint; one of the same step stays."""
        if self._last.latest_step() != step:
            self._write(self._last, step, state, position)

    def put_best(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes the best state so far, in the place of the one before."""
        if step in self._best.all_steps():  # of a run that was interrupted afterwards
            self._best.delete(step)
        self._write(self._best, step, state, {})

    def _write(
        self, manager: ocp.CheckpointManager, step: int, state: Mapping[str, Any], position: Mapping[str, Any]
    ) -> None:
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(dict(state)), position=ocp.args.JsonSave(dict(position))
        )
        try:
            manager.save(step, args=parts, force=True)
            manager.wait_until_finished()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise JaxchatError(
                f"{self._directory}: the checkpoint of step {step} cannot be written ({reason}); earlier "
                "ones are whole: make room and go on with --resume"
            ) from None

    def last(self, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """State and position of the last checkpoint; None where there is none yet."""
        step = self._last.latest_step()
        return None if step is None else self._read(self._last, step, like)

    def best(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """The best state."""
        step = self._best.latest_step()
        if step is None:
            raise JaxchatError(f"{self._directory / BEST}: the best checkpoint is gone; it was there before")
        return self._read(self._best, step, like)[0]

    def _read(
        self, manager: ocp.CheckpointManager, step: int, like: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), position=ocp.args.JsonRestore())
        try:
            found = manager.restore(step, args=parts)
        except Exception as error:  # whatever Orbax, TensorStore or JSON find wrong with it
            reason = " ".join(str(error).split())[:200]
            place = manager.directory / str(step)
            raise JaxchatError(
                f"{place}: the checkpoint cannot be read ({reason}); remove this folder to go on from the "
                "one before"
            ) from None
        return found.state, found.position or {}

    def close(self) -> None:
        """Ends what Orbax keeps running."""
        self._last.close()
        self._best.close()
