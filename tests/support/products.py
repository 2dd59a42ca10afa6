"""Lists of which `make test` runs a part, and `make test-full` the rest."""

import itertools

import pytest


def some(values, keep):
    """All values, those not in `keep` marked `full`."""
    return [pytest.param(value, marks=() if value in keep else pytest.mark.full) for value in values]


def diagonal(*axes):
    """All combinations of axes, marked `full` but for those in which every value of every axis is met."""
    axes = [list(axis) for axis in axes]
    count = max(map(len, axes))
    kept = {tuple(axis[i % len(axis)] for axis in axes) for i in range(count)}
    return [
        pytest.param(*values, marks=() if values in kept else pytest.mark.full)
        for values in itertools.product(*axes)
    ]
