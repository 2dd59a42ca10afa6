"""What a run cost: compile time, token rates, peak memory, and the lines that say so."""

import dataclasses
import resource
import sys
import time
from typing import Any

import jax

from jaxchat.analysis.show import short_bytes
from jaxchat.chat.replies import Timings

_COMPILE_EVENTS = "/jax/core/compile/"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompileClock:
    """Notes when JAX traces, lowers and compiles; loading from the compilation cache counts as compiling."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self.compiling = False  # a program has been traced that is not compiled yet
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def close(self) -> None:
        """Stops listening."""
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_COMPILE_EVENTS):
            end = time.perf_counter()
            self._spans.append((end - duration_secs, end))
            self.compiling = event != _COMPILED

    def seconds(self, start: float = 0.0, end: float = float("inf")) -> float:
        """Seconds spent compiling between two readings of `time.perf_counter`."""
        total, reached = 0.0, start
        # Tracing a function traces those it calls: spans nest, and their union is what was waited for.
        for begin, stop in sorted(self._spans):
            begin, stop = max(begin, reached), min(stop, end)
            if stop > begin:
                total += stop - begin
                reached = stop
        return total


@dataclasses.dataclass
class Stats:
    """The costs of a run, added up over its replies.

    Attributes:
      load_seconds: until the model was ready.
      compile_seconds: tracing and compiling, loading included.
      prefill_tokens, prefill_seconds: prompt tokens computed, and the time without compiling.
      decode_tokens, decode_seconds: tokens after each reply's first, and the time without compiling.
      time_to_first_token: of the last reply, compiling included.
      draft_steps, draft_tokens: steps that verified a draft, and the tokens that they gave.
      draft_rule: by which drafted tokens are accepted; None where there is no draft.
    """

    load_seconds: float = 0.0
    compile_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    time_to_first_token: float | None = None
    draft_steps: int = 0
    draft_tokens: int = 0
    draft_rule: str | None = None

    def add(self, timings: Timings, clock: CompileClock, started: float) -> None:
        """Adds a reply that was asked for at `started` (`time.perf_counter`)."""
        first = started + timings.prefill_seconds
        end = first + timings.decode_seconds
        self.prefill_tokens += timings.prefill_tokens
        self.prefill_seconds += max(timings.prefill_seconds - clock.seconds(started, first), 0.0)
        self.decode_tokens += timings.decode_tokens
        self.decode_seconds += max(timings.decode_seconds - clock.seconds(first, end), 0.0)
        self.time_to_first_token = timings.prefill_seconds
        self.draft_steps += timings.draft_steps
        self.draft_tokens += timings.draft_tokens
        self.compile_seconds = clock.seconds()

    def lines(self) -> list[str]:
        """Two lines for people, and one more where tokens are drafted."""
        first = self.time_to_first_token
        return [
            f"prefill: {self.prefill_tokens} tokens, {_rate(self.prefill_tokens, self.prefill_seconds)}; "
            f"decode: {self.decode_tokens} tokens, {_rate(self.decode_tokens, self.decode_seconds)}; "
            f"first token: {'-' if first is None else f'{first:.2f} s'}",
            f"load: {self.load_seconds:.2f} s; compile: {self.compile_seconds:.2f} s (not in the rates); "
            f"peak memory: {short_bytes(peak_memory_bytes())}",
            *self._of_drafts(),
        ]

    def _of_drafts(self) -> list[str]:
        if self.draft_rule is None:
            return []
        rule = "lossless" if self.draft_rule == "lossless" else f"{self.draft_rule}, LOSSY"
        found = "no step yet"
        if self.draft_steps:
            found = f"{self.draft_tokens / self.draft_steps:.2f} tokens a step in {self.draft_steps} steps"
        return [f"draft: {found} ({rule})"]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **dataclasses.asdict(self),
            "prefill_tokens_per_second": _per_second(self.prefill_tokens, self.prefill_seconds),
            "decode_tokens_per_second": _per_second(self.decode_tokens, self.decode_seconds),
            "draft_tokens_per_step": self.draft_tokens / self.draft_steps if self.draft_steps else None,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def peak_memory_bytes() -> int:
    """The most memory used so far: of the first device where it keeps account, else of this process."""
    device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        return int(device["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _per_second(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds else None


def _rate(count: int, seconds: float) -> str:
    rate = _per_second(count, seconds)
    return "- tokens/s" if rate is None else f"{rate:.1f} tokens/s"
