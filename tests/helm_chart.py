"""The Helm chart as tests see it: rendered with some values, its documents read, its pods found."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "docker/helm/gradwire"
RELEASE, NAMESPACE = "lab", "training"

Values = Mapping[str, Any]
Document = dict[str, Any]

needs_helm = pytest.mark.skipif(
    importlib.util.find_spec("helm_python") is None,
    reason="helm-python-sdk is not installed: it has wheels for x86_64 alone",
)

CERT_MANAGER: Values = {"certificates": {"certManager": {"enabled": True, "issuerRef": {"name": "gradwire-ca"}}}}
MONITORING: Values = {
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Gradwire"}},
    }
}
# Values as somebody might give them: what is rendered with each must hold.
VALUE_SETS: Mapping[str, Values] = {
    "defaults": {},
    "gpu": {
        "stage": {
            "replicas": 8,
            "gpu": {"enabled": True},
            "runtimeClassName": "nvidia",
            "nodeSelector": {"nvidia.com/gpu.present": "true"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "settings": {"send_bytes": 2**31, "operators": ["shapes", "losses"]},
            "sharedMemoryHostPath": "/run/gradwire",
            "updateStrategy": "OnDelete",
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
            ],
        },
        "networkPolicy": {"torchTransport": True},
    },
    "cert-manager": CERT_MANAGER,
    "parameter servers": {
        "parameter": {"replicas": 2, "threads": 4},
        "checkpoints": {"enabled": True},
        "weights": {"existingClaim": "models"},
    },
    "monitoring": MONITORING,
    "everything": {
        **CERT_MANAGER,
        **MONITORING,
        "image": {"registry": "registry.lab:5000", "tag": "1.2.3", "pullSecrets": ["registry"]},
        "listenHost": "[::]",
        "coordinator": {
            "settings": {"lease_seconds": 20, "heartbeat_seconds": 0.5},
            "state": {"existingClaim": "log"},
            "disruptionBudget": {"enabled": True, "maxUnavailable": 0},
            "podAnnotations": {"note": "one"},
        },
        "stage": {
            "replicas": 4,
            "extraVolumes": [{"name": "operators", "configMap": {"name": "operators"}}],
            "extraVolumeMounts": [{"name": "operators", "mountPath": "/operators", "readOnly": True}],
        },
        "parameter": {"replicas": 1, "disruptionBudget": {"enabled": False}},
        "checkpoints": {"enabled": True, "existingClaim": "checkpoints"},
        "weights": {"existingClaim": "models"},
        "trainer": {
            "enabled": True,
            "settings": {"steps": 20, "stages": 2, "replicas": 2, "exchange": "parameter-server", "save_every": 10},
            "runsClaim": "runs",
            "resume": "earlier",
        },
    },
    "nothing kept": {
        "coordinator": {"state": {"enabled": False}},
        "networkPolicy": {"enabled": False},
        "stage": {"disruptionBudget": {"enabled": False}},
        "trainer": {"enabled": True},
    },
}


class HelmRefusal(Exception):
    """Helm's own words on values or a template."""


def ask_helm(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the renderer's answers, in order."""
    command = [sys.executable, str(Path(__file__).with_name("helm_renderer.py"))]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the renderer ended with {done.returncode}: {done.stderr[-2000:]}")
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def request(values: Values, chart: Path = CHART, *, release: str = RELEASE, do: str = "render") -> dict[str, Any]:
    return {"do": do, "chart": str(chart), "values": values, "name": release, "namespace": NAMESPACE}


@dataclass(frozen=True)
class Pod:
    """A pod, or the template of some. owner: the document that it stands in."""

    owner: Document
    labels: Mapping[str, str]
    spec: Document

    @property
    def name(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}"

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def container(self) -> Document:
        (container,) = self.spec["containers"]
        return dict(container)

    @property
    def containers(self) -> list[Document]:
        """All, in the order in which they start."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def environment(self) -> dict[str, str]:
        return {variable["name"]: variable["value"] for variable in self.container.get("env", [])}

    def placed(self, text: str, folders: Mapping[str, Path]) -> str:
        """Return a setting, with the place of a volume, if it begins with one, by a folder of this machine."""
        for mount in self.container["volumeMounts"]:
            place = mount["mountPath"]
            if text == place or text.startswith(place + "/"):
                return str(folders[mount["name"]]) + text.removeprefix(place)
        return text


class Rendered:
    """What the chart makes of some values."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.notes = files["gradwire/templates/NOTES.txt"]
        self.documents: list[Document] = [
            document
            for path, text in files.items()
            if not path.endswith(".txt")
            for document in yaml.safe_load_all(text)
            if document is not None
        ]

    def of_kind(self, *kinds: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] in kinds]

    def named(self, kind: str, name: str) -> Document:
        (found,) = [document for document in self.of_kind(kind) if document["metadata"]["name"] == name]
        return found

    @property
    def pods(self) -> list[Pod]:
        return list(self._pods())

    def pod(self, component: str) -> Pod:
        """Return the component's, the one of `helm test` left out."""
        (found,) = [pod for pod in self.pods if pod.component == component and pod.owner["kind"] != "Pod"]
        return found

    def _pods(self) -> Iterator[Pod]:
        for document in self.of_kind("Deployment", "StatefulSet", "Job"):
            template = document["spec"]["template"]
            yield Pod(document, template["metadata"]["labels"], template["spec"])
        for document in self.of_kind("Pod"):
            yield Pod(document, document["metadata"]["labels"], document["spec"])


def rendered(values: Values, *, chart: Path = CHART, release: str = RELEASE) -> Rendered:
    """Render the chart; HelmRefusal if Helm does not."""
    return _rendered(json.dumps(values, sort_keys=True), chart, release)


@cache
def _rendered(values: str, chart: Path, release: str) -> Rendered:
    (answer,) = ask_helm([request(json.loads(values), chart, release=release)])
    if "error" in answer:
        raise HelmRefusal(answer["error"])
    return Rendered(answer["result"])


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a Kubernetes label selector takes something with these labels. An empty one takes everything."""
    for expression in selector.get("matchExpressions", ()):
        value = labels.get(expression["key"])
        holds = {
            "Exists": value is not None,
            "DoesNotExist": value is None,
            "In": value in expression.get("values", ()),
            "NotIn": value not in expression.get("values", ()),
        }[expression["operator"]]
        if not holds:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
