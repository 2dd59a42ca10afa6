"""Broken files: bytes of a whole one changed, removed or put in, or one of its numbers made extreme."""

import random
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxchat.errors import JaxchatError


def mutated(content: bytes, rng: random.Random, part: slice) -> bytes:
    """One to four changes of a file, those of bytes in a part of it."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start, stop, _ = part.indices(len(data))
        at = rng.randrange(start, max(stop, start + 1))
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                size = rng.choice((1, 2, 4, 8))
                extreme = rng.choice((0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1))
                data[at : at + size] = (extreme & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            case 2:
                del data[at : at + rng.randrange(1, 20)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 4:
                del data[rng.randrange(max(len(data), 1)) :]
        if not data:
            break
    return bytes(data)


def survive(
    path: Path, read: Callable[[], Any], count: int, seed: int, *, part: slice, mebibytes: int = 96
) -> Mapping[str, int]:
    """Reads mutations of a file: each is read, or refused in one line, in little time and memory.

    Args:
      path: a whole file, which is left as it was.
      read: reads all of it.
      count: of the mutations.
      seed: of the same.
      part: the part of the file that decides how it is read.
      mebibytes: the most memory: a JSON file is given room for 64.
    """
    content, rng, outcomes = path.read_bytes(), random.Random(seed), {"read": 0, "refused": 0}
    read()
    tracemalloc.start()
    try:
        for number in range(count):
            path.write_bytes(mutated(content, rng, part))
            tracemalloc.reset_peak()
            started = time.perf_counter()
            try:
                read()
                outcomes["read"] += 1
                refusal = ""
            except JaxchatError as error:
                outcomes["refused"] += 1
                refusal = str(error)
            except BaseException as error:
                error.add_note(f"mutation {number} of seed {seed}")
                raise
            assert "\n" not in refusal, (number, refusal)
            assert time.perf_counter() - started < 5, number
            assert tracemalloc.get_traced_memory()[1] < mebibytes << 20, number
    finally:
        tracemalloc.stop()
        path.write_bytes(content)
    return outcomes
