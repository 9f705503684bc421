"""The cluster of docker/compose.yaml, with a parameter server, as a test starts it and looks at it."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from docker_engine import Docker, run
from docker_stand_ins import PROMETHEUS

ROOT = Path(__file__).parents[2]
FILES = ("compose.yaml", "compose.parameter-server.yaml")
# Besides clusters that this machine may have.
PROJECT = "gradwire-test"


def compose_command(docker: Docker) -> list[str]:
    """Docker Compose: the engine's, or else the one among the development tools."""
    has_plugin = subprocess.run([docker.client, "compose", "version"], capture_output=True, check=False).returncode == 0
    if docker.pulls and has_plugin:
        return [docker.client, "compose"]
    return [str(compose_binary())]


def compose_binary() -> Path:
    """The binary itself: the command that comes with it exits with 0 in any case."""
    return Path(sysconfig.get_path("purelib")) / "compose/docker-compose"


@dataclass(frozen=True)
class ComposeCluster:
    docker: Docker
    # For what is changed of the compose files where images cannot be pulled.
    directory: Path

    @property
    def variables(self) -> dict[str, str]:
        # Any free ports of this machine, but the documented ones of containers.
        ports = {"GRADWIRE_PROMETHEUS_PORT": "0", "GRADWIRE_GRAFANA_PORT": "0"}
        return {**self.docker.variables, **ports, "GRADWIRE_NETWORK": PROJECT}

    def command(self, *arguments: str) -> list[str]:
        files = [f"--file={ROOT / 'docker' / name}" for name in FILES]
        if not self.docker.pulls:
            # Grafana's profile is in nobody's list.
            changes = {"prometheus": {"image": PROMETHEUS}, "grafana": {"profiles": ["cannot-be-pulled"]}}
            override = self.directory / "stand-ins.yaml"
            override.write_text(yaml.safe_dump({"services": changes}))
            files.append(f"--file={override}")
        return [*compose_command(self.docker), f"--project-name={PROJECT}", *files, *arguments]

    def __call__(self, *arguments: str, timeout: float = 300.0, check: bool = True) -> str:
        return run(self.command(*arguments), self.variables, timeout=timeout, check=check)

    def train(self, *flags: str, timeout: float = 600.0) -> list[dict[str, Any]]:
        """Run `gradwire train --json` in a client's container to its end; what it has printed. It must exit with 0."""
        said = self("run", "--rm", "-T", "--no-deps", "trainer", "train", "--json", *flags, timeout=timeout)
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    def start_training(self, log: Path, *flags: str) -> subprocess.Popen[bytes]:
        """Begin `gradwire train`; log: the file that it writes to."""
        command = self.command("run", "--rm", "-T", "--no-deps", "trainer", "train", *flags)
        with open(log, "wb") as file:
            return subprocess.Popen(command, env=self.variables, stdout=file, stderr=file, stdin=subprocess.DEVNULL)

    def run_script(self, script: Path, *arguments: str, timeout: float = 300.0) -> str:
        """Run a Python script in a client's container."""
        container = [
            "run",
            "--rm",
            "-T",
            "--no-deps",
            f"--volume={script}:/script.py:ro",
            "--entrypoint=python",
            "trainer",
        ]
        return self(*container, "/script.py", *arguments, timeout=timeout)

    def run_python(self, service: str, *arguments: str, volume: str = "", timeout: float = 120.0) -> str:
        """Run Python in another container of a service; what it has printed."""
        volumes = [f"--volume={volume}"] if volume else []
        container = ["run", "--rm", "-T", "--no-deps", *volumes, "--entrypoint=python", service]
        return self(*container, *arguments, timeout=timeout)

    def status(self) -> dict[str, Any]:
        """What `gradwire status --json` says."""
        said = self("run", "--rm", "-T", "--no-deps", "trainer", "status", "--json")
        answer: dict[str, Any] = json.loads(said.splitlines()[-1])
        return answer

    def containers(self, *services: str) -> list[dict[str, Any]]:
        """What the engine knows of the containers of services; of all if none is named. Stopped ones too."""
        identifiers = self("ps", "--all", "--quiet", *services).split()
        answer: list[dict[str, Any]] = json.loads(self.docker("inspect", *identifiers)) if identifiers else []
        return answer

    def address(self, service: str, port: int) -> str:
        """HOST:PORT at which a published port is, inside of the engine's namespace."""
        return self("port", service, str(port)).strip()

    def left(self) -> dict[str, list[str]]:
        """What there is of the cluster in the engine."""
        label = f"label=com.docker.compose.project={PROJECT}"
        listings: dict[str, Sequence[str]] = {
            "containers": ("ps", "--all", "--filter", label, "--format", "{{.Names}}"),
            "networks": ("network", "ls", "--filter", label, "--format", "{{.Name}}"),
            "volumes": ("volume", "ls", "--filter", label, "--format", "{{.Name}}"),
        }
        return {kind: found for kind, listing in listings.items() if (found := self.docker(*listing).split())}
