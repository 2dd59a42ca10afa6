import pytest

from tests.support.commands import Commands


@pytest.fixture
def commands(capsys, monkeypatch):
    return Commands(capsys, monkeypatch)
