"""Allocator: set up where the user has chosen nothing else."""

from __future__ import annotations

import pytest

from gradwire_stage import allocator


def test_it_is_set_up_where_nobody_has_chosen() -> None:
    assert allocator.configure({"PATH": "/bin"})
    allocator.give_back()


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "LD_PRELOAD", "GLIBC_TUNABLES"])
def test_the_users_own_choice_stays(name: str) -> None:
    assert not allocator.configure({name: "1"})
