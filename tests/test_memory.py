"""What does not fit is refused before it is allocated, with what it needs and what there is."""

from pathlib import Path
from typing import NamedTuple

import pytest

import jaxchat
from jaxchat import analysis, memory
from jaxchat.errors import JaxchatError
from tests.support.tiny_chat import write_tiny_chat


class Device(NamedTuple):
    platform: str
    stats: dict[str, int] | None = None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    write(
        tmp_path / "proc/meminfo",
        "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\nSwapFree: 1000 kB\n",
    )
    return tmp_path


def test_free_is_what_can_be_had_with_swap(machine):
    assert memory.host_memory(machine) == (8000 << 10, 6000 << 10)


def test_a_container_has_its_limit_less_what_it_uses_and_cannot_drop(machine):
    group = machine / "sys/fs/cgroup"
    write(group / "memory.current", "3000000\n")
    write(group / "memory.stat", "anon 5\ninactive_file 1000000\n")
    write(group / "memory.max", "max\n")
    assert memory.host_memory(machine) == (8000 << 10, 6000 << 10)
    write(group / "memory.max", "4000000\n")
    assert memory.host_memory(machine) == (4000000, 2000000)


def test_the_same_of_older_containers(machine):
    group = machine / "sys/fs/cgroup/memory"
    write(group / "memory.usage_in_bytes", "3000000\n")
    write(group / "memory.stat", "total_inactive_file 500000\n")
    write(group / "memory.limit_in_bytes", f"{1 << 62}\n")
    assert memory.host_memory(machine) == (8000 << 10, 6000 << 10)
    write(group / "memory.limit_in_bytes", "4000000\n")
    assert memory.host_memory(machine) == (4000000, 1500000)


def test_a_machine_that_does_not_tell_has_no_limit_but_its_size(tmp_path):
    total, free = memory.host_memory(tmp_path)
    assert total == free > 0


def test_accelerators_add_up_and_one_that_does_not_tell_is_endless():
    two = [Device("gpu", {"bytes_limit": 100, "bytes_in_use": 30})] * 2
    assert memory.memory_of(two) == (200, 140)
    assert memory.memory_of([*two, Device("gpu")])[1] > 1 << 60


def test_a_refusal_says_what_is_needed_and_what_there_is():
    gpu = Device("gpu", {"bytes_limit": 24_000_000_000, "bytes_in_use": 1_000_000_000})
    memory.require(23_000_000_000, [gpu], what="it", advice="buy more")
    with pytest.raises(JaxchatError) as refusal:
        memory.require(61_000_000_000, [gpu], what="the cache", advice="take less")
    assert str(refusal.value) == (
        "the cache needs 61.0 GB, and of this machine's 24.0 GB of memory 23.0 GB are free; take less"
    )


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(memory, "host_memory", lambda: (20_000, 10_000))
    return monkeypatch


def test_weights_that_do_not_fit_are_not_loaded_but_those_of_a_mapped_file_are(tmp_path, tight):
    write_tiny_chat(tmp_path / "hf")
    with pytest.raises(
        JaxchatError, match=r"^the model's weights .* needs .* 0 MB of memory.*quantize them \(int4"
    ):
        jaxchat.load(tmp_path / "hf")


def test_a_cache_that_does_not_fit_is_not_allocated_and_the_model_goes_on_with_less(tmp_path, monkeypatch):
    write_tiny_chat(tmp_path)
    model = jaxchat.load(tmp_path, max_length=64)
    with monkeypatch.context() as tight:
        tight.setattr(memory, "host_memory", lambda: (20_000, 10_000))
        with pytest.raises(JaxchatError, match=r"^the KV cache of \d+ slots, 1 x 64 tokens needs"):
            model.generate("hello", max_new_tokens=2)
        windows = analysis.cut_windows(list(range(40)), 20)
        with pytest.raises(JaxchatError, match=r"^the residual stream of 2 windows of 20 tokens needs"):
            analysis.analyze(model.engine, model.plan, windows)
    assert model.generate("hello", max_new_tokens=2)
