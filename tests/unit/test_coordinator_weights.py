"""The coordinator takes only well-formed names of weights into a run's log."""

from __future__ import annotations

import pytest

from gradwire_coordinator.entries import EntryRules
from gradwire_protocol.errors import FrameError, GradwireError, SettingsError
from gradwire_protocol.v1 import run_pb2


def check(**load: str) -> None:
    rules = EntryRules(generation=1, plan=run_pb2.Plan(window=2, micro_batches=1), groups=[], has_predict=False)
    rules.check(run_pb2.Entry(number=1, generation=1, load_state=run_pb2.LoadState(**load)), 0)


def test_well_formed_names_are_taken() -> None:
    check()
    check(weights_directory="models/llama")
    check(weights_directory=".", weights_prefix="encoder.")


@pytest.mark.parametrize(
    ("load", "error"),
    [
        ({"weights_directory": "/etc"}, SettingsError),
        ({"weights_directory": "a/../../b"}, SettingsError),
        ({"weights_directory": "a" * 2000}, SettingsError),
        ({"weights_directory": "a", "weights_prefix": "p" * 513}, FrameError),
        ({"weights_prefix": "encoder."}, FrameError),
    ],
)
def test_other_names_are_refused(load: dict[str, str], error: type[GradwireError]) -> None:
    with pytest.raises(error):
        check(**load)
