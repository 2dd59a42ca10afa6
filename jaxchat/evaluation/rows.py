"""Files of questions as rows: JSON Lines, JSON, CSV, text, Arrow and Parquet, some of them gzipped.

What a row means is `tasks/`'s. Needs no JAX; pyarrow for Arrow and Parquet alone (the extra `eval`).
"""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import UnreadableError, limited, parse_json, read_bytes, text_of
from jaxchat.typed import checked
from jaxchat.visible import shown

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 28
"""Of a file, unpacked: more than any benchmark has."""


class Row(NamedTuple):
    """A row of a file.

    Attributes:
      path: the file.
      place: of the row in it, for messages: `test.jsonl:3`.
      name: its key in a JSON object of rows, else its number, from 0.
      values: by column.
      number: where it is in the file, from 0.
    """

    path: Path
    place: str
    name: str
    values: Mapping[str, Any]
    number: int = 0

    def read(self, kind: type[T]) -> T:
        """The row as a dataclass, whose fields are the columns.

        Raises:
          JaxchatError: a column is missing, or is no such value.
        """
        return checked(dict(self.values), kind, where=self.place, advice=_columns(kind))

    def wrong(self, what: str) -> JaxchatError:
        """An error about it."""
        return JaxchatError(f"{self.place}: {what}")


def _columns(kind: type) -> str:
    return f"a row has {', '.join(kind.__annotations__)}"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, by its suffix.

    Raises:
      JaxchatError: it cannot be read, has no rows, or is too large.
      UsageError: it is not there, or of a kind that is not known.
    """
    reader = _reader(path)
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "no such file"
        raise UsageError(f"{path}: {kind}; name a file ({', '.join(KINDS)})")
    try:
        rows = [row._replace(number=number) for number, row in enumerate(reader(path))]
    except UnreadableError as error:
        raise JaxchatError(f"{path}: {error}") from None
    except OSError as error:
        raise JaxchatError(f"{path}: {error.strerror or error}") from None
    if not rows:
        raise JaxchatError(f"{path}: no rows in it; expected at least one question")
    return rows


def read_all(paths: Sequence[Path]) -> list[Row]:
    """The rows of several files, as of one: where they have no names their numbers go on."""
    found: list[Row] = []
    for path in paths:
        rows = read_rows(path)
        if found and all(row.name == str(row.number) for row in rows):
            rows = [row._replace(name=str(len(found) + row.number)) for row in rows]
        found += rows
    return found


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    suffix = path.name.lower().removesuffix(".gz")
    for ending, reader in KINDS.items():
        if suffix.endswith(ending):
            return reader
    raise UsageError(f"{path}: no kind of file that is known; expected one of {', '.join(KINDS)}")


def _bytes(path: Path) -> bytes:
    if path.suffix.lower() != ".gz":
        return read_bytes(path, MAX_FILE_BYTES)
    try:
        with gzip.open(path, "rb") as file:
            return limited(file, MAX_FILE_BYTES)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableError(f"not readable as gzip ({error}); get the whole file") from None


def _text(path: Path) -> str:
    return text_of(_bytes(path))


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield _row(path, f"{path}:{line_number}", str(number), _json(path, line, f":{line_number}"))
            number += 1


def _json_file(path: Path) -> Iterator[Row]:
    value = _json(path, _text(path), "")
    if isinstance(value, list):
        for number, row in enumerate(value):
            yield _row(path, f"{path}[{number}]", str(number), row)
    elif isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        for key, row in value.items():
            yield _row(path, f"{path}: {key}", key, row)
    else:
        raise JaxchatError(f"{path}: is {shown(value)}; expected a list of objects, or an object of them")


def _json(path: Path, text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except UnreadableError as error:
        raise JaxchatError(f"{path}{where}: not readable as JSON ({error})") from None


def _row(path: Path, place: str, name: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise JaxchatError(f"{place}: is {shown(values)}; expected an object {{...}}")
    return Row(path, place, name, values)


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for number, values in enumerate(reader):
            if None in values or None in values.values():
                raise JaxchatError(
                    f"{path}:{reader.line_num}: has not the {len(reader.fieldnames or ())} columns of the "
                    "first line; quote texts with commas in them"
                )
            yield Row(path, f"{path}:{reader.line_num}", str(number), values)
    except csv.Error as error:
        raise JaxchatError(f"{path}:{reader.line_num}: not readable as CSV ({error})") from None


def _plain(path: Path) -> Iterator[Row]:
    text = _text(path).replace("\r\n", "\n")
    if text.strip():
        yield Row(path, str(path), path.name, {"text": text})


def _columnar(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as arrow
    except ImportError:
        raise JaxchatError(
            f"{path}: needs pyarrow, which is not installed; pip install 'jaxchat[eval]', or make "
            "JSON Lines of it"
        ) from None
    if path.suffix.lower() == ".gz":
        raise UnreadableError("Arrow and Parquet are not read gzipped; unpack it first")
    try:
        with open(path, "rb") as file:
            number = 0
            for batch in _batches(path, file):
                for values in batch.to_pylist():
                    yield Row(path, f"{path}[{number}]", str(number), values)
                    number += 1
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UnreadableError):
            raise
        first = " ".join(str(error).split())[:200]
        raise UnreadableError(f"not readable as Arrow or Parquet ({first}); get the whole file") from None


def _batches(path: Path, file: BinaryIO) -> Iterator[Any]:
    """Record batches of at most `MAX_FILE_BYTES` in all."""
    from pyarrow import ipc, parquet

    start = file.read(6)
    file.seek(0)
    total = 0
    batches: Any
    if start[:4] == b"PAR1":
        source = parquet.ParquetFile(file)
        metadata = source.metadata
        if (
            sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
            > MAX_FILE_BYTES
        ):
            raise UnreadableError(f"more than {MAX_FILE_BYTES >> 20} MiB")
        batches = source.iter_batches()
    elif start == b"ARROW1":
        whole = ipc.open_file(file)
        batches = (whole.get_batch(number) for number in range(whole.num_record_batches))
    else:
        batches = ipc.open_stream(file)
    for batch in batches:
        total += batch.nbytes
        if total > MAX_FILE_BYTES:
            raise UnreadableError(f"more than {MAX_FILE_BYTES >> 20} MiB")
        batch.validate(full=True)
        yield batch


KINDS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _csv,
    ".txt": _plain,
    ".raw": _plain,
    ".arrow": _columnar,
    ".parquet": _columnar,
}
"""Suffix -> what reads such a file; .gz may follow, but after the last two."""
