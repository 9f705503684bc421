"""Pods on one machine: what the Helm chart says of one, run as a process in namespaces of its own.

Each has its own network and host name, and finds the others by the names that a cluster's DNS would give them. Its
container's command and environment are the chart's; its volumes are folders, whose places stand for those in the
container. The programs are this environment's, in place of an image's. Needs root and iproute2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from network import NoNetwork

from helm_chart import Document, Pod

# A command's end, on a machine that has other things to do.
_ENDED_SECONDS = 150.0
# The node's end of each pod's link is named after this, and the pod's number.
_PORT = "pod"
_ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


@dataclass(frozen=True)
class RunningPod:
    """A pod with an address. names: by which others find it."""

    pod: Pod
    host_name: str
    namespace: str
    address: str
    folders: Mapping[str, Path]
    hosts: Path

    def command(self, command: Sequence[str]) -> list[str]:
        """Return what runs a command in it."""
        inside = ["nsenter", f"--net=/run/netns/{self.namespace}", "--", "unshare", "--mount", "--uts", "--"]
        shell = ["sh", "-c", _ENTER, "sh", str(self.hosts), self.host_name]
        return [*inside, *shell, *(self.pod.placed(word, self.folders) for word in command)]

    def environment(self, container: Document) -> dict[str, str]:
        """Return a container's: its own, and what the image brings."""
        given = {variable["name"]: variable["value"] for variable in container.get("env", ())}
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        image = {"PATH": programs, "HOME": str(self.folders["tmp"]), "TMPDIR": str(self.folders["tmp"])}
        return {**image, **{name: self.pod.placed(value, self.folders) for name, value in given.items()}}

    def execute(self, command: Sequence[str], container: Document | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in it to its end, as a probe does."""
        return subprocess.run(
            self.command(command),
            env=self.environment(container or self.pod.container),
            capture_output=True,
            text=True,
            timeout=_ENDED_SECONDS,
            check=False,
        )

    @contextmanager
    def running(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Run its container, and end it as Kubernetes does."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(self.pod.container["command"]),
                env=self.environment(self.pod.container),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(self.pod.spec.get("terminationGracePeriodSeconds", 30))
            finally:
                process.kill()
                process.wait()


class Node:
    """A network to which pods are added; `made` takes it down."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._name = f"gwn{os.getpid()}"
        self._count = 0
        # One file for all, which is read anew at each look: pods that come later are found, too.
        self._hosts = folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        self._namespace(self._name)
        _run("ip", "-n", self._name, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._name, "link", "set", "bridge", "up")

    @classmethod
    @contextmanager
    def made(cls, folder: Path) -> Iterator[Node]:
        """Make one; NoNetwork where that cannot be."""
        with ExitStack() as stack:
            yield cls(folder, stack)

    def add(self, pod: Pod, host_name: str, names: Sequence[str], volumes: Mapping[str, Path]) -> RunningPod:
        """Add a pod that others find by some names. volumes: folders that are there; others are made, for it alone."""
        self._count += 1
        namespace, address = f"{self._name}p{self._count}", f"10.79.0.{self._count}"
        port = f"{_PORT}{self._count}"
        self._namespace(namespace)
        ends = ("name", port, "netns", self._name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _run("ip", "link", "add", *ends)
        _run("ip", "-n", self._name, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        with self._hosts.open("a") as hosts:
            hosts.write(" ".join([address, host_name, *names]) + "\n")
        folders = dict(volumes)
        for mount in pod.container["volumeMounts"]:
            if mount["name"] not in folders:
                folders[mount["name"]] = self._folder / host_name / mount["name"]
                folders[mount["name"]].mkdir(parents=True)
        return RunningPod(pod, host_name, namespace, address, folders, self._hosts)

    def _namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._stack.callback(_run, "ip", "netns", "del", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")


def _run(*command: str) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise NoNetwork(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise NoNetwork(f"{' '.join(command)}: {error.stderr.strip() or error.returncode}") from error
