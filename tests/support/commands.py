"""Runs the commands: in this process, or in their own where pipes, signals and exit codes count."""

import io
import logging
import os
import subprocess
import sys
from typing import NamedTuple

from jaxchat import __main__ as program


class Done(NamedTuple):
    code: int
    out: str
    err: str


QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
"""Variables under which processes compile in half the time, and each program once."""


def environment():
    """What processes of the tests run in."""
    return {**os.environ, **QUICK}


def run_process(*arguments, stdin=""):
    """`python -m ARGUMENTS`, finished."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=120, env=environment())
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


class Commands:
    """`commands("generate", "-p", "hello")`: what `jaxchat generate -p hello` writes, run in this process."""

    def __init__(self, capsys, monkeypatch):
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments, stdin=""):
        data = stdin.encode() if isinstance(stdin, str) else stdin
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = program.main(["jaxchat", *map(str, arguments)])
        logger = logging.getLogger("jaxchat")  # which would go on writing to this run's standard error
        logger.handlers, logger.propagate = [], True
        return Done(code, *self._capsys.readouterr())

    def output(self, *arguments, **options):
        """Standard output of a run that succeeds."""
        done = self(*arguments, **options)
        assert done.code == 0, done.err
        return done.out

    def error(self, *arguments, code, **options):
        """The one line of an unsuccessful run, without its prefix."""
        done = self(*arguments, **options)
        assert (done.code, done.out) == (code, ""), done
        assert done.err.startswith("jaxchat: error: ")
        assert done.err.count("\n") == 1, done.err
        return done.err.removeprefix("jaxchat: error: ").rstrip("\n")
