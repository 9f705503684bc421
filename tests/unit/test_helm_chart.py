"""The Helm chart: linted, rendered with many values, each document validated, and what refers to something finds it."""

from __future__ import annotations

import tomllib
from functools import cache
from typing import Any

import cloudcoil.models.cert_manager.v1 as cert_manager
import cloudcoil.models.prometheus_operator.v1 as prometheus_operator
import kubernetes_validate
import pytest
import yaml

from helm_chart import (
    CERT_MANAGER,
    CHART,
    ROOT,
    VALUE_SETS,
    Document,
    Pod,
    Rendered,
    ask_helm,
    needs_helm,
    rendered,
    request,
    selects,
)

pytestmark = needs_helm

# The oldest that Chart.yaml admits, and the newest that the schemas know.
KUBERNETES = ("1.27", "1.37")
CUSTOM = {
    "Certificate": cert_manager.Certificate,
    "ServiceMonitor": prometheus_operator.ServiceMonitor,
    "PrometheusRule": prometheus_operator.PrometheusRule,
}
# Severities of Helm's linter.
INFORMATION = 1


@pytest.fixture(params=VALUE_SETS)
def chart(request: pytest.FixtureRequest) -> Rendered:
    return rendered(VALUE_SETS[request.param])


@pytest.fixture(autouse=True, scope="module")
def schemas_are_read_once() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        utils = kubernetes_validate.utils
        patch.setattr(utils, "schema_contents", cache(utils.schema_contents))
        yield


def validate(document: Document, kubernetes: str) -> None:
    """Raise if a document is not what its kind may be; unknown fields are refused too."""
    kind = CUSTOM.get(document["kind"])
    if kind is None:
        kubernetes_validate.validate(document, kubernetes, strict=True)
        return
    # The models are made from the custom resource's own definition. They drop fields that they do not know.
    known = kind.model_validate(document).model_dump(by_alias=True, exclude_unset=True, mode="json")
    assert known == document


def test_the_linter_has_no_warning() -> None:
    for answer in ask_helm([request(values, do="lint") for values in VALUE_SETS.values()]):
        assert [message for message in answer["result"] if message["severity"] > INFORMATION] == []


