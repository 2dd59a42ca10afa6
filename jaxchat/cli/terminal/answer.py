"""One answer to one prompt: as text with its statistics, or as one JSON object."""

import json
import time
from typing import Any

from jaxchat.chat import saved
from jaxchat.chat.replies import Result
from jaxchat.cli.request import Request
from jaxchat.cli.stats import CompileClock, Stats
from jaxchat.cli.terminal.replies import Replies
from jaxchat.cli.terminal.waiting import reply_awaited
from jaxchat.cli.terminal.writing import reply_writer, say
from jaxchat.families import count_parameters


def answer(replies: Replies, request: Request, stats: Stats, clock: CompileClock) -> None:
    """Writes the answer to the prompt, and keeps the conversation where it was asked for."""
    assert request.prompt is not None  # generate.py saw to it
    started = time.perf_counter()
    writer = None if request.json else reply_writer(markdown=request.markdown)
    with reply_awaited(clock, hidden=request.quiet) as waiting:
        stream = replies.send(request.prompt, request.ai_prefix, request.ai_prefix_in, request.options)
        for piece in stream.parts():
            if writer is not None:
                waiting.stop()
                writer.write(piece)
    stats.add(stream.result.timings, clock, started)
    if request.save_session is not None:
        replies.session.save(saved.place(request.save_session))
    if writer is None:
        print(json.dumps(_as_json(replies, request, stream.result, stats), ensure_ascii=False), flush=True)
        return
    writer.end()
    if stream.result.finish_reason == "context" and not request.quiet:
        limit = replies.model.engine.max_length
        say(
            f"jaxchat: the context of {limit} tokens is full; raise --max_length or use --overflow "
            "truncate_oldest"
        )
    if request.verbose:
        for line in (*stats.lines(), f"seed: {request.options.seed}"):
            say(line)


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
        "adapters": list(map(str, model.uses)),
        "parameters": count_parameters(model.config, len(model.plan)),
        "format": replies.format,
        "seed": request.options.seed,
        "timings": stats.as_json(),
    }
