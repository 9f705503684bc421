"""A Docker engine for tests: the one that runs on this machine, or one of their own, started as root on Debian 12.

An engine of their own cannot pull images, so its base images are stand-ins (docker_stand_ins.py). It has a network
namespace of its own: nothing of it is left in the machine's network when it is gone.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
NAMESPACE = "gradwire-docker"
PACKAGES = ("docker.io", "debootstrap", "iptables", "iproute2")
# The engine's own choices, which a test's commands must not inherit.
_ENVIRONMENT = {"DOCKER_BUILDKIT": "1", "DOCKER_SCAN_SUGGEST": "false", "COMPOSE_PROGRESS": "plain"}
_CLONE_NEWNET = 0x40000000
_START_SECONDS, _STOP_SECONDS = 60.0, 60.0


class NoEngine(Exception):
    """No engine runs here, and none can be started; says why."""


@dataclass(frozen=True, kw_only=True)
class Docker:
    """How to talk to an engine. namespace: of its published ports; "": the machine's own."""

    client: str
    environment: dict[str, str] = field(default_factory=dict)
    namespace: str = ""
    # Whether images come from registries; otherwise stand-ins have to do.
    pulls: bool = True

    @property
    def variables(self) -> dict[str, str]:
        return {**os.environ, **_ENVIRONMENT, **self.environment}

    def __call__(self, *arguments: str, timeout: float = 600.0, check: bool = True) -> str:
        """Run `docker` with arguments; its standard output. AssertionError with all that it said if it fails."""
        return run([self.client, *arguments], self.variables, timeout=timeout, check=check)

    def inside(self, function: Callable[[], Result]) -> Result:
        """Call a function where published ports are at 127.0.0.1."""
        if not self.namespace:
            return function()

        def enter_and_call() -> Result:
            # Of this thread alone, which ends with the executor.
            with open(f"/run/netns/{self.namespace}") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            return function()

        with ThreadPoolExecutor(1) as executor:
            return executor.submit(enter_and_call).result()


def run(
    command: Sequence[str], variables: dict[str, str] | None = None, *, timeout: float = 600.0, check: bool = True
) -> str:
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def running_engine() -> Docker | None:
    """The engine that this machine's `docker` talks to, if there is one."""
    client = shutil.which("docker")
    if client is None:
        return None
    asked = subprocess.run([client, "version"], capture_output=True, timeout=60, check=False)
    return Docker(client=client) if asked.returncode == 0 else None


def install() -> Docker | None:
    """Install what an engine of our own needs; the engine that this has started, if it has. NoEngine."""
    if os.geteuid() != 0:
        raise NoEngine("no Docker engine runs here, and only root can start one")
    release = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    if "ID=debian" not in release or 'VERSION_ID="12"' not in release:
        raise NoEngine("no Docker engine runs here, and one can be started on Debian 12 only")
    wanted = ("/usr/bin/docker", "/usr/sbin/dockerd", "/usr/sbin/debootstrap", "/usr/sbin/iptables", "/usr/sbin/ip")
    if not all(Path(path).exists() for path in wanted):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        lock = ("-o", "DPkg::Lock::Timeout=300")
        try:
            run(["apt-get", *lock, "update", "-q"], quiet)
            run(["apt-get", *lock, "install", "-q", "-y", "--no-install-recommends", *PACKAGES], quiet, timeout=1200)
        except AssertionError as error:
            raise NoEngine(f"no Docker engine runs here, and what one needs cannot be installed: {error}") from None
    # Where services may start by themselves, the package has started one.
    return running_engine()


class OwnEngine:
    """An engine whose files are all in one directory. Not thread-safe."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pid_file = directory / "dockerd.pid"

    @contextmanager
    def building(self) -> Iterator[Docker]:
        """The engine without networks, in the machine's namespace: builds reach package indexes with --network host."""
        flags = ("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none")
        with self._started([], flags):
            yield self._client("")

    @contextmanager
    def networked(self) -> Iterator[Docker]:
        """The engine with networks, in a namespace of its own. Containers are gone when it is."""
        run(["ip", "netns", "add", NAMESPACE])
        try:
            # By nsenter: `ip netns exec` would hide the control groups.
            enter = ["nsenter", f"--net=/run/netns/{NAMESPACE}"]
            run([*enter, "ip", "link", "set", "lo", "up"])
            with self._started(enter, ()):
                docker = self._client(NAMESPACE)
                try:
                    yield docker
                finally:
                    if containers := docker("ps", "--all", "--quiet").split():
                        docker("rm", "--force", *containers)
        finally:
            run(["ip", "netns", "delete", NAMESPACE])

    def remove(self) -> None:
        """Remove the engine's files: images, volumes, everything."""
        self.end_former()
        for name in ("data", "exec"):
            if (self.directory / name).exists():
                shutil.rmtree(self.directory / name)

    def end_former(self) -> None:
        """End an engine of this directory that a test which was killed has left, and its namespace."""
        for path, program in (
            (self._pid_file, "dockerd"),
            (self.directory / "exec/containerd/containerd.pid", "containerd"),
        ):
            if path.exists():
                _end(int(path.read_text()), program, str(self.directory))
        if Path(f"/run/netns/{NAMESPACE}").exists():
            run(["ip", "netns", "delete", NAMESPACE])

    def _client(self, namespace: str) -> Docker:
        return Docker(
            # Another client that the machine may have wants other plugins.
            client="/usr/bin/docker",
            environment={"DOCKER_HOST": f"unix://{self.directory}/docker.sock"},
            namespace=namespace,
            pulls=False,
        )

    @contextmanager
    def _started(self, enter: list[str], flags: Sequence[str]) -> Iterator[None]:
        places = {"--data-root": "data", "--exec-root": "exec", "--pidfile": self._pid_file.name}
        command = [*enter, "/usr/sbin/dockerd", "--host", f"unix://{self.directory}/docker.sock", *flags]
        for flag, name in places.items():
            command += [flag, str(self.directory / name)]
        with open(self.directory / "dockerd.log", "wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                self._wait_until_it_answers(process)
                yield
            finally:
                process.terminate()
                try:
                    process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    raise

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        docker, deadline = self._client(""), time.monotonic() + _START_SECONDS
        while True:
            asked = subprocess.run([docker.client, "version"], env=docker.variables, capture_output=True, check=False)
            if asked.returncode == 0:
                return
            if process.poll() is not None or time.monotonic() > deadline:
                log = (self.directory / "dockerd.log").read_text()[-4000:]
                raise NoEngine(f"dockerd does not start here:\n{log}")
            time.sleep(0.2)


def _end(pid: int, program: str, directory: str) -> None:
    """End a process if it is still the program that its number was of."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except FileNotFoundError:
        return
    if program not in command or directory not in command:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"{program} {pid} does not end"
        time.sleep(0.1)
