"""One service as a child process: started with a ready pipe and a log file, and ended for certain.

A child watches its standard input, whose other end only this process holds: it ends by itself when this process is
gone, however that came about.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gradwire_protocol.errors import GradwireError, SettingsError, Unreachable

_LOG_TAIL_LINES = 15
_WRONG_INPUT = 2


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """What a service reports when it is ready: HOST:PORT each; metrics_address is empty if it has none."""

    address: str
    metrics_address: str


class ServiceProcess:
    """A running child. `name` is for messages, `log` is the file that takes its output."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._addresses: Addresses | None = None
        self._ready, child_end = os.pipe()
        # -P: a module of the same name in the user's working directory must not stand in for ours.
        command = [sys.executable, "-P", "-m", module, *arguments, "--ready-fd", str(child_end), "--watch-stdin"]
        try:
            with log.open("ab") as output, _uninterrupted():
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(child_end,),
                    # Ctrl-C in a terminal reaches this process alone, which then ends its children in order.
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._ready)
            raise
        finally:
            os.close(child_end)

    @property
    def process_id(self) -> int:
        return self._process.pid

    def wait_ready(self, deadline: float) -> Addresses:
        """Wait until the service listens, at most until `deadline` (time.monotonic()). Idempotent."""
        if self._addresses is not None:
            return self._addresses
        line = b""
        # Not select: it takes no descriptor above 1,023, and this process may have many files open.
        waits = select.poll()
        waits.register(self._ready, select.POLLIN)
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not waits.poll(1e3 * remaining):
                raise Unreachable(
                    f"{self.name} did not start in time",
                    got=self._log_tail(),
                    remedy=f"see its log {self.log}, or allow it more time",
                )
            part = os.read(self._ready, 4096)
            if not part:
                self._process.wait()
                raise self._ended_error("at its start")
            line += part
        report = json.loads(line)
        self._addresses = Addresses(address=report["address"], metrics_address=report["metrics_address"])
        return self._addresses

    def check_running(self) -> None:
        """Raise an error with the end of its log if the process has ended."""
        if self._process.poll() is not None:
            raise self._ended_error("unexpectedly")

    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def _ended_error(self, when: str) -> GradwireError:
        status = self._process.returncode
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit code {status}"
        # Services use the same exit codes as the command line: 2 is wrong input.
        kind = SettingsError if status == _WRONG_INPUT else Unreachable
        return kind(
            f"{self.name} ended {when}, {how}", got=f"in its log:\n{self._log_tail()}", remedy=f"see {self.log}"
        )

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join(lines) or "an empty log"

    def ask_to_end(self) -> None:
        """Send SIGTERM, and close the pipe that the child watches. Idempotent."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if self.is_running():
            self._process.terminate()

    def wait_ended(self, deadline: float) -> bool:
        """Wait for the end, at most until `deadline` (time.monotonic()); return whether it came."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it at once, with whatever it has started itself, and reap it."""
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Free the pipe's end; after the process has ended."""
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1


def end_all(processes: Sequence[ServiceProcess], grace_seconds: float) -> None:
    """End processes: ask all, wait for the grace, kill those that are left. An interrupt ends the grace."""
    try:
        for process in processes:
            process.ask_to_end()
        deadline = time.monotonic() + grace_seconds
        for process in processes:
            process.wait_ended(deadline)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done, so that no child is started and then forgotten."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held and callable(previous):
            previous(*held[-1])
