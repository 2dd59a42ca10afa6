"""Templates run beside this process: what one of them does to itself is one line here."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxchat.text import template_process
from jaxchat.text.template_process import ask
from jaxchat.text.template_worker import Templates

DOUBLING = (
    "{% set n = namespace(s='abcd') %}{% for i in range(70) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
)
NESTED = (
    "{% set n = namespace(l=[]) %}{% for i in range(70) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}"
)
LOOPS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


def test_a_template_is_rendered_with_what_it_is_given():
    context = {"messages": [{"role": "user", "content": "é🙂"}], "pair": (1, 2)}
    assert ask("render", "{{ messages[0].content }}{{ pair[1] }}", context) == {"text": "é🙂2"}


def test_here_and_there_are_the_same():
    for source in ("{{ x + 1 }}", "{{ nothing.there }}", "{% if %}", "{{ raise_exception('no') }}"):
        assert ask("render", source, {"x": 1}) == Templates().render(source, {"x": 1})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 'a' * 10**11 }}", "broken: .* memory|failed: .* memory"),
        (DOUBLING, "failed: it needs more than 1024 MiB of memory"),
        ("{% set x = 'ab'|center(10**11) %}", "(failed|broken): .*memory"),
        ("{{ lipsum(n=5) }}", "failed: UndefinedError: 'lipsum' is undefined"),
        ("{{ '\\udfff' }}", "failed: it writes '.udfff', which is no character"),
        ("{% continue %}", "broken: .*continue"),
        ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "broken: .*(recursion|nested)"),
        ("{% for x in y %}" * 3000 + "{% endfor %}" * 3000, "broken: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "failed: RecursionError"),
        ("{{ 'b' * 70000000 }}", "failed: it writes 70000000 characters"),
        ("{{ raise_exception('\x1b[2J' ~ 'x' * 10**6) }}", "refused: .\\[2Jxxx"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems limit no memory")
def test_what_a_template_does_to_itself_is_one_short_line(source, said):
    (answer,) = ask("render", source, {}).items()
    assert re.match(said, ": ".join(answer))
    assert len(answer[1]) <= 1000
    assert "\n" not in answer[1]
    assert ask("render", "{{ 1 + 1 }}", {}) == {"text": "2"}


@pytest.mark.parametrize("source", [LOOPS, NESTED, "{{ 9**(9**9) }}"])
def test_a_template_that_does_not_end_is_ended(source, monkeypatch):
    monkeypatch.setattr(template_process, "MAX_SECONDS", 0.3)
    started = time.perf_counter()
    assert ask("render", source, {}) == {"failed": "it takes more than 0.3 seconds"}
    assert time.perf_counter() - started < 10
    monkeypatch.undo()
    assert ask("render", "{{ 1 + 1 }}", {}) == {"text": "2"}


def test_who_ends_the_process_does_no_harm():
    ask("compile", "x")
    process = template_process._process
    assert process is not None
    process._process.send_signal(signal.SIGKILL)
    process._process.wait()
    assert ask("render", "{{ 1 + 1 }}", {}) == {"text": "2"}


def test_without_another_process_templates_run_in_this_one(monkeypatch):
    template_process._end()
    with monkeypatch.context() as alone:
        alone.setattr(sys, "executable", "/no/such/python")
        assert ask("render", "{{ 1 + 1 }}", {}) == {"text": "2"}
        assert template_process._process is None
        alone.setattr(sys, "executable", "/bin/false")
        assert ask("render", "{{ 2 + 2 }}", {}) == {"text": "4"}
    assert ask("render", "{{ 3 + 3 }}", {}) == {"text": "6"}
    assert template_process._process is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_has_a_process_of_its_own_and_both_end_with_theirs():
    script = """
import os
from jaxchat.text import template_process as t
t.ask("compile", "x")
ours = t._process._process.pid
child = os.fork()
assert t.ask("render", "{{ 1 + 1 }}", {}) == {"text": "2"}
assert (t._process._process.pid == ours) == (child != 0)
if child:
    os.waitpid(child, 0)
    assert t.ask("render", "{{ 2 + 2 }}", {}) == {"text": "4"}
print(t._process._process.pid)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    for pid in map(int, done.stdout.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
