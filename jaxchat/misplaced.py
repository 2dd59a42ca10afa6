"""What a file is instead of what its name says: a Git LFS pointer or a web page, both of failed downloads."""

from pathlib import Path

from jaxchat.errors import JaxchatError

_LOOK = 512  # bytes; a pointer has about 130


def refuse_misplaced(path: Path) -> None:
    """Tells of a file that is not what was to be downloaded; any other one, or none, passes.

    Raises:
      JaxchatError: it is a Git LFS pointer or an HTML page; says what to do.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            start = file.read(_LOOK)
    except OSError:
        return
    if start.startswith(b"version https://git-lfs"):
        raise JaxchatError(
            f"{path}: a Git LFS pointer, the file itself was not downloaded; run `git lfs pull` in "
            f"{path.parent}, or download the file"
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        raise JaxchatError(
            f"{path}: a web page, not the model's file; download it again (on Hugging Face a link to the "
            "file has /resolve/ in it, not /blob/)"
        )
