"""One answer to one prompt: as text with its statistics, or as one JSON object."""

import json
import time
from typing import Any

from jaxchat.chat.replies import Result
from jaxchat.cli.request import Request
from jaxchat.cli.stats import CompileClock, Stats
from jaxchat.cli.terminal.replies import Replies
from jaxchat.cli.terminal.writing import reply_writer, say
from jaxchat.families import count_parameters
from jaxchat.runtime import Model


def answer(replies: Replies, request: Request, stats: Stats, clock: CompileClock) -> None:
    """Writes the answer to the prompt, and keeps the conversation where it was asked for."""
    assert request.prompt is not None  # generate.py saw to it
    started = time.perf_counter()
    stream = replies.send(request.prompt, request.ai_prefix, request.ai_prefix_in, request.options)
    writer = None if request.json else reply_writer(markdown=request.markdown)
    for piece in stream.parts():
        if writer is not None:
            writer.write(piece)
    stats.add(stream.result.timings, clock, started)
    if request.save_session is not None:
        replies.session.save(request.save_session)
    if writer is None:
        print(json.dumps(_as_json(replies, request, stream.result, stats), ensure_ascii=False), flush=True)
        return
    writer.end()
    say_if_full(stream.result, replies.model, "raise --max_length or use --overflow truncate_oldest")
    for line in stats.lines():
        say(line)


def say_if_full(result: Result, model: Model, advice: str) -> None:
    """Tells why a reply ended that the end of the context cut off, and what to do."""
    if result.finish_reason == "context":
        say(f"jaxchat: the context of {model.engine.max_length} tokens is full; {advice}")


def _as_json(replies: Replies, request: Request, result: Result, stats: Stats) -> dict[str, Any]:
    model = replies.model
    return {
        "text": result.text,
        "content": result.content,
        "reasoning": result.reasoning,
        "ai_prefix": request.ai_prefix,
        "ai_prefix_in": request.ai_prefix_in,
        "token_ids": result.token_ids,
        "logprobs": result.logprobs,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "model": request.model_name,
        "family": model.config.family,
        "layer_spec": str(model.plan),
        "parameters": count_parameters(model.config, len(model.plan)),
        "format": replies.format,
        "seed": request.options.seed,
        "timings": stats.as_json(),
    }
