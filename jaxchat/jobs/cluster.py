"""Several models that answer one job, each in a process of its own, here or on the machines of a Ray cluster.

A worker that dies loses nothing: what it has not answered goes to another. Ray is imported when it is needed.
"""

import contextlib
import importlib.util
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from jaxchat.errors import JaxchatError, UsageError, in_flags
from jaxchat.jobs.answering import Answerer, Manner
from jaxchat.jobs.answers import Finished
from jaxchat.jobs.input_file import InputFile, Line
from jaxchat.jobs.job import WINDOW, answering, windows
from jaxchat.jobs.record import Record
from jaxchat.runtime import Model
from jaxchat.visible import shown

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Of a worker: what kills it more often is not an accident."""
CONNECT_SECONDS = 20
"""What a cluster has to answer."""
_REPLY_SECONDS, _REPLY_LINES = 0.25, 256
"""A worker tells what it has when either is reached."""
_STORE_BYTES = 256 << 20
"""Of Ray's own memory on this machine: requests and answers pass through it, models do not."""

Load = Callable[[], Model]


class _Reply(NamedTuple):
    """What a worker says.

    Attributes:
      answers: since it spoke last.
      over: whether it has no more lines.
      error: what it ended in, and the exit code of that.
      identity: once it is loaded, what its answers depend on.
    """

    answers: list[Finished] = []  # noqa: RUF012
    over: bool = False
    error: tuple[str, int] | None = None
    identity: Mapping[str, str] | None = None


class _Worker:
    """A model in a process of its own: what Ray makes an actor of."""

    def __init__(self, cores: Sequence[int]):
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)  # XLA's and the kernels' threads are as many, and stay there

    def load(self, load: Load, manner: Manner) -> _Reply:
        """Loads the model."""
        return self._guarded(lambda: self._loaded(load, manner))

    def work(self, lines: Sequence[Line] | None) -> _Reply:
        """Begins with lines, or goes on with those before, for a moment."""
        if lines is not None:
            self._answers = self._answerer.answers(lines)
        return self._guarded(self._some)

    def _loaded(self, load: Load, manner: Manner) -> _Reply:
        model = load()
        self._answerer = Answerer(model, manner)
        return _Reply(identity=answering(model))

    def _some(self) -> _Reply:
        found: list[Finished] = []
        until = time.monotonic() + _REPLY_SECONDS
        for finished in self._answers:
            found.append(finished)
            if len(found) >= _REPLY_LINES or time.monotonic() > until:
                return _Reply(found)
        return _Reply(found, over=True)

    def _guarded(self, body: Callable[[], _Reply]) -> _Reply:
        """An error as a value: Ray would make it pages of text."""
        try:
            with in_flags():
                return body()
        except JaxchatError as error:
            return _Reply(error=(str(error), error.exit_code))
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            return _Reply(error=(f"a worker failed: {type(error).__name__}: {text}", 1))


class _Seat:
    """A worker's place: who sits there changes when one dies.

    Attributes:
      lines: that it has not answered yet, by number.
      promise: what it is asked for, None while nothing is.
    """

    def __init__(self, cores: Sequence[int]):
        self.cores = cores
        self.actor: Any = None
        self.promise: Any = None
        self.loaded = False
        self.restarts = 0
        self.lines: dict[int, Line] = {}

    @property
    def working(self) -> bool:
        """Whether it is to say more about its lines."""
        return self.loaded and self.promise is not None


