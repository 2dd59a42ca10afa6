"""Scores of plans by several models at once, each in a process of its own: here, or on a Ray cluster.

Plans are dealt out one by one; a worker that dies loses nothing, its plan goes to another. Connecting is that
of jobs. Ray is imported when it is needed.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self

from jaxchat.errors import JaxchatError, UsageError, in_flags
from jaxchat.jobs.cluster import MAX_RESTARTS, closed, connected, cores_of, reason_of, resources
from jaxchat.layer_plan import LayerPlan
from jaxchat.search.run import Question, local_scorers
from jaxchat.search.sample import Sample, Scores

logger = logging.getLogger(__name__)

Build = Callable[[], tuple[Any, Question]]
"""Makes an engine and the question in a process: the same wherever it is called."""


class _Worker:
    """A model and its samples: what Ray makes an actor of."""

    def __init__(self, cores: Sequence[int]):
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

    def load(self, build: Build) -> str | None:
        """Loads the model; what is wrong with it, as Ray would make pages of an error."""
        try:
            with in_flags():
                self._scorers = local_scorers(*build())
        except JaxchatError as error:
            return str(error)
        return None

    def scores(self, sample: str, plan: LayerPlan) -> list[Any]:
        """The items' scores and weights."""
        (found,) = self._scorers[sample].scores([plan])
        return [found.values, found.weights]


class _Seat:
    def __init__(self, cores: Sequence[int]):
        self.cores = cores
        self.actor: Any = None
        self.restarts = 0


class RemoteScorers:
    """Workers that score plans.

    Args:
      build: what each calls.
      question: the same, made here.
      count: how many workers; None is one a GPU or TPU of the cluster, or else one a machine.
      address: of a Ray cluster; None begins one on this machine.

    Raises:
      JaxchatError: Ray is not installed, the cluster does not answer, or a worker cannot load the model.
      UsageError: there cannot be so many.
    """

    def __init__(self, build: Build, question: Question, *, count: int | None, address: str | None):
        self._build, self._samples = build, question.samples
        self._ray = connected(address, count or 1)
        try:
            chosen, self._needs = resources(self._ray, count, address)
            self._seats = [
                _Seat(cores_of(place, chosen) if address is None else ()) for place in range(chosen)
            ]
            for loading in [self._fill(seat) for seat in self._seats]:
                self._loaded(loading)
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

    @property
    def count(self) -> int:
        """How many workers there are."""
        return len(self._seats)

    def by_sample(self) -> dict[str, "_RemoteScorer"]:
        """What `search` takes: a scorer for each sample."""
        return {name: _RemoteScorer(self, name, sample) for name, sample in self._samples.items()}

    def scores(self, sample: str, plans: Sequence[LayerPlan]) -> list[Scores]:
        """The scores of plans, in their order."""
        left = deque(range(len(plans)))
        found: dict[int, Scores] = {}
        idle, busy = list(self._seats), {}
        while len(found) < len(plans):
            while idle and left:
                seat, number = idle.pop(), left.popleft()
                busy[seat.actor.scores.remote(sample, plans[number])] = seat, number
            (done, *_), _ = self._ray.wait(list(busy), num_returns=1)
            seat, number = busy.pop(done)
            try:
                found[number] = Scores(*self._ray.get(done))
                idle.append(seat)
            except self._ray.exceptions.RayActorError as error:
                left.appendleft(number)
                if self._replaced(seat, error):
                    idle.append(seat)
            except self._ray.exceptions.RayError as error:
                raise JaxchatError(f"a worker failed: {reason_of(error)}") from None
        return [found[number] for number in range(len(plans))]

    def _fill(self, seat: _Seat) -> Any:
        seat.actor = self._ray.remote(**self._needs)(_Worker).remote(seat.cores)
        return seat.actor.load.remote(self._build)

    def _loaded(self, loading: Any) -> None:
        try:
            problem = self._ray.get(loading)
        except self._ray.exceptions.RayError as error:
            raise JaxchatError(f"a worker failed: {reason_of(error)}") from None
        if problem is not None:
            raise UsageError(problem)

    def _replaced(self, seat: _Seat, error: Exception) -> bool:
        """Puts a new worker in the place of one that died; False if that happens there again and again."""
        seat.restarts += 1
        logger.warning("a worker has ended (%s); its plan goes to another", reason_of(error))
        if seat.restarts <= MAX_RESTARTS:
            self._loaded(self._fill(seat))
            return True
        self._seats.remove(seat)
        if not self._seats:
            raise JaxchatError(
                f"the workers have ended {seat.restarts} times, the last one so: {reason_of(error)}"
            )
        return False


class _RemoteScorer:
    """A sample's scores by workers; see `trials.Scoring`."""

    def __init__(self, workers: RemoteScorers, name: str, sample: Sample):
        self._workers, self._name, self.sample = workers, name, sample

    def scores(self, plans: Sequence[LayerPlan]) -> list[Scores]:
        """See `Scoring`."""
        return self._workers.scores(self._name, plans)
