"""What all tests share: a process in which looking for cyclic garbage is cheap and rare.

A test's process holds torch, and perhaps transformers: going through all their objects again and again is a quarter of
the time that tests of exports and of whole clusters take, since each run ends with a collection.
"""

from __future__ import annotations

import gc

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is, and nothing else.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

_YOUNG, _MIDDLE, _OLD = 50_000, 20, 100


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_searched() -> None:
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.freeze()
