"""What can be said of the Dockerfile and the compose files without an engine: well formed, pinned, closed."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gradwire_stage.settings import StageSettings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
COMPOSE = Path(sysconfig.get_path("purelib")) / "compose/docker-compose"
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"
FILES = sorted(DOCKER.glob("compose*.yaml"))
# As they are given to Compose.
STACKS = {
    "cpu": ["compose.yaml"],
    "gpu": ["compose.yaml", "compose.gpu.yaml"],
    "parameter-server": ["compose.yaml", "compose.parameter-server.yaml"],
    "both": ["compose.yaml", "compose.gpu.yaml", "compose.parameter-server.yaml"],
}


def said(*command: object) -> tuple[int, str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def stack(name: str) -> dict[str, Any]:
    """The merged configuration, all profiles switched on, with nothing set in the environment."""
    files = [f"--file={DOCKER / file}" for file in STACKS[name]]
    done = subprocess.run(
        [str(COMPOSE), "--project-name=gradwire", *files, "--profile=*", "config"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "it warns"
    merged: dict[str, Any] = yaml.safe_load(done.stdout)
    return merged


@pytest.fixture(scope="module", params=STACKS)
def configuration(request: pytest.FixtureRequest) -> dict[str, Any]:
    return stack(request.param)


def test_hadolint_has_nothing_to_say() -> None:
    assert said(HADOLINT, DOCKERFILE) == (0, "")


def test_hadolint_notices(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text() + "\nFROM python\nRUN cd /tmp && sudo ls\n")
    code, complaints = said(HADOLINT, tmp_path / "Dockerfile")
    assert code == 1
    assert {"DL3003", "DL3004", "DL3006"} <= set(re.findall(r"DL\d+", complaints))


def schema_check(file: Path) -> tuple[int, str]:
    return said(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_compose_files_fit_the_schema(file: Path) -> None:
    code, complaints = schema_check(file)
    assert code == 0, complaints


def test_the_schema_notices(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("read_only: true", "readonly: true"))
    code, complaints = schema_check(wrong)
    assert code == 1
    assert "'readonly' was unexpected" in complaints


def test_compose_notices(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("  checkpoints: {}\n", ""))
    code, complaints = said(COMPOSE, f"--file={wrong}", "config", "--quiet")
    assert code != 0
    assert "undefined volume checkpoints" in complaints


def test_every_service_is_allowed_little(configuration: dict[str, Any]) -> None:
    for name, service in configuration["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        assert not any("docker.sock" in str(volume) for volume in service.get("volumes", ())), name
        assert service.get("cap_add", []) == (["SYS_ADMIN"] if name == "dcgm-exporter" else []), name


def test_every_service_starts_again_but_those_that_end(configuration: dict[str, Any]) -> None:
    for name, service in configuration["services"].items():
        ends = name in ("certificates", "trainer")
        assert service["restart"] == ("no" if ends else "unless-stopped"), name


def test_only_the_documented_ports_are_open_and_on_loopback(configuration: dict[str, Any]) -> None:
    ports = {
        (name, port["host_ip"], port["published"], port["target"])
        for name, service in configuration["services"].items()
        for port in service.get("ports", ())
    }
    assert ports == {("prometheus", "127.0.0.1", "9090", 9090), ("grafana", "127.0.0.1", "3000", 3000)}
    assert not any(service.get("network_mode") == "host" for service in configuration["services"].values())


def test_servers_cannot_reach_beyond_the_host(configuration: dict[str, Any]) -> None:
    assert configuration["networks"]["gradwire"]["internal"] is True
    for name, service in configuration["services"].items():
        if "server" in name or name in ("coordinator", "trainer"):
            assert set(service["networks"]) == {"gradwire"}, name


def test_images_are_pinned_and_ours_have_the_version_of_the_code(configuration: dict[str, Any]) -> None:
    for name, service in configuration["services"].items():
        image, _, tag = service["image"].rpartition(":")
        assert re.match(r"v?\d+\.\d+\.\d+", tag), name
        if image.startswith("gradwire/"):
            assert tag.removesuffix("-cuda") == version("gradwire"), name
    text = DOCKERFILE.read_text()
    assert set(re.findall(r"^ARG VERSION=(.+)$", text, re.MULTILINE)) == {version("gradwire")}
    assert re.search(r"^ARG BASE_IMAGE=python:3\.11\.\d+-slim-\w+$", text, re.MULTILINE)


def test_each_image_is_built_once(configuration: dict[str, Any]) -> None:
    """Builds of one image at the same time fail; whoever only uses it must not look for it in a registry."""
    ours = [service for service in configuration["services"].values() if service["image"].startswith("gradwire/")]
    built = [service["image"] for service in ours if "build" in service]
    assert sorted(built) == sorted({service["image"] for service in ours})
    assert all(("build" in service) != (service.get("pull_policy") == "never") for service in ours)


def test_nobody_but_the_one_shot_service_sees_the_authority_or_anothers_certificate(
    configuration: dict[str, Any],
) -> None:
    roles = {"coordinator": "coordinator", "parameter-server": "parameter", "trainer": "client"}
    for name, service in configuration["services"].items():
        mounted = {
            volume["source"] for volume in service.get("volumes", ()) if volume["target"] not in ("/checkpoints",)
        }
        secret = {volume for volume in mounted if volume == "authority" or volume.startswith("certificates-")}
        if name == "certificates":
            assert service["network_mode"] == "none"
            assert len(secret) == 5
            continue
        role = "stage" if name.startswith("stage-server") else roles.get(name)
        assert secret == ({f"certificates-{role}"} if role else set()), name
        for volume in service.get("volumes", ()):
            if volume["source"] in secret:
                assert volume["read_only"] is True, name


def test_there_are_no_passwords(configuration: dict[str, Any]) -> None:
    for name, service in configuration["services"].items():
        settings = service.get("environment", {})
        assert not [key for key in settings if re.search("PASSWORD|SECRET|TOKEN", key)], name
    grafana = configuration["services"]["grafana"]["environment"]
    # No user is made, so the one that Grafana is known for does not exist; visitors may look, and no more.
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert (grafana["GF_AUTH_BASIC_ENABLED"], grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"]) == ("false", "Viewer")


def test_services_have_time_to_stop(configuration: dict[str, Any]) -> None:
    grace = StageSettings.model_fields["grace_seconds"].default
    for name, service in configuration["services"].items():
        if service["image"].startswith("gradwire/"):
            assert service["stop_grace_period"] == f"{grace + 15:.0f}s", name


def test_each_gpu_has_one_server() -> None:
    services = stack("gpu")["services"]
    devices = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]
        for name, service in services.items()
        if name.startswith("stage-server")
    }
    assert sorted(device["device_ids"][0] for device in devices.values()) == [str(number) for number in range(8)]
    assert all(len(device["device_ids"]) == 1 and device["capabilities"] == ["gpu"] for device in devices.values())
    for name in devices:
        settings = services[name]["environment"]
        assert (settings["GRADWIRE_STAGE_DEVICE"], services[name]["deploy"].get("replicas", 1)) == ("cuda", 1)
        # Prometheus looks for this name.
        aliases = (services[name]["networks"]["gradwire"] or {}).get("aliases", [])
        assert name == "stage-server" or aliases == ["stage-server"]


def test_builds_see_the_code_alone() -> None:
    """What is not named is left out: the first line leaves out everything."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    for source in {source for sources in copied for source in sources.split()}:
        named = [line.removeprefix("!") for line in lines if line.startswith(f"!{source}")]
        assert named, f"{source} is not in .dockerignore"
        assert all((ROOT / path).exists() for path in named)


def test_everything_in_the_images_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    assert needed("gradwire", frozenset({"stage", "client", "checksums"})) - pinned - {"gradwire"} == set()
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {Requirement(each).name for each in build} <= pinned


def needed(distribution: str, extras: frozenset[str]) -> set[str]:
    """What a distribution needs here, directly or not; itself included."""
    found: dict[str, set[str]] = {}
    waiting = [(distribution, extras)]
    while waiting:
        name, wanted = waiting.pop()
        if canonicalize_name(name) in found and wanted <= found[canonicalize_name(name)]:
            continue
        found.setdefault(canonicalize_name(name), set()).update(wanted)
        for requirement in map(Requirement, requires(name) or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted or {""}):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return set(found)
