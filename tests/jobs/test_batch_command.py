"""`jaxchat batch`, as its users run it, interrupt it, kill it, and share it among workers."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs.support import chat, openai, read_lines, write_lines
from tests.support.commands import environment, run_process
from tests.support.workers import workers_of

LINES = [
    {"id": "one", "prompt": "Once upon a time", "max_new_tokens": 6},
    chat("two", "Hello!", max_tokens=6),
    openai("three", "embeddings", input="a dog"),
    {"prompt": "The dog", "max_new_tokens": 6, "layer_plan": "0:3,1:"},
]


@pytest.fixture
def paths(tmp_path):
    return write_lines(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"


def partial(output):
    return output.with_name(f"{output.name}.partial")


def flags(paths, *more):
    return ("--input", paths[0], "--output", paths[1], "-m", "box", *more)


# --- in this process


def test_every_line_has_its_answer_in_its_place(paths, commands):
    done = commands("batch", *flags(paths, "--cost_per_hour", "36"))
    assert (done.code, done.out) == (0, "")
    found = read_lines(paths[1])
    assert [line.get("id", line.get("line")) for line in found[::3]] == ["one", 4]
    assert [line["custom_id"] for line in found[1:3]] == ["two", "three"]
    assert re.fullmatch(
        r"jaxchat: 4 lines, 0 with errors; \d+ prompt and 18 completion tokens; [\d,]+ tokens/s, [\d.]+ s; "
        r"[\d.e+-]+ per 1,000 lines\n",
        done.err,
    )
    assert sorted(path.name for path in paths[1].parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_line_that_cannot_be_answered_makes_the_exit_code_1(paths, commands):
    write_lines(paths[0], [*LINES, b"nonsense", {"prompt": "x", "foo": 1}])
    done = commands("batch", *flags(paths))
    assert done.code == 1
    assert "6 lines, 2 with errors" in done.err
    assert [line["error"] is None for line in read_lines(paths[1])[3:]] == [True, False, False]


def test_the_flags_say_what_lines_do_not(paths, commands):
    write_lines(paths[0], [{"prompt": "Once upon a time"}, chat("a", "Hello!")])
    commands.output("batch", *flags(paths, "--max_new_tokens", "3", "--layer_spec", "0:4"))
    plain, talk = read_lines(paths[1])
    assert plain["completion_tokens"] == talk["response"]["body"]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("change", "more", "code", "said"),
    [
        (lambda a, b: a.unlink(), (), 2, "No such file or directory; give a file of JSON lines"),
        (lambda a, b: a.write_text("\n \n"), (), 2, "there are no lines in it"),
        (lambda a, b: a.write_text(""), (), 2, "there are no lines in it"),
        (lambda a, b: a.write_text('{"id": 1}\n{"id": 2}\n{"id": 1}'), (), 2, "lines 1 and 3 have the same"),
        (lambda a, b: b.write_text("mine"), (), 2, "is there already; give --overwrite"),
        (lambda a, b: b.mkdir(), (), 2, "a directory, not a file"),
        (lambda a, b: (a.unlink(), os.mkfifo(a)), (), 2, "no ordinary file"),
        (lambda a, b: None, ("--output", "/nowhere/out.jsonl"), 2, "there is no folder /nowhere"),
        (lambda a, b: None, ("--max_inflight", "0"), 2, "--max_inflight is '0'"),
        (lambda a, b: partial(b).write_text("x\n"), (), 2, "give --resume to go on with it"),
        (lambda a, b: partial(b).write_text("x\n"), ("--resume",), 1, "holds no answers"),
        (lambda a, b: b.symlink_to(a), ("--overwrite",), 2, "is --input; give another name"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_files_ends_it_before_anything_is_computed(
    paths, commands, change, more, code, said
):
    change(*paths)
    before = paths[0].read_bytes() if paths[0].is_file() else b""
    assert said in commands.error("batch", *flags(paths, *more), code=code)
    if paths[0].is_file():
        assert paths[0].read_bytes() == before


def test_an_output_is_replaced_only_when_that_is_wanted(paths, commands):
    paths[1].write_text("mine")
    commands.error("batch", *flags(paths), code=2)
    commands.error("batch", *flags(paths, "--resume"), code=2)
    assert paths[1].read_text() == "mine"
    commands.output("batch", *flags(paths, "--overwrite"))
    assert len(read_lines(paths[1])) == 4


# --- as processes

COUNT = 100
"""Lines of a job that is long enough to be interrupted."""


def many(count, tokens=24):
    """Lines that take some seconds, of several kinds."""
    rng = random.Random(1)
    lines = []
    for number in range(count):
        who = rng.choice(("dog", "cat", "boy"))
        text = f"Once upon a time there was a {who} who {'ran ' * rng.randint(0, 40)}"
        some = {"temperature": rng.choice((0, 1)), "max_tokens": rng.randint(1, tokens)}
        plain = {"prompt": text, "max_new_tokens": tokens, "temperature": 1, "ignore_eos": True}
        lines.append(rng.choice((plain, {**plain, "layer_plan": "1:"}, chat(f"{number}", text, **some))))
    return lines


def command(paths, *more):
    return [sys.executable, "-m", "jaxchat", "batch", *map(str, flags(paths, *more))]


def started(paths, *more):
    return subprocess.Popen(command(paths, *more), stderr=subprocess.PIPE, env=environment())


def finished_lines(paths):
    kept = partial(paths[1])
    return kept.read_bytes().count(b"\n") - 1 if kept.exists() else 0


def wait_for(paths, lines, process, seconds=120):
    deadline = time.monotonic() + seconds
    while finished_lines(paths) < lines and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def killed_again_and_again(tmp_path, count, rounds):
    """Kills a job whenever some more lines are finished; how often, and whether a line was computed twice."""
    paths = write_lines(tmp_path / "in.jsonl", many(count)), tmp_path / "out.jsonl"
    rng, kills, before = random.Random(2), 0, 0
    for _ in range(rounds):
        process = started(paths, "--resume", "--max_inflight", str(rng.choice((1, 4, 8))))
        wait_for(paths, before + rng.randint(1, max(count // rounds, 2)), process)
        time.sleep(rng.random() / 50)
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        kills += 1
        assert not paths[1].exists()
        now = finished_lines(paths)
        assert now >= before
        before = now
    if not paths[1].exists():
        done = run_process("jaxchat", "batch", *flags(paths, "--resume"))
        assert done.code == 0, done.err
        assert f"goes on after {before:,} of {count:,} lines" in done.err or not before
    return paths, kills


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(count)`: the output of a job of so many lines that nobody disturbed."""
    made = {}

    def make(count):
        if count not in made:
            folder = tmp_path_factory.mktemp("whole")
            paths = write_lines(folder / "in.jsonl", many(count)), folder / "out.jsonl"
            done = run_process("jaxchat", "batch", *flags(paths))
            assert done.code == 0, done.err
            made[count] = paths
        return made[count]

    return make


