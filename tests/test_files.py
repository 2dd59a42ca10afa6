"""Files of ours are written whole, and locks die with their process; files of others are bounded."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.cli.terminal.history import default_file
from jaxchat.engine.compile_cache import default_directory
from jaxchat.errors import JaxchatError
from jaxchat.files import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    UnreadableError,
    locked,
    parse_json,
    read_bytes,
    read_json,
    read_optional_json,
    read_small_text,
    replaced,
    try_to_replace,
    write_atomically,
)


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def fail_half_way():
        with replaced(path) as new:
            new.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_bytes() == b"old"
    with replaced(path, mode=0o600) as new:
        new.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".a.json.{ended.pid}-0123abcd").touch()
    others = [f".a.json.{os.getpid()}-0123abcd", f".b.json.{ended.pid}-0123abcd", f".a.json.{ended.pid}-mine"]
    for name in others:
        (tmp_path / name).touch()
    write_atomically(path, b"new")
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(["a.json", *others])


def test_a_pipe_is_read_where_it_is_open_already():
    if not os.path.isdir("/dev/fd"):
        pytest.skip("there is no /dev/fd here")
    reading, writing = os.pipe()
    os.write(writing, b"0:3")
    os.close(writing)
    assert read_small_text(Path(f"/dev/fd/{reading}")) == "0:3"
    os.close(reading)


def test_a_name_is_utf8_whatever_the_locale(tmp_path, monkeypatch):
    (tmp_path / "plän.txt").write_text("0:3")
    (tmp_path / "plän.txt").rename(tmp_path / os.fsdecode("plän.txt".encode()))
    encode = os.fsencode

    def ascii_only(name):
        str(name).encode("ascii", "surrogateescape")
        return encode(name)

    monkeypatch.setattr(os, "fsencode", ascii_only)
    assert read_small_text(tmp_path / "plän.txt") == "0:3"


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path):
    path = tmp_path / "lock"
    with locked(path), pytest.raises(BlockingIOError), locked(path):
        pass
    assert not path.exists()
    hold = "import os, pathlib, sys; from jaxchat.files import locked\n"
    hold += "locked(pathlib.Path(sys.argv[1])).__enter__(); os._exit(0)"
    subprocess.run([sys.executable, "-c", hold, str(path)], check=True)
    with locked(path):  # who held it has died
        assert path.exists()


@pytest.mark.parametrize(
    ("variable", "find", "usual", "name"),
    [
        ("XDG_STATE_HOME", default_file, ".local/state", "history"),
        ("XDG_CACHE_HOME", default_directory, ".cache", "xla"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other places")
def test_files_of_the_user_are_where_xdg_says(tmp_path, monkeypatch, variable, find, usual, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    assert find() == tmp_path / usual / "jaxchat" / name
    monkeypatch.setenv(variable, "")
    assert find() == tmp_path / usual / "jaxchat" / name
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    assert find() == tmp_path / "there" / "jaxchat" / name


def test_of_a_link_the_target_is_replaced(tmp_path):
    target, link, to_be = tmp_path / "there" / "a.json", tmp_path / "link", tmp_path / "other"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to("there/a.json")
    to_be.symlink_to(link)
    for path, data in ((link, b"new"), (to_be, b"newer")):
        try_to_replace(path)
        write_atomically(path, data)
        assert target.read_bytes() == data
    target.unlink()
    write_atomically(to_be, b"made")
    assert target.read_bytes() == b"made"
    assert link.is_symlink()
    assert to_be.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "link", "other", "there"]


def _made(kind, path):
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "link to a device":
        path.symlink_to(os.devnull)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long name":
        return path.with_name("x" * 300)
    elif kind == "no folder":
        return path / "b"
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "this is a directory, not a file; name another file"),
        ("pipe", "this is a named pipe, not a file; "),
        ("socket", "this is a socket, not a file; "),
        ("link to a device", "this is a device, not a file; "),
        ("loop", "Too many levels of symbolic links"),
        ("long name", "File name too long"),
        ("no folder", "there is no folder .*; make it first"),
    ],
)
def test_what_is_no_file_is_never_replaced(tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = _made(kind, Path("a"))
    before = [(p.name, p.lstat().st_mode) for p in tmp_path.iterdir()]
    for attempt in (lambda: try_to_replace(path), lambda: write_atomically(path, b"data")):
        with pytest.raises(OSError, match=message):
            attempt()
    assert [(p.name, p.lstat().st_mode) for p in tmp_path.iterdir()] == before


def test_the_file_that_the_output_goes_to_is_not_replaced(tmp_path):
    out = tmp_path / "out.txt"
    code = "import pathlib, sys; from jaxchat.files import write_atomically\n"
    code += "write_atomically(pathlib.Path(sys.argv[1]), b'data')"
    for name in (out, "/dev/stdout"):
        with out.open("wb") as file:
            done = subprocess.run(
                [sys.executable, "-c", code, str(name)], stdout=file, stderr=subprocess.PIPE
            )
        assert b"this is where the output goes already" in done.stderr
        assert out.read_bytes() == b""


# --- files of others


def _make(path: Path, what: str) -> None:
    if what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "directory":
        path.mkdir()
    elif what == "dangling":
        path.symlink_to("nowhere")
    else:
        path.symlink_to(what)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("pipe", "a named pipe, not a file"),
        ("directory", "a directory, not a file"),
        ("/dev/zero", "a device, not a file"),
        ("loop", "levels of symbolic links"),
        ("dangling", "No such file"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="has none of these")
def test_what_is_no_file_is_refused_at_once(tmp_path, what, said):
    path = tmp_path / "config.json"
    _make(path, what)
    for read in (lambda: read_bytes(path, 100), lambda: read_small_text(path)):
        with pytest.raises(UnreadableError, match=said):
            read()
    for read_one in (read_json, read_optional_json):
        with pytest.raises(JaxchatError, match=rf"config\.json: not readable as JSON \(.*{said}"):
            read_one(path)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"x" * 100)
    assert len(read_bytes(path, 100)) == 100
    with pytest.raises(UnreadableError, match="more than"):
        read_bytes(path, 99)
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # takes no room
    with pytest.raises(JaxchatError, match=r"config\.json: not readable as JSON \(more than 64 MiB\)"):
        read_json(path)


def test_no_file_is_an_error_or_nothing(tmp_path):
    assert read_optional_json(tmp_path / "config.json") == {}
    with pytest.raises(JaxchatError, match=r"no such file; a model directory needs its config\.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, bom):
    (tmp_path / "a.json").write_bytes(bom + b'{"a": "\xc3\xa9"}\r\n')
    assert read_json(tmp_path / "a.json") == {"a": "é"}


@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}")])
def test_json_is_nested_so_deep_and_no_deeper(open_, close):
    def nested(depth: int) -> str:
        return open_ * depth + "1" + close * depth

    assert json.dumps(parse_json(nested(MAX_JSON_DEPTH))).count(open_[0]) == MAX_JSON_DEPTH
    for depth in (MAX_JSON_DEPTH + 1, 100_000):
        with pytest.raises(UnreadableError, match=f"nested more than {MAX_JSON_DEPTH} deep"):
            parse_json(nested(depth))
    with pytest.raises(UnreadableError):
        parse_json(open_ * 100_000)  # never closed


def test_a_number_of_thousands_of_digits_is_an_error():
    with pytest.raises(UnreadableError, match="digits"):
        parse_json('{"a": ' + "9" * 5000 + "}")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


@given(_JSON)
def test_every_ordinary_value_is_read_as_json_reads_it(value):
    assert parse_json(json.dumps(value)) == value


@given(st.text())
def test_any_other_text_is_one_kind_of_error(text):
    with contextlib.suppress(UnreadableError):
        parse_json(text)
