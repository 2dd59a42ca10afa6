"""How much memory there is, so that what cannot fit is refused before it is allocated. Needs no JAX."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxchat.errors import JaxchatError

_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Version 2 and 1: where a container's limit, use and what of that can be dropped are."""


class TooLittleMemoryError(JaxchatError):
    """What is asked for does not fit into the memory of this machine."""


def require(needed: int, devices: Iterable[Any], *, what: str, advice: str) -> None:
    """Refuses what is more than the memory that is free on the devices together.

    Args:
      needed: bytes.
      devices: JAX's; those of the host share its memory.
      what: what needs it, to follow its name: `the KV cache of 4096 tokens`.
      advice: what to do.

    Raises:
      TooLittleMemoryError: it does not fit; says how much is needed and how much there is.
    """
    total, free = memory_of(devices)
    if needed > free:
        raise TooLittleMemoryError(
            f"{what} needs {_short(needed)}, and of this machine's {_short(total)} of memory "
            f"{_short(max(free, 0))} are free; {advice}"
        )


def memory_of(devices: Iterable[Any]) -> tuple[int, int]:
    """All bytes of devices and the free ones; what a device does not tell counts as endless."""
    devices = list(devices)
    if all(device.platform == "cpu" for device in devices):
        return host_memory()
    stats: list[Mapping[str, int]] = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in found for found in stats):
        return _ENDLESS, _ENDLESS
    total = sum(found["bytes_limit"] for found in stats)
    return total, total - sum(found.get("bytes_in_use", 0) for found in stats)


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """All bytes of memory of the host, or of the container if that may have less, and the free ones.

    Free is also what holds files that can be read again, and swap space.

    Args:
      root: where `/proc` and `/sys` are.
    """
    total, free = _physical(root)
    for folder, limit, used, droppable in _CGROUPS:
        directory = root / folder.lstrip("/")
        try:
            most, use = (int((directory / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # there is none, or it has no limit: "max"
            continue
        dropped = _fields(directory / "memory.stat").get(droppable, 0)
        total, free = min(total, most), min(free, most - use + dropped)
    return total, free


_ENDLESS = 1 << 62


def _physical(root: Path) -> tuple[int, int]:
    kilobytes = _fields(root / "proc/meminfo")
    if "MemAvailable:" in kilobytes:
        free = kilobytes["MemAvailable:"] + kilobytes.get("SwapFree:", 0)
        return kilobytes.get("MemTotal:", 0) << 10, free << 10
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return _ENDLESS, _ENDLESS
    return total, total


def _fields(path: Path) -> dict[str, int]:
    """The names and numbers of a file of such lines."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _short(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
