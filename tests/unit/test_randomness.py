"""The seeding rule: fixed numbers, of which clients and servers of different versions make the same draws."""

from __future__ import annotations

from itertools import product

from gradwire_protocol.randomness import draw_seed, node_number


def test_the_rule_is_fixed() -> None:
    assert node_number("dropout_1") == 128537145
    assert draw_seed(7, 3, 2, 128537145) == 3488672679748072735


def test_each_part_of_the_key_matters() -> None:
    keys = list(product((0, 1), (1, 2), (0, 1), (node_number("dropout"), node_number("dropout_1"))))
    assert len({draw_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= draw_seed(*key) < 2**64 for key in keys)
