"""Checkpoints that the stage servers write and read themselves: what the client says, and what it waits for.

Leaves connections to session.py, and what is in a checkpoint to contents.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from gradwire.calls import begin_save, inspect_checkpoint
from gradwire.checkpoint.reader import RemoteCheckpoint
from gradwire.session import Session
from gradwire.state import StateNames
from gradwire_protocol.checkpoint.manifest import Manifest
from gradwire_protocol.checkpoint.root import check_checkpoint_path
from gradwire_protocol.errors import CheckpointError
from gradwire_protocol.v1 import coordinator_pb2, run_pb2


class ServerStorage:
    """The servers' way to checkpoints, for one run. Paths are relative to their --checkpoint-root."""

    def __init__(self, session: Session, names: StateNames, fixed: Mapping[str, torch.Tensor]) -> None:
        """fixed: what servers hold and no checkpoint has, by TensorSpec.name."""
        self._session = session
        self._fixed = fixed
        held = dict.fromkeys(name for server in session.servers for name in server.tensors)
        keys = {name: names.key_of(name) if names.has(name) else "" for name in held}
        self._keys = {name: key for name, key in keys.items() if key != name}

    def begin_save(self, path: Path, draft: Manifest, kept: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """Put a snapshot into the log; return what waits until it is written. kept: what no server holds."""
        directory = _checked(path)
        manifest = json.dumps(draft.model_dump(mode="json"))
        request = coordinator_pb2.BeginSaveRequest(run=self._session.run, directory=directory, manifest=manifest)
        token = begin_save(*self._session.coordinator, request).token
        number = self._session.reserve()
        save = run_pb2.SaveState(directory=directory, token=token, keys=self._keys, kept=kept, tied=draft.tied)
        result, outcome = self._session.submit_save(run_pb2.Entry(number=number, save_state=save))
        self._session.deliver_kept(number, kept)

        def wait() -> None:
            result.result()
            _raise_failure(outcome)

        return wait

    def inspect(self, path: Path) -> RemoteCheckpoint:
        """Have a checkpoint's files checked; CheckpointError says what is wrong."""
        request = coordinator_pb2.InspectCheckpointRequest(directory=_checked(path))
        return RemoteCheckpoint(path, inspect_checkpoint(*self._session.coordinator, request))

    def load(
        self, checkpoint: RemoteCheckpoint, states: Iterable[tuple[str, str]], kept: list[str]
    ) -> dict[str, torch.Tensor]:
        """Have the servers read a checkpoint; return what none of them holds, by the names in `kept`."""
        number = self._session.reserve()
        load = run_pb2.LoadState(
            optimizer_state=[run_pb2.OptimizerStateName(parameter=name, state=state) for name, state in states],
            weight_version=checkpoint.manifest.step,
            checkpoint=run_pb2.StoredState(
                directory=_checked(checkpoint.path), manifest_sha256=checkpoint.sha256, keys=self._keys, kept=kept
            ),
        )
        future = self._session.submit(run_pb2.Entry(number=number, load_state=load))
        self._session.stream_state(number, list(self._fixed), lambda name: self._fixed[name])
        results = self._session.collect(number, [self._session.first_server]) if kept else []
        future.result()
        return {result.value: result.content for result in results if isinstance(result.content, torch.Tensor)}


def _checked(path: Path) -> str:
    directory = path.as_posix()
    check_checkpoint_path(directory)
    return directory


def _raise_failure(outcome: Future[run_pb2.SaveOutcome]) -> None:
    saved = outcome.result()
    if saved.HasField("failure"):
        failure = saved.failure
        raise CheckpointError(failure.message, expected=failure.expected, got=failure.got, remedy=failure.remedy)
