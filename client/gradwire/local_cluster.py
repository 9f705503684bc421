"""A cluster on this machine: a coordinator and stage servers as child processes, on free ports of the loopback.

Leaves one child's life to service_process.py, and what a cluster can do to cluster.py.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from gradwire.cluster import Cluster
from gradwire.operator_modules import operator_flags
from gradwire.service_process import ServiceProcess, end_all
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.v1 import coordinator_pb2

_START_SECONDS = 60.0
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05


class LocalProcesses:
    """The processes of a local cluster; a context manager that ends them all, whatever happens inside.

    Entering starts the coordinator and, as soon as its address is known, the stage servers. It does not wait for these,
    `wait_registered` does: that leaves the caller the seconds in which they import torch.
    """

    def __init__(
        self,
        *,
        stage_servers: int = 2,
        parameter_servers: int = 0,
        threads: int = 1,
        listen: str = "127.0.0.1:0",
        log_dir: Path | str | None = None,
        weights_root: Path | str | None = None,
        checkpoint_root: Path | str | None = None,
        operators: Sequence[str] = (),
    ) -> None:
        counts = (
            ("stage_servers", stage_servers, 1),
            ("parameter_servers", parameter_servers, 0),
            ("threads", threads, 1),
        )
        for name, value, least in counts:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingsError(
                    f"{name} is not valid", expected=f"a whole number, {least} or more", got=repr(value)
                )
        self._stage_servers = stage_servers
        self._parameter_servers = parameter_servers
        self._threads = threads
        self._listen = listen
        self._log_dir = Path(log_dir) if log_dir is not None else None
        self._weights_root = _directory("weights_root", weights_root)
        self._checkpoint_root = _directory("checkpoint_root", checkpoint_root)
        self._operators = operator_flags(operators)
        self._scratch: Path | None = None
        self._coordinator: ServiceProcess | None = None
        self._stages: list[ServiceProcess] = []
        self.address = ""
        self.metrics_address = ""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(error)

    @property
    def log_dir(self) -> Path:
        """Where the processes' output goes. A temporary directory, if none was given, goes with a clean end."""
        if self._log_dir is None:
            raise SettingsError("The local cluster has not been started", remedy="use it in a `with` statement")
        return self._log_dir

    @property
    def process_ids(self) -> list[int]:
        return [process.process_id for process in self._all()]

    def _start(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        self._scratch = Path(tempfile.mkdtemp(prefix="gradwire-"))
        if self._log_dir is None:
            self._log_dir = self._scratch / "logs"
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError("The directory for logs cannot be made", got=str(error)) from error
        arguments = [
            "--listen",
            self._listen,
            "--state-dir",
            str(self._scratch / "state"),
            "--metrics-listen",
            _ANY_PORT,
            *self._checkpoint_arguments(),
        ]
        self._coordinator = ServiceProcess(
            "the coordinator", "gradwire_coordinator", arguments, self._log_dir / "coordinator.log"
        )
        ready = self._coordinator.wait_ready(deadline)
        self.address, self.metrics_address = ready.address, ready.metrics_address
        self._start_servers(self._stage_servers, "stage")
        self._start_servers(self._parameter_servers, "parameter")

    def _start_servers(self, count: int, role: str) -> None:
        arguments = ["--listen", _ANY_PORT, "--coordinator", self.address, "--threads", str(self._threads)]
        arguments += ["--metrics-listen", _ANY_PORT, "--role", role]
        if self._weights_root is not None:
            arguments += ["--weights-root", str(self._weights_root)]
        arguments += self._checkpoint_arguments()
        arguments += self._operators
        started = sum(process.name.startswith(f"{role} server") for process in self._stages)
        for index in range(started, started + count):
            log = self.log_dir / f"{role}-{index}.log"
            self._stages.append(ServiceProcess(f"{role} server {index}", "gradwire_stage", arguments, log))

    def _checkpoint_arguments(self) -> list[str]:
        return [] if self._checkpoint_root is None else ["--checkpoint-root", str(self._checkpoint_root)]

    @contextmanager
    def more_servers(self, stages: int, parameters: int) -> Iterator[None]:
        """Start more servers of stages and of parameters, and end them after the block.

        It does not wait for them to register.
        """
        before = len(self._stages)
        try:
            self._start_servers(stages, "stage")
            self._start_servers(parameters, "parameter")
            yield
        finally:
            more, self._stages = self._stages[before:], self._stages[:before]
            end_all(more, _GRACE_SECONDS)

    def wait_registered(self, cluster: Cluster) -> None:
        """Wait until the coordinator knows all stage servers."""
        deadline = time.monotonic() + _START_SECONDS
        for process in self._stages:
            process.wait_ready(deadline)
        while len(cluster.status().servers) < len(self._stages):
            self.check_running()
            if time.monotonic() > deadline:
                raise SettingsError(
                    "The stage servers did not register in time",
                    expected=f"{len(self._stages)} of them within {_START_SECONDS:.0f} s",
                    got=str(len(cluster.status().servers)),
                    remedy=f"see the logs in {self.log_dir}",
                )
            time.sleep(_POLL_SECONDS)

    def wait_signed_off(self, cluster: Cluster) -> None:
        """Wait until the coordinator knows that stage servers were ended, at the latest when their leases are over."""
        deadline = time.monotonic() + _START_SECONDS
        while len(cluster.status().servers) > len(self._stages) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def check_running(self) -> None:
        """Raise an error with the end of its log if a process has ended."""
        for process in self._all():
            process.check_running()

    def ended(self) -> list[str]:
        """Return the names of processes that have ended."""
        return [process.name for process in self._all() if not process.is_running()]

    def _all(self) -> list[ServiceProcess]:
        return ([self._coordinator] if self._coordinator is not None else []) + self._stages

    def _end(self, error: BaseException | None) -> None:
        try:
            # Stage servers first: they sign off at the coordinator.
            end_all(self._stages, _GRACE_SECONDS)
        finally:
            if self._coordinator is not None:
                end_all([self._coordinator], _GRACE_SECONDS)
            self._clean(error)

    def _clean(self, error: BaseException | None) -> None:
        if self._scratch is None:
            return
        shutil.rmtree(self._scratch / "state", ignore_errors=True)
        failed = isinstance(error, Exception)
        if error is not None and failed:
            error.add_note(f"The logs of the cluster's processes are in {self._log_dir}")
        if not failed or not (self._scratch / "logs").is_dir():
            shutil.rmtree(self._scratch, ignore_errors=True)


_ANY_PORT = "127.0.0.1:0"


def _directory(name: str, path: Path | str | None) -> Path | None:
    """Return a setting's directory, absolute, if it is given; SettingsError if it is none."""
    if path is None:
        return None
    directory = Path(path).absolute()
    if not directory.is_dir():
        raise SettingsError(f"{name} is not valid", expected="a directory", got=str(directory))
    return directory


class LocalCluster(Cluster):
    """A cluster whose processes this one started: leaving the `with` block ends every one of them."""

    def __init__(self, processes: LocalProcesses) -> None:
        super().__init__("")
        self._processes = processes

    def __enter__(self) -> Self:
        self._processes.__enter__()
        try:
            self._address = self._processes.address
            self._processes.wait_registered(self)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, traceback)
        finally:
            self._processes.__exit__(kind, error, traceback)

    @contextmanager
    def spare_servers(self, stages: int, parameters: int, busy: Collection[str]) -> Iterator[None]:
        """Start the servers that are missing for so many free ones, and end these after the block."""
        # What a server does is known from its last heartbeat: `busy` may not show yet.
        free = Counter(s.role for s in self.status().servers if s.server not in busy and not s.activity.run)
        with self._processes.more_servers(
            max(0, stages - free[coordinator_pb2.SERVER_ROLE_STAGE]),
            max(0, parameters - free[coordinator_pb2.SERVER_ROLE_PARAMETER]),
        ):
            self._processes.wait_registered(self)
            yield
        self._processes.wait_signed_off(self)

    @property
    def log_dir(self) -> Path:
        """Where the output of the cluster's processes goes."""
        return self._processes.log_dir

    @property
    def process_ids(self) -> list[int]:
        """Process identifiers: the coordinator's, then the stage servers'."""
        return self._processes.process_ids


