"""What the answer to a line looks like: OpenAI's objects, or plain ones.

Every byte follows from the line, the texts drawn and the job's date: nothing from the clock, or from chance.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxchat.chat.replies import Result
from jaxchat.errors import JaxchatError
from jaxchat.jobs.requests import Ask, Identity, LineError
from jaxchat.text.tokenizer import Tokenizer


class Finished(NamedTuple):
    """The answer to a line.

    Attributes:
      number: of the line.
      data: JSON, without a line break.
      failed: whether it says what went wrong.
      prompt_tokens, completion_tokens: of all its texts.
    """

    number: int
    data: bytes
    failed: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Drawn(NamedTuple):
    """A text that was drawn.

    Attributes:
      result: of it.
      ended: whether its last token is one that ended it, and says nothing.
    """

    result: Result
    ended: bool


class Names(NamedTuple):
    """What answers are told beside their texts.

    Attributes:
      model: what it is called where a line does not say it.
      created: seconds since 1970.
      tokenizer: of the model.
    """

    model: str
    created: int
    tokenizer: Tokenizer | None


def drawn_answer(number: int, ask: Ask, drawn: Sequence[Drawn], prompt_tokens: int, names: Names) -> Finished:
    """The answer that texts are, in the order of their inputs, all choices of one after the other."""
    completion = sum(len(one.result.token_ids) for one in drawn)
    if not ask.url:
        value = _plain(number, ask, drawn[0].result)
    else:
        make = _chat_choice if ask.kind == "chat" else _text_choice
        choices = [make(place, one, ask, names) for place, one in enumerate(drawn)]
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": prompt_tokens + completion,
        }
        start, what = _OBJECTS[ask.kind]
        body = {
            "id": f"{start}-{_digest(ask.key)}",
            "object": what,
            "created": names.created,
            "model": ask.model or names.model,
            "choices": choices,
            "usage": usage,
        }
        value = _response(ask.key, 200, body)
    return Finished(number, _line(value), False, prompt_tokens, completion)


def embedded_answer(
    number: int, ask: Ask, vectors: Iterable[np.ndarray], prompt_tokens: int, names: Names
) -> Finished:
    """The answer that vectors float32 [D] are."""
    data = [
        {"object": "embedding", "index": place, "embedding": _ENCODINGS[ask.encoding](vector)}
        for place, vector in enumerate(vectors)
    ]
    body = {
        "object": "list",
        "data": data,
        "model": ask.model or names.model,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }
    return Finished(number, _line(_response(ask.key, 200, body)), False, prompt_tokens)


def failed_answer(
    number: int, identity: Identity, error: JaxchatError, *, status: int = 400, code: str | None = None
) -> Finished:
    """The answer to a line that cannot be answered."""
    what = {
        "message": str(error),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": error.param if isinstance(error, LineError) else None,
        "code": code,
    }
    if identity.url is None:
        value = _named(number, identity.key) | _NOTHING | {"error": what}
    else:
        value = _response(identity.key, status, {"error": what}, number=number)
    return Finished(number, _line(value), True)


_OBJECTS: Mapping[str, tuple[str, str]] = {
    "chat": ("chatcmpl", "chat.completion"),
    "completion": ("cmpl", "text_completion"),
}
_NOTHING: dict[str, Any] = {
    "text": None,
    "finish_reason": None,
    "prompt_tokens": None,
    "completion_tokens": None,
}


def _named(number: int, key: str | int | None) -> dict[str, Any]:
    return {"line": number} if key is None else {"id": key}


def _plain(number: int, ask: Ask, result: Result) -> dict[str, Any]:
    text = result.text if result.content is None else result.content
    value = _named(number, ask.key) | {
        "text": text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(result.token_ids),
    }
    if result.reasoning:
        value["reasoning"] = result.reasoning
    return value | {"error": None}


def _response(
    key: str | int | None, status: int, body: dict[str, Any], *, number: int | None = None
) -> dict[str, Any]:
    """A line of OpenAI's output."""
    digest = _digest(f"line {number}" if key is None else key)
    return {
        "id": f"batch_req_{digest}",
        "custom_id": key,
        "response": {"status_code": status, "request_id": f"req_{digest}", "body": body},
        "error": None,
    }


def _chat_choice(place: int, drawn: Drawn, ask: Ask, names: Names) -> dict[str, Any]:
    result = drawn.result
    message = {"role": "assistant", "content": result.content, "refusal": None}
    if result.reasoning:
        message["reasoning_content"] = result.reasoning
    logprobs = None
    if ask.logprobs:
        content = [
            {"token": text, "logprob": value, "bytes": list(data), "top_logprobs": []}
            for text, data, value in _tokens(drawn, names.tokenizer)
        ]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": place,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": _REASONS[result.finish_reason],
    }


def _text_choice(place: int, drawn: Drawn, ask: Ask, names: Names) -> dict[str, Any]:
    logprobs = None
    if ask.logprobs:
        tokens = list(_tokens(drawn, names.tokenizer))
        starts = np.cumsum([0, *(len(text) for text, _, _ in tokens)])
        logprobs = {
            "tokens": [text for text, _, _ in tokens],
            "token_logprobs": [value for _, _, value in tokens],
            "top_logprobs": None,
            "text_offset": starts[:-1].tolist(),
        }
    return {
        "index": place,
        "text": drawn.result.text or "",
        "logprobs": logprobs,
        "finish_reason": _REASONS[drawn.result.finish_reason],
    }


_REASONS = {"stop": "stop", "length": "length", "context": "length"}


def _tokens(drawn: Drawn, tokenizer: Tokenizer | None) -> Iterable[tuple[str, bytes, float]]:
    """Text, bytes and log-probability of each token; one that only ended the text is left out."""
    result = drawn.result
    count = len(result.token_ids) - drawn.ended
    for token, value in zip(result.token_ids[:count], result.logprobs, strict=False):
        data = b"" if tokenizer is None else tokenizer.token_bytes(token)
        yield data.decode(errors="replace"), data, _short(value)


def _short(value: Any) -> float:
    """A float32 as the shortest number that is read back as it."""
    return float(str(np.float32(value)))


_ENCODINGS = {
    "float": lambda vector: [_short(value) for value in vector],
    "base64": lambda vector: base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode(),
}


def _digest(key: str | int | None) -> str:
    return hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
