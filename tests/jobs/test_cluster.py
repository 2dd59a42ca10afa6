"""Who does which lines, among workers that die: with a stand-in for Ray, whose processes are none."""

import random
import types

import pytest

from jaxchat.errors import JaxchatError
from jaxchat.jobs.answering import Manner
from jaxchat.jobs.answers import Finished
from jaxchat.jobs.cluster import MAX_RESTARTS, Workers, _Reply, _Seat
from jaxchat.jobs.input_file import InputFile
from jaxchat.jobs.record import Record
from jaxchat.options import GenerateOptions
from tests.jobs.support import read_lines, write_lines


class GoneError(Exception):
    """A worker is dead."""


class Actor:
    """A worker that speaks when it likes, and dies with some probability each time it is asked."""

    def __init__(self, rng, mortality, done):
        self._rng, self._mortality, self._done = rng, mortality, done
        self.work = types.SimpleNamespace(remote=lambda lines: lambda: self._work(lines))
        self.load = types.SimpleNamespace(remote=lambda *_: lambda: _Reply(identity={"--model": "a"}))

    def _work(self, lines):
        if self._rng.random() < self._mortality:
            raise GoneError("the worker was killed")
        if lines is not None:
            self._left = list(lines)
        count = self._rng.randint(0, len(self._left))
        told, self._left = self._left[:count], self._left[count:]
        self._done += [line.number for line in told]
        # As with a real one: that there are no more may be told later than the last answer.
        over = not self._left and self._rng.random() < 0.5
        return _Reply([Finished(line.number, b"%d" % line.number, False) for line in told], over=over)


def workers(count, rng, mortality, done):
    found = Workers.__new__(Workers)
    found._manner, found._load = Manner(options=GenerateOptions(), together=2), None
    found._identity, found._needs = None, {}
    found._ray = types.SimpleNamespace(
        wait=lambda promises, num_returns: ([rng.choice(promises)], []),
        get=lambda promise: promise(),
        remote=lambda **_: (
            lambda cls: types.SimpleNamespace(remote=lambda cores: Actor(rng, mortality, done))
        ),
        exceptions=types.SimpleNamespace(RayError=GoneError),
    )
    found._seats = [_Seat(()) for _ in range(count)]
    for seat in found._seats:
        found._fill(seat)
    return found


@pytest.fixture
def source(tmp_path):
    return InputFile(write_lines(tmp_path / "in.jsonl", [{"id": n} for n in range(60)]))


def run(workers, source, output, *, resume=False):
    with Record(output, {}, created=0, last=source.total, resume=resume) as record:
        workers.ready()
        for finished in workers.answers(source, record):
            record.add(finished)
        record.assemble(output)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("mortality", [0, 0.1])
def test_every_line_is_answered_once_whoever_dies(source, tmp_path, count, mortality):
    finished, said = 0, []
    for seed in range(30):
        done, output = [], tmp_path / f"{seed}.jsonl"
        try:
            run(workers(count, random.Random(seed), mortality, done), source, output)
        except JaxchatError as error:
            said.append(str(error))
            continue
        finished += 1
        assert sorted(done) == list(range(1, 61))
        assert read_lines(output) == list(range(1, 61))
    assert all("the workers have ended" in text for text in said)
    assert finished >= (30 if not mortality or count == 5 else 3)


def test_workers_that_die_again_and_again_end_the_job_and_its_answers_stay(source, tmp_path):
    done = []
    with pytest.raises(
        JaxchatError, match=f"have ended {MAX_RESTARTS + 1} times, the last one so: 'the worker"
    ):
        run(workers(2, random.Random(0), 0.5, done), source, tmp_path / "out.jsonl")
    assert len(done) < 60
    run(workers(2, random.Random(1), 0, done), source, tmp_path / "out.jsonl", resume=True)
    assert sorted(done) == list(range(1, 61))


def test_workers_with_other_models_are_refused(source, tmp_path):
    found = workers(2, random.Random(0), 0, [])
    found._identity = {"--model": "b"}
    with pytest.raises(JaxchatError, match="the workers do not agree: --model is 'b' for one and 'a'"):
        run(found, source, tmp_path / "out.jsonl")