def test_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    described = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert described["version"] == described["appVersion"] == project["version"]
    assert described["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_every_document_is_valid(chart: Rendered, kubernetes: str) -> None:
    for document in chart.documents:
        validate(document, kubernetes)


def test_validation_notices() -> None:
    whole = rendered(VALUE_SETS["everything"])
    for kind in ("Deployment", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget", *CUSTOM):
        document = whole.of_kind(kind)[0]
        broken = {**document, "spec": {**document["spec"], "bogus": 1}}
        with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
            validate(broken, KUBERNETES[0])
    certificate = whole.of_kind("Certificate")[0]
    with pytest.raises(ValueError):
        validate({**certificate, "spec": {**certificate["spec"], "usages": ["serving"]}}, KUBERNETES[0])


def test_names_are_unique_and_short_enough(chart: Rendered) -> None:
    names = [(document["kind"], document["metadata"]["name"]) for document in chart.documents]
    assert len(set(names)) == len(names)
    longest = rendered(CERT_MANAGER, release="a" * 31)  # and -gradwire: the 40 that may be
    for document in longest.documents:
        name = document["metadata"]["name"]
        # A StatefulSet's name and a hash become a label of its pods.
        assert len(name) <= (52 if document["kind"] == "StatefulSet" else 63)
        assert all(len(label) <= 63 for label in document["metadata"]["labels"].values())
        if document["kind"] == "Certificate":
            assert len(document["spec"]["commonName"]) <= 64


def test_selectors_find_the_pods_that_they_are_for(chart: Rendered) -> None:
    workloads = {pod.component: pod for pod in chart.pods if pod.owner["kind"] in ("Deployment", "StatefulSet")}
    found = {"Service": [], "PodDisruptionBudget": []}
    for pod in workloads.values():
        selector = pod.owner["spec"]["selector"]
        assert [other.component for other in chart.pods if selects(selector, other.labels)] == [pod.component]
    for service in chart.of_kind("Service"):
        (pod,) = [pod for pod in chart.pods if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        found["Service"].append(pod.component)
        ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for budget in chart.of_kind("PodDisruptionBudget"):
        (pod,) = [pod for pod in chart.pods if selects(budget["spec"]["selector"], pod.labels)]
        found["PodDisruptionBudget"].append(pod.component)
    assert sorted(found["Service"]) == sorted(workloads)
    assert len(set(found["PodDisruptionBudget"])) == len(found["PodDisruptionBudget"])


def test_each_stateful_set_has_its_headless_service(chart: Rendered) -> None:
    for stateful in chart.of_kind("StatefulSet"):
        service = chart.named("Service", stateful["spec"]["serviceName"])
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        template = stateful["spec"]["template"]["metadata"]["labels"]
        assert selects({"matchLabels": service["spec"]["selector"]}, template)
        assert stateful["spec"]["podManagementPolicy"] == "Parallel"


def test_every_mount_has_its_volume_and_every_volume_is_mounted(chart: Rendered) -> None:
    for pod in chart.pods:
        volumes = [volume["name"] for volume in pod.spec["volumes"]]
        for container in pod.containers:
            mounts = [mount["name"] for mount in container["volumeMounts"]]
            assert sorted(volumes) == sorted(mounts), pod.name
            places = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_claim_is_made_or_given(name: str) -> None:
    chart = rendered(VALUE_SETS[name])
    made = {claim["metadata"]["name"] for claim in chart.of_kind("PersistentVolumeClaim")}
    given = {"everything": {"log", "checkpoints", "models", "runs"}, "parameter servers": {"models"}}.get(name, set())
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in chart.pods
        for volume in pod.spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == made | given
    for claim in chart.of_kind("PersistentVolumeClaim"):
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_secrets_are_the_ones_that_are_made(chart: Rendered) -> None:
    used = {
        (pod.component, volume["secret"]["secretName"])
        for pod in chart.pods
        for volume in pod.spec["volumes"]
        if "secret" in volume
    }
    issued = {
        (each["metadata"]["labels"]["app.kubernetes.io/component"], each["spec"]["secretName"])
        for each in chart.of_kind("Certificate")
    }
    if issued:
        assert used == issued
    else:
        # The notes say how to make each.
        for component, secret in used:
            assert f"--role {component} " in chart.notes
            assert f"create secret generic {secret} --from-file=tls.crt" in chart.notes


def test_one_writer_of_the_state() -> None:
    (coordinator,) = rendered({}).of_kind("Deployment")
    assert coordinator["spec"]["replicas"] == 1
    assert coordinator["spec"]["strategy"] == {"type": "Recreate"}


def restricted(pod: Pod) -> None:
    """Assert what Kubernetes' pod security standard "restricted" asks for, and more."""
    assert pod.spec["automountServiceAccountToken"] is False
    assert pod.spec["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
    security = pod.spec["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, 10001, 10001)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod.containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        (certs,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/certs"]
        assert certs["readOnly"] is True
        (secret,) = [volume["secret"] for volume in pod.spec["volumes"] if volume["name"] == certs["name"]]
        assert secret["defaultMode"] == 0o440


def test_pods_are_restricted(chart: Rendered) -> None:
    for pod in chart.pods:
        restricted(pod)


def test_only_shared_memory_takes_a_directory_of_the_node() -> None:
    for name, values in VALUE_SETS.items():
        for pod in rendered(values).pods:
            paths = [volume["hostPath"]["path"] for volume in pod.spec["volumes"] if "hostPath" in volume]
            assert paths == (["/run/gradwire"] if (name, pod.component) == ("gpu", "stage") else [])


def test_probes_ask_the_program_that_runs(chart: Rendered) -> None:
    for pod in chart.pods:
        if pod.component == "client":
            continue
        (program,) = pod.container["command"]
        for kind in ("startup", "readiness", "liveness"):
            assert pod.container[f"{kind}Probe"]["exec"]["command"] == [program, "--health"]


def test_kubernetes_waits_longer_than_the_service() -> None:
    for grace in (30, 200):
        for pod in rendered({"graceSeconds": grace, "parameter": {"replicas": 1}}).pods:
            if pod.component == "client":
                continue
            prefix = "GRADWIRE_COORDINATOR" if pod.component == "coordinator" else "GRADWIRE_STAGE"
            assert pod.environment[f"{prefix}_GRACE_SECONDS"] == str(grace)
            assert pod.spec["terminationGracePeriodSeconds"] == grace + 15


def test_a_gpu_is_asked_for_and_used() -> None:
    stage = rendered(VALUE_SETS["gpu"]).pod("stage")
    assert stage.container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert stage.environment["GRADWIRE_STAGE_DEVICE"] == "cuda"
    assert stage.container["image"] == "gradwire/stage-server:0.1.0-cuda"
    assert rendered({}).pod("stage").environment["GRADWIRE_STAGE_DEVICE"] == "cpu"
    other = {"gpu": {"enabled": True, "count": 2, "resourceName": "amd.com/gpu"}, "image": {"tag": "rocm"}}
    stage = rendered({"stage": other}).pod("stage")
    # Beside the limits that are there.
    assert stage.container["resources"]["limits"] == {"memory": "8Gi", "amd.com/gpu": 2}
    assert stage.container["image"] == "gradwire/stage-server:rocm"


def test_images_come_from_the_registry() -> None:
    images = {pod.container["image"] for pod in rendered(VALUE_SETS["everything"]).pods}
    names = ("coordinator", "stage-server", "parameter-server", "client")
    assert images == {f"registry.lab:5000/gradwire/{name}:1.2.3" for name in names}
