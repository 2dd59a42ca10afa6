"""The model in the box: a small story-teller that chats. Its model card lies beside its weights."""

from pathlib import Path

from jaxchat.errors import JaxchatError


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