def local(
    *,
    stage_servers: int = 2,
    parameter_servers: int = 0,
    threads: int = 1,
    listen: str = "127.0.0.1:0",
    log_dir: Path | str | None = None,
    weights_root: Path | str | None = None,
    checkpoint_root: Path | str | None = None,
    operators: Sequence[str] = (),
) -> LocalCluster:
    """Return a cluster on this machine, to be used in a `with` statement.

    stage_servers: how many; a run takes Plan.stages · replicas · tensor of them. parameter_servers: as many as a run is
    to have (Plan.parameter_servers). threads: compute threads of each. listen: HOST:PORT of the coordinator; port 0 is
    any free one. log_dir: where the processes' output goes; None: a temporary
    directory, kept only if the block ends with an error. weights_root: the directory below which the servers may read
    weights. checkpoint_root: the directory below which they write and read checkpoints (`save(…, storage="server")`).
    operators: modules, by name or path, that the servers import for the custom operators that they define.
    """
    processes = LocalProcesses(
        stage_servers=stage_servers,
        parameter_servers=parameter_servers,
        threads=threads,
        listen=listen,
        log_dir=log_dir,
        weights_root=weights_root,
        checkpoint_root=checkpoint_root,
        operators=operators,
    )
    return LocalCluster(processes)