class Workers:
    """Models that load at once, and answer the lines of one job.

    Args:
      load: makes a model; called in each process.
      manner: how lines are answered.
      count: how many; None is one a GPU or TPU of the cluster, or else one a machine.
      address: of a Ray cluster; None begins one on this machine, for this job.

    Raises:
      JaxchatError: Ray is not installed, or the cluster does not answer.
      UsageError: there cannot be so many.
    """

    def __init__(self, load: Load, manner: Manner, *, count: int | None, address: str | None):
        if importlib.util.find_spec("ray") is None:
            raise JaxchatError(
                "--workers and --ray need Ray, which is not installed; pip install 'jaxchat[ray]'"
            )
        self._load, self._manner = load, manner
        self._identity: Mapping[str, str] | None = None
        self._ray = connected(address, count or 1)
        try:
            chosen, self._needs = resources(self._ray, count, address)
            self._seats = [
                _Seat(cores_of(place, chosen) if address is None else ()) for place in range(chosen)
            ]
            for seat in self._seats:
                self._fill(seat)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        closed(self._ray)

    def ready(self) -> Mapping[str, str]:
        """What answers depend on, once the first model is loaded.

        Raises:
          JaxchatError: what is wrong with the model.
        """
        while self._identity is None:
            self._receive(deque())
        return self._identity

    def answers(self, source: InputFile, record: Record) -> Iterator[Finished]:
        """The answers to what is left.

        Raises:
          JaxchatError: a model cannot go on, or workers die again and again.
        """
        count, together = len(self._seats), self._manner.together
        fresh = windows(
            source, record, lambda left: max(min(math.ceil(left / (4 * count)), WINDOW), together)
        )
        again: deque[list[Line]] = deque()
        left = next(fresh, None)
        while True:
            for seat in self._seats:
                if seat.loaded and seat.promise is None and (again or left is not None):
                    lines = again.popleft() if again else left
                    if lines is left:
                        left = next(fresh, None)
                    self._begin(seat, lines or [])
            # Of workers that still load nobody has to wait when all is done.
            if not again and left is None and not any(seat.working for seat in self._seats):
                return
            yield from self._receive(again)

    def _begin(self, seat: _Seat, lines: Sequence[Line]) -> None:
        seat.lines = {line.number: line for line in lines}
        seat.promise = seat.actor.work.remote(lines)

    def _receive(self, again: deque[list[Line]]) -> list[Finished]:
        """Waits for what a worker says; lines of one that died are to be done again."""
        promises = {seat.promise: seat for seat in self._seats if seat.promise is not None}
        (first, *_), _ = self._ray.wait(list(promises), num_returns=1)
        seat = promises[first]
        seat.promise = None
        try:
            reply: _Reply = self._ray.get(first)
        except self._ray.exceptions.RayError as error:
            self._replace(seat, again, error)
            return []
        if reply.error is not None:
            text, code = reply.error
            raise UsageError(text) if code == UsageError.exit_code else JaxchatError(text)
        if reply.identity is not None:
            self._agree(reply.identity)
            seat.loaded = True
        for finished in reply.answers:
            seat.lines.pop(finished.number, None)
        if reply.identity is None and not reply.over:
            seat.promise = seat.actor.work.remote(None)
        return reply.answers

    def _agree(self, identity: Mapping[str, str]) -> None:
        """Refuses workers that would answer differently."""
        self._identity = self._identity or identity
        for key, value in identity.items():
            if self._identity.get(key) != value:
                raise JaxchatError(
                    f"the workers do not agree: {key} is {shown(self._identity.get(key))} for one and "
                    f"{shown(value)} for another; the model has to be the same on all machines"
                )

    def _fill(self, seat: _Seat) -> None:
        """Puts a new worker there, which begins to load."""
        actor = self._ray.remote(**self._needs)(_Worker)
        seat.actor, seat.loaded = actor.remote(seat.cores), False
        seat.promise = seat.actor.load.remote(self._load, self._manner)

    def _replace(self, seat: _Seat, again: deque[list[Line]], error: Exception) -> None:
        left, seat.lines = list(seat.lines.values()), {}
        if left:
            again.append(left)
        logger.warning(
            "a worker has ended (%s); its %d unfinished lines go to another", reason_of(error), len(left)
        )
        seat.restarts += 1
        if seat.restarts <= MAX_RESTARTS:
            self._fill(seat)
            return
        self._seats.remove(seat)
        if not self._seats:
            raise JaxchatError(
                f"the workers have ended {seat.restarts} times, the last one so: {reason_of(error)}; "
                "give fewer --workers, or less to do at once with --max_inflight"
            )


