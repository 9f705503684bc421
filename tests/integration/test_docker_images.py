"""The images that docker/Dockerfile makes, in a real Docker engine (make test-docker)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import docker_images
from docker_engine import Docker

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]


def test_images_are_small(docker: Docker, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        target: int(docker("image", "inspect", "--format", "{{.Size}}", docker_images.tag(target))) / 1e6
        for target in docker_images.TARGETS
    }
    with capsys.disabled():
        print("\nimages: " + ", ".join(f"{target} {size:,.0f} MB" for target, size in sizes.items()))
    assert sizes["coordinator"] < 200
    assert max(sizes.values()) < 1000


@pytest.mark.parametrize("target", docker_images.TARGETS)
def test_images_say_what_they_are_and_run_as_nobody_else(docker: Docker, target: str) -> None:
    (image,) = json.loads(docker("image", "inspect", docker_images.tag(target)))
    settings = image["Config"]
    assert settings["User"] == "10001:10001"
    assert settings["Labels"]["org.opencontainers.image.version"] == docker_images.VERSION
    assert settings["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    check = settings["Healthcheck"]["Test"]
    assert check == (["NONE"] if target == "client" else ["CMD", f"gradwire-{target}", "--health"])


@pytest.mark.parametrize("target", docker_images.TARGETS)
def test_images_hold_the_pinned_versions_and_no_tools(docker: Docker, target: str) -> None:
    places = "['/opt/gradwire/lib/python3.11/site-packages']"
    listing = (
        "import importlib.metadata, json; "
        f"print(json.dumps({{d.name: d.version for d in importlib.metadata.distributions(path={places})}}))"
    )
    start = ["run", "--rm", "--network=none", "--read-only", "--entrypoint=python"]
    said = docker(*start, docker_images.tag(target), "-c", listing)
    held = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in json.loads(said).items()}
    assert held.pop("gradwire") == docker_images.VERSION
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert {name: version.split("+")[0] for name, version in held.items()} == {name: pins[name] for name in held}
    assert ("torch" in held) == (target != "coordinator")
    assert not {"pip", "pytest", "ruff", "mypy", "hatchling"} & set(held)
