"""Files of ours: written whole or not at all, and locks that die with their process."""

import subprocess
import sys

import pytest

from jaxchat.cli.terminal.history import default_file
from jaxchat.engine.compile_cache import default_directory
from jaxchat.files import locked, replaced, write_atomically


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
