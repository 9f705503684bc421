"""docs/kubernetes.md works as it stands: its values render, its manifests are valid, its commands are right."""

from __future__ import annotations

import re
import shlex
from typing import Any

import cloudcoil.models.cert_manager.v1 as cert_manager
import kubernetes_validate
import pytest
import yaml

from gradwire_protocol.roles import role_of
from helm_chart import CERT_MANAGER, ROOT, needs_helm, rendered, selects

pytestmark = needs_helm

TEXT = (ROOT / "docs/kubernetes.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
YAML = [document for kind, text in BLOCKS if kind == "yaml" for document in yaml.safe_load_all(text)]
MANIFESTS = [document for document in YAML if "kind" in document]
VALUES = [document for document in YAML if "kind" not in document]
COMMANDS = [line.strip() for kind, text in BLOCKS if not kind for line in text.splitlines()]
RELEASE = "gradwire"


def merged(*values: Any) -> dict[str, Any]:
    """Return values as Helm joins several files."""
    result: dict[str, Any] = {}
    for each in values:
        for key, value in each.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def test_there_is_something_to_test() -> None:
    assert len(MANIFESTS) == 4
    assert len(VALUES) == 5


@pytest.mark.parametrize("values", VALUES, ids=lambda values: ", ".join(values))
def test_values_render(values: dict[str, Any]) -> None:
    # The trainer's go with those of the installation.
    (installation,) = [each for each in VALUES if "checkpoints" in each]
    chart = rendered(merged(installation, values), release=RELEASE)
    assert chart.pod("stage").owner["spec"]["replicas"] >= 4


def test_manifests_are_valid() -> None:
    for manifest in MANIFESTS:
        kind = {"Issuer": cert_manager.Issuer, "Certificate": cert_manager.Certificate}.get(manifest["kind"])
        if kind is None:
            kubernetes_validate.validate(manifest, "1.27", strict=True)
        else:
            known = kind.model_validate(manifest).model_dump(by_alias=True, exclude_unset=True, mode="json")
            assert known == manifest


def test_certificates_are_made_as_the_chart_asks_for() -> None:
    lines = [line for line in rendered({}, release=RELEASE).notes.splitlines() if line.startswith("  ")]
    notes = {tuple(shlex.split(line)) for line in lines}
    said = [line for line in COMMANDS if line.startswith("gradwire certs i") or "create secret generic" in line]
    assert len(said) == 7
    assert {tuple(shlex.split(line)) for line in said} <= notes


def test_a_client_s_pod_is_let_in() -> None:
    (pod,) = [each for each in MANIFESTS if each["kind"] == "Pod"]
    chart = rendered({}, release=RELEASE)
    for component in ("coordinator", "stage"):
        policy = chart.named("NetworkPolicy", f"gradwire-{component}")
        peers = policy["spec"]["ingress"][0]["from"]
        assert any(selects(peer["podSelector"], pod["metadata"]["labels"]) for peer in peers)
    (secret,) = [volume["secret"]["secretName"] for volume in pod["spec"]["volumes"]]
    issued = rendered(CERT_MANAGER, release=RELEASE).of_kind("Certificate")
    (certificate,) = [each for each in issued if each["spec"]["secretName"] == secret]
    assert role_of(certificate["spec"]["uris"]) == "client"
    assert chart.pod("stage").environment["GRADWIRE_STAGE_COORDINATOR"] in TEXT


def test_names_of_what_is_installed_are_right() -> None:
    chart = rendered(merged(*VALUES), release=RELEASE)
    names = {f"{each['kind'].lower()}/{each['metadata']['name']}" for each in chart.documents}
    asked = set(re.findall(r"\b(?:statefulset|job)/[a-z-]+", "\n".join(COMMANDS)))
    assert len(asked) == 2
    assert asked <= names


def test_values_that_the_text_names_exist() -> None:
    described = yaml.safe_load((ROOT / "docker/helm/gradwire/values.yaml").read_text())
    named = set(re.findall(r"`((?:stage|parameter|networkPolicy|coordinator|trainer)\.[A-Za-z.]+)", TEXT))
    assert len(named) >= 5
    for path in named:
        place: Any = described
        for key in path.split("."):
            assert key in place, path
            place = place[key]
