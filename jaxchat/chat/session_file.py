"""Chats on disk: a conversation's ids, text and used rows of the KV cache, in one safetensors file.

`save` and `load` only: a `SavedChat` is plain values. What they mean is up to `session.py`.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from jaxchat.chat.conversation import ConversationState
from jaxchat.chat.identity import Fingerprint
from jaxchat.chat.saved import FORMAT, try_to_save
from jaxchat.checkpoints.fingerprint import bytes_of
from jaxchat.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from jaxchat.engine.session import KVRows
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import UnreadableError, parse_json, replaced
from jaxchat.typed import checked

VERSION = "2"
_WITH_ADAPTERS = "3"
"""The same with adapters in its fingerprint: a jaxchat that knows none is not to take it for the model's."""
_WITH_SLOT_ROWS = "1"
"""The version before, whose slots may have different numbers of rows in use: int64 [P] `slot_rows`."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The JSON part of a session file."""

    plan: str
    model: Fingerprint
    conversation: ConversationState
    crc32: dict[str, int]


@dataclass(frozen=True)
class SavedChat:
    """All of a chat.

    Attributes:
      ids: the tokens of its context.
      rows: their keys and values.
      plan: the layer plan that computed them, over the stacked layers, as text.
      model: the fingerprint of the model that did, see `identity`.
      conversation: see `Conversation.state`.
    """

    ids: list[int]
    rows: KVRows
    plan: str
    model: Fingerprint
    conversation: ConversationState


def save(path: str | Path, chat: SavedChat) -> None:
    """Writes a chat to a file, which appears complete or not at all.

    Its size is that of the conversation: 2 * K * H numbers a token and executed slot, and some kilobytes.

    Raises:
      UsageError: the file cannot be written, or holds something that is no session.
    """
    path = Path(path)
    try_to_save(path)
    given = {name: array for name, array in chat.rows._asdict().items() if array is not None}
    arrays = {"ids": np.asarray(chat.ids, np.int32), **given}
    crc32 = {name: _crc32(array) for name, array in arrays.items()}
    stored = _Stored(plan=chat.plan, model=chat.model, conversation=chat.conversation, crc32=crc32)
    text = json.dumps(msgspec.to_builtins(stored), ensure_ascii=False)
    metadata = {
        "format": FORMAT,
        "version": _WITH_ADAPTERS if chat.model.adapters else VERSION,
        "session": text,
        "crc32": str(zlib.crc32(text.encode())),
    }
    try:
        _write(path, arrays, metadata)
    except OSError as error:
        raise UsageError(f"{path}: the session cannot be saved there ({error.strerror or error})") from None


def _write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    order = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # keeps every tensor aligned
    specs = {name: (arrays[name].dtype, arrays[name].shape) for name in order}
    with (
        replaced(path, mode=0o600) as temporary,
        SafetensorsWriter(temporary, specs, metadata=metadata) as out,
    ):
        for name in order:
            out.write(name, arrays[name])


def load(path: str | Path) -> SavedChat:
    """The chat that `save` wrote.

    Raises:
      UsageError: there is no such file.
      JaxchatError: the file is damaged, no session, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give one that a session was saved to")
    file = SafetensorsFile(path, advice=_LOST)
    stored = _stored(file)
    arrays = {name: file.read(name) for name in file.entries}
    for name, expected in stored.crc32.items():
        if name not in arrays or _crc32(arrays[name]) != expected:
            raise JaxchatError(f"{path}: damaged: {name} is not what was saved; {_LOST}")
    if file.metadata["version"] == _WITH_SLOT_ROWS:
        arrays = _with_equal_slots(arrays, path)
    for name, (kind, dimensions) in _TENSORS.items():
        if name not in arrays:
            raise JaxchatError(f"{path}: damaged: {name} is missing; {_LOST}")
        array = arrays[name]
        if not np.issubdtype(array.dtype, kind) or array.ndim != dimensions:
            raise JaxchatError(
                f"{path}: damaged: {name} is {array.dtype}{list(array.shape)}; expected {kind.__name__} of "
                f"{dimensions} dimensions; {_LOST}"
            )
    rows = KVRows(**{name: arrays[name] for name in KVRows._fields if name in arrays})
    return SavedChat(arrays["ids"].tolist(), rows, stored.plan, stored.model, stored.conversation)


_LOST = "the session is lost"
_TENSORS: Mapping[str, tuple[type, int]] = {
    "ids": (np.integer, 1),
    "k": (np.generic, 4),
    "v": (np.generic, 4),
    "rope_regime": (np.integer, 0),
}
"""The tensors that every session has: kind of numbers, and dimensions."""


def _stored(file: SafetensorsFile) -> _Stored:
    """The JSON part of a session file."""
    found = file.metadata
    if found.get("format") != FORMAT:
        raise JaxchatError(f"{file.path}: not a session that jaxchat saved; a model is given with -m")
    if found.get("version") not in (_WITH_SLOT_ROWS, VERSION, _WITH_ADAPTERS):
        raise JaxchatError(
            f"{file.path}: a session file of version {found.get('version')}, this jaxchat reads "
            f"versions up to {_WITH_ADAPTERS}: load it with the jaxchat that saved it"
        )
    text = found.get("session", "")
    if str(zlib.crc32(text.encode(errors="replace"))) != found.get("crc32"):
        raise JaxchatError(f"{file.path}: damaged: the header is not what was saved; {_LOST}")
    try:
        return checked(parse_json(text), _Stored, where=f"{file.path}: its header", advice=_LOST)
    except UnreadableError as error:
        raise JaxchatError(f"{file.path}: damaged: its header is not JSON ({error}); {_LOST}") from None


def _with_equal_slots(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The arrays of the version before, with the rows that all slots have in use."""
    if not {"slot_rows", "k"} <= arrays.keys() or arrays["k"].ndim != 4:
        raise JaxchatError(f"{path}: damaged: slot_rows or k is missing; {_LOST}")
    rows = int(np.min(arrays["slot_rows"], initial=arrays["k"].shape[2]))
    per_row = {"k", "v", "k_scale", "v_scale"}
    return {name: array[:, :, :rows] if name in per_row else array for name, array in arrays.items()}


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(bytes_of(array), zlib.crc32(f"{array.dtype}{array.shape}".encode()))