def same(one, other):
    """Whether two outputs are the same but for the dates of their inputs."""
    dated = [re.sub(rb'"created": \d+', b"", path.read_bytes()) for path in (one, other)]
    return dated[0] == dated[1]


def test_a_killed_job_goes_on_and_ends_in_the_same_bytes(tmp_path, whole):
    paths, kills = killed_again_and_again(tmp_path, COUNT, 2)
    assert kills == 2
    assert same(paths[1], whole(COUNT)[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.full
def test_a_job_that_is_killed_twenty_times_ends_in_the_same_bytes(tmp_path, whole):
    paths, kills = killed_again_and_again(tmp_path, 1500, 20)
    assert kills >= 15
    assert same(paths[1], whole(1500)[1])


def test_ctrl_c_says_how_to_go_on_and_other_settings_are_refused(tmp_path, commands):
    paths = write_lines(tmp_path / "in.jsonl", many(COUNT)), tmp_path / "out.jsonl"
    process = started(paths)
    wait_for(paths, 5, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, said
    kept = finished_lines(paths)
    assert (
        f"interrupted; the {kept} of {COUNT} lines that are finished are kept in {paths[1]}.partial" in said
    )
    assert said.count("\n") == 1
    for more, words in (
        ((), "give --resume to go on with it"),
        (("--resume", "--temperature", "0.9"), "--temperature was 0.5 and is 0.9 now"),
        (("--resume", "--layer_spec", "0:3"), "--layer_spec was all and is 0:3 now"),
    ):
        assert words in commands.error("batch", *flags(paths, *more), code=2)
    with paths[0].open("ab") as file:
        file.write(b'{"prompt": "more"}\n')
    assert "--input was " in commands.error("batch", *flags(paths, "--resume"), code=2)
    assert finished_lines(paths) == kept


# --- workers


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_two_workers_give_the_same_bytes_though_one_is_killed(tmp_path, whole):
    pytest.importorskip("ray", reason="needs Ray, the extra `ray`")
    paths = write_lines(tmp_path / "in.jsonl", many(COUNT)), tmp_path / "out.jsonl"
    process = started(paths, "--workers", "2")
    wait_for(paths, 20, process)
    found = workers_of(process)
    os.kill(found[0], signal.SIGKILL)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, said
    assert len(found) == 2
    warning, summary = said.splitlines()
    assert re.search(r"a worker has ended \(.*\); its \d+ unfinished lines go to another", warning)
    assert f"{COUNT} lines, 0 with errors" in summary
    assert same(paths[1], whole(COUNT)[1])


def test_a_cluster_that_does_not_answer_is_one_line(paths, commands):
    pytest.importorskip("ray", reason="needs Ray, the extra `ray`")
    said = commands.error("batch", *flags(paths, "--ray", "127.0.0.1:1"), code=1)
    assert said.startswith("--ray 127.0.0.1:1: no cluster answers there (Connection refused); begin one with")


def test_without_ray_it_is_said_how_to_install_it(paths, commands, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = commands.error("batch", *flags(paths, "--workers", "2"), code=1)
    assert said.endswith("need Ray, which is not installed; pip install 'jaxchat[ray]'")