def reason_of(error: Exception) -> str:
    """The first sentence of what Ray says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[0]) if lines else type(error).__name__


def cores_of(place: int, count: int) -> list[int]:
    """The cores of one of several workers on this machine."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // count
    return cores[place * share : (place + 1) * share] if share else [cores[place % len(cores)]]


def resources(ray: Any, count: int | None, address: str | None) -> tuple[int, dict[str, Any]]:
    """How many workers there are to be, and what Ray gives each."""
    there = ray.cluster_resources()
    needs: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0}
    kinds: dict[str, dict[str, Any]] = {"GPU": {"num_gpus": 1}, "TPU": {"resources": {"TPU": 1}}}
    kind = next((kind for kind in kinds if there.get(kind, 0) >= 1), None)
    most = int(there.get(kind or "CPU", 1))
    if kind is not None:
        needs |= kinds[kind]
    machines = sum(1 for node in ray.nodes() if node.get("Alive"))
    chosen = count or (most if kind else machines)
    if chosen > most:
        where = "this machine" if address is None else f"the cluster at {address}"
        raise UsageError(
            f"--workers is {chosen}, and {where} has {most} {kind or 'CPU'}; give at most {most}"
        )
    return chosen, needs


# --- Ray, which says nothing and does not hang


def connected(address: str | None, count: int) -> Any:
    """The module `ray`, connected."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if address is None:
        settings |= {
            "address": "local",
            "num_cpus": count,
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
        }
    else:
        _probe(address)
        settings["address"] = address
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _hushed():
            import ray

            ray.init(**settings)
    except Exception as error:
        raise JaxchatError(f"Ray does not start: {reason_of(error)}") from None
    finally:
        for number, handler in handlers.items():  # Ray puts its own there
            signal.signal(number, handler)
    return ray


def closed(ray: Any) -> None:
    """Leaves the cluster, and ends it where this process began it."""
    with _hushed(), contextlib.suppress(Exception):
        ray.shutdown()


_PROBE = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
ray.shutdown()
"""


def _probe(address: str) -> None:
    """Tries a cluster in another process, which may hang or abort where there is none.

    Raises:
      JaxchatError: it does not answer.
    """
    advice = "begin one with `ray start --head`, and give what that says"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS / 4).close()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "no answer"
            raise JaxchatError(f"--ray {address}: no cluster answers there ({reason}); {advice}") from None
    mode, said = _tried(address)
    if mode is None:
        raise JaxchatError(f"--ray {address}: no cluster answers there ({said}); {advice}")
    os.environ[_AUTH] = mode


_AUTH = "RAY_AUTH_MODE"
"""Whether clusters are told a token: Ray asks for one where it has made one, and may not send it itself."""


def _tried(address: str) -> tuple[str | None, str]:
    """The mode of authentication in which a cluster answers; None and why, if it does in none."""
    modes = [os.environ[_AUTH]] if _AUTH in os.environ else ["disabled", "token"]
    processes = {mode: _probing(address, mode) for mode in modes}
    until = time.monotonic() + CONNECT_SECONDS
    try:
        while time.monotonic() < until:
            codes = {mode: process.poll() for mode, process in processes.items()}
            if found := next((mode for mode, code in codes.items() if code == 0), None):
                return found, ""
            if None not in codes.values():
                said = processes[modes[0]].communicate()[1].strip().splitlines()
                return None, shown(said[-1]) if said else "no answer"
            time.sleep(0.05)
        return None, f"nothing within {CONNECT_SECONDS} s"
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def _probing(address: str, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROBE, address],
        env={**os.environ, _AUTH: mode},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """What this process and those it starts write goes nowhere; Ray's own logs are in its folder."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    with open(os.devnull, "wb") as nowhere:
        for number in kept:
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
