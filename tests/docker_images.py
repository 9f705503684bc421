"""Builds Gradwire's images for tests, as a user does, with what this machine needs to reach package indexes."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

from docker_engine import Docker, OwnEngine, install, run, running_engine
from docker_stand_ins import BASE, build_prometheus, import_base

ROOT = Path(__file__).parents[1]
# Kept from one run to the next: the stand-in base image, which takes minutes. With GRADWIRE_DOCKER_KEEP=1 all images.
DIRECTORY = Path(os.environ.get("GRADWIRE_DOCKER_DIRECTORY", "/var/tmp/gradwire-docker"))
TARGETS = ("coordinator", "stage-server", "parameter-server", "client")
VERSION = version("gradwire")
# Settings of this machine's pip that hold in a container as well; paths do not.
_PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "timeout", "retries")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


def tag(target: str) -> str:
    return f"gradwire/{target}:{VERSION}"


@contextmanager
def engine_with_images() -> Iterator[Docker]:
    """An engine that has the images: this machine's, or one of our own. NoEngine."""
    DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(DIRECTORY / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        docker = running_engine() or install()
        if docker is not None:
            build(docker, DIRECTORY)
            yield docker
            return
        engine = OwnEngine(DIRECTORY)
        engine.end_former()
        with engine.building() as builder:
            import_base(builder, DIRECTORY)
            build_prometheus(builder, DIRECTORY)
            build(builder, DIRECTORY)
        with engine.networked() as docker:
            yield docker
        if "GRADWIRE_DOCKER_KEEP" not in os.environ:
            engine.remove()


def build(docker: Docker, directory: Path) -> None:
    """Build all images. directory: for files that builds need."""
    arguments = [f"--build-arg={name}" for name in _PROXIES if name in os.environ]
    arguments += _secrets(directory)
    if docker.pulls:
        _build(docker, arguments)
        return
    # Without bridges, and with the torch that this environment has: its index is for those who reach it.
    with _torch_index(directory) as index:
        own = ["--network=host", f"--build-arg=BASE_IMAGE={BASE}", f"--build-arg=TORCH_INDEX_URL={index}"]
        _build(docker, [*arguments, *own])


def _build(docker: Docker, arguments: list[str]) -> None:
    for target in TARGETS:
        where = ["--file", str(ROOT / "docker/Dockerfile"), "--target", target, "--tag", tag(target), str(ROOT)]
        docker("build", *arguments, *where, timeout=1800)


def _secrets(directory: Path) -> list[str]:
    """This machine's pip settings and certificates, as secrets of the build: in no image."""
    listed = run([sys.executable, "-m", "pip", "config", "list"])
    settings: dict[str, str] = dict(re.findall(r"^(?:global|:env:|install)\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    lines = ["[global]"]
    for name in _PIP_SETTINGS:
        # Folders of this machine are not there.
        values = [each for each in settings.get(name, "").split() if not each.startswith(("file:", "/"))]
        if values:
            lines.append(f"{name} = {' '.join(values)}")
    secrets = []
    if bundle := settings.get("cert"):
        lines.append("cert = /run/secrets/ca_bundle")
        secrets.append(f"--secret=id=ca_bundle,src={bundle}")
    if len(lines) > 1:
        (directory / "pip.conf").write_text("\n".join(lines) + "\n")
        secrets.append(f"--secret=id=pip_conf,src={directory / 'pip.conf'}")
    return secrets


@contextmanager
def _torch_index(directory: Path) -> Iterator[str]:
    """A package index on loopback that has this environment's torch, and nothing else."""
    wanted = f"torch=={version('torch')}"
    (directory / "index/torch").mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*download, str(directory / "index/torch"), wanted], check=True, timeout=1200)
    handler = functools.partial(_QuietHandler, directory=str(directory / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass
