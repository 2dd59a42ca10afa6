"""Chats on disk: a conversation's ids, text and used rows of the KV cache, in one safetensors file.

`save` and `load` only; what a chat is and how its cache is read is in chat_session, chat and engine.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxchat.chat.conversation import Conversation
from jaxchat.checkpoints.fingerprint import bytes_of, weights_fingerprint
from jaxchat.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from jaxchat.engine.session import KVRows
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import replaced
from jaxchat.layer_plan import LayerPlan
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxchat.chat.session import ChatSession
    from jaxchat.runtime import Model

FORMAT = "jaxchat-session"
VERSION = "1"

_PROBE = "The quick brown fox, 3.14 × 10²: naïve café, 東京, привет!\n\t<|im_start|> 🙂"


def save(path: str | Path, chat: "ChatSession") -> None:
    """Writes a chat to a file, which appears complete or not at all.

    Its size is that of the conversation: 2 * K * H numbers a token and executed slot, and some kilobytes.

    Raises:
      UsageError: the file cannot be written.
    """
    path = Path(path)
    model, session = chat.model, chat.session
    rows = session.cached_rows()
    given = {name: array for name, array in rows._asdict().items() if array is not None}
    arrays = {"ids": np.asarray(session.ids[0], np.int32), **given}
    stored = {
        "model": _fingerprint(model),
        "plan": str(session.plan),
        "conversation": chat.conversation.state(),
        "crc32": {name: _crc32(array) for name, array in arrays.items()},
    }
    text = json.dumps(stored, ensure_ascii=False)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "session": text,
        "crc32": str(zlib.crc32(text.encode())),
    }
    specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    order = sorted(specs, key=lambda name: -specs[name][0].itemsize)  # keeps every tensor aligned
    try:
        ordered = {name: specs[name] for name in order}
        with (
            replaced(path, mode=0o600) as temporary,
            SafetensorsWriter(temporary, ordered, metadata=metadata) as out,
        ):
            for name in order:
                out.write(name, arrays[name])
    except OSError as error:
        raise UsageError(f"{path}: the session cannot be saved there ({error.strerror or error})") from None


def load(path: str | Path, model: "Model") -> "ChatSession":
    """The chat that `save` wrote: going on with it equals never having stopped.

    Args:
      path: the file.
      model: the same model, under the same plan.

    Raises:
      UsageError: there is no such file, or the chat is another model's or another plan's; the message says
        what differs and what to do.
      JaxchatError: the file is damaged, no session, or of another version.
    """
    path = Path(path)
    chat = model.chat_session()
    if not path.is_file():
        raise UsageError(f"{path}: no such session file")
    try:
        file = SafetensorsFile(path)
    except JaxchatError as error:
        raise JaxchatError(str(error).replace("download the file again", "the session is lost")) from None
    stored = _stored(file)
    here = _fingerprint(model)
    if difference := _difference(stored["model"], here):
        raise UsageError(
            f"{path}: made with another model ({_describe(stored['model'])}), this is {_describe(here)}: "
            f"{difference}. Load it with its own model"
        )
    plan = LayerPlan.parse(stored["plan"], model.config.num_layers)
    if plan != model.plan:
        raise UsageError(
            f"{path}: made under the layer plan {plan}, this is {model.plan}: {_advice(plan, model)}"
        )
    arrays = {name: file.view(name) for name in file.entries}
    for name, expected in stored["crc32"].items():
        if name not in arrays or _crc32(arrays[name]) != expected:
            raise JaxchatError(f"{path}: damaged: {name} is not what was saved; the session is lost")
    assert model.template is not None
    assert model.tokenizer is not None
    chat.conversation = Conversation.from_state(model.template, model.tokenizer, stored["conversation"])
    rows = KVRows.of(arrays)
    try:
        chat.session.restore(arrays["ids"].tolist(), rows)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return chat


def _advice(plan: LayerPlan, model: "Model") -> str:
    if model.base_plan != LayerPlan.identity(model.config.num_layers):  # --layer_spec counts its slots
        return "give the --layer_spec or --recipe it was made with"
    return f"give --layer_spec '{plan}'"


def _stored(file: SafetensorsFile) -> dict[str, Any]:
    """The JSON part of a session file."""
    found = file.metadata
    if found.get("format") != FORMAT:
        raise JaxchatError(f"{file.path}: not a session that jaxchat saved; a model is given with -m")
    if found.get("version") != VERSION:
        raise JaxchatError(
            f"{file.path}: a session file of version {found.get('version')}, this jaxchat reads version "
            f"{VERSION}: load it with the jaxchat that saved it"
        )
    text = found.get("session", "")
    if str(zlib.crc32(text.encode())) != found.get("crc32"):
        raise JaxchatError(f"{file.path}: damaged: the header is not what was saved; the session is lost")
    stored: dict[str, Any] = json.loads(text)
    return stored


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(bytes_of(array), zlib.crc32(f"{array.dtype}{array.shape}".encode()))


# --- which model


def _fingerprint(model: "Model") -> dict[str, Any]:
    """What tells models apart, as JSON gives it back."""
    assert model.template is not None  # a chat has one
    assert model.tokenizer is not None
    found = {
        "config": dataclasses.asdict(model.config),
        "weights": weights_fingerprint(model.engine.params),
        "kernels": model.engine.kernels.name,
        "tokenizer": _tokenizer(model.tokenizer),
        "chat template": _template(model.template),
    }
    result: dict[str, Any] = json.loads(json.dumps(found))
    return result


def _tokenizer(tokenizer: Tokenizer) -> str:
    """What it does, not what its files are: the ids of a text, and the text of some ids."""
    ids = np.linspace(0, max(tokenizer.vocab_size - 1, 0), 256).astype(int).tolist()
    behaviour = (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_ids,
        sorted(tokenizer.special_tokens.items()),
        tokenizer.encode(_PROBE),
        [tokenizer.decode([i]) for i in ids],
    )
    return hashlib.blake2b(repr(behaviour).encode(), digest_size=8).hexdigest()


def _template(template: ChatTemplate) -> str:
    text = repr((template.source, sorted(template.variables.items())))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _describe(fingerprint: Mapping[str, Any]) -> str:
    config = fingerprint["config"]
    formats = [weight["format"] for weight in fingerprint["weights"].values()]
    common = max(sorted(set(formats)), key=formats.count)
    return f"{config['model_type']}, {config['num_layers']} layers of width {config['hidden_size']}, {common}"


def _difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """How two fingerprints differ, in words; None if they do not."""
    for key in saved["config"] | here["config"]:
        before, now = saved["config"].get(key), here["config"].get(key)
        if before != now:
            return f"{key} was {before} and is {now}"
    weights = saved["weights"], here["weights"]
    names = [
        n for n in sorted(weights[0].keys() | weights[1].keys()) if weights[0].get(n) != weights[1].get(n)
    ]
    if names:
        before, now = (w.get(names[0], {}).get("format", "absent") for w in weights)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"was {before} and is {now}" if before != now else "has other values"
        if saved["kernels"] != here["kernels"]:
            what += f" (or lies differently: it was saved with --kernels {saved['kernels']})"
        return f"{names[0]}{more} {what}"
    for key in ("tokenizer", "chat template"):
        if saved[key] != here[key]:
            return f"the {key} is another one"
    return None
