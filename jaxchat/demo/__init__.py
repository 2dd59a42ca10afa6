"""The model in the box: a small story-teller that chats. Its model card lies beside its weights."""

from pathlib import Path

from jaxchat.errors import JaxchatError

NAME = "box"
"""What names the model wherever a model's directory is expected."""


def place(directory: str | Path) -> Path:
    """Where a model is whose directory or name was given: a folder that is there comes before the name.

    Raises:
      JaxchatError: as `path`; or a folder of the name is there, and holds no model.
    """
    found = Path(directory)
    if str(directory) != NAME:
        return found
    if not found.is_dir():
        return path()
    if not (found / "config.json").exists():
        raise JaxchatError(
            f"{NAME}: the model in the box, or the folder of that name here? The folder comes first, and "
            "holds no config.json; rename it, or work in another directory"
        )
    return found


def path() -> Path:
    """The directory of the model, to be given to `jaxchat.load` or `--model`.

    Raises:
      JaxchatError: this installation lacks the package data.
    """
    directory = Path(__file__).resolve().parent / "storyteller"
    if not (directory / "config.json").is_file():
        raise JaxchatError(
            f"{directory}: the model in the box is missing from this installation; install jaxchat again, or "
            "make it with tools/train_demo.py"
        )
    return directory


def heads(directory: str | Path) -> Path:
    """Where a draft's heads are whose directory was given: `box` is those for the model in the box."""
    return path() / "heads" if str(directory) == NAME and not Path(directory).is_dir() else Path(directory)
