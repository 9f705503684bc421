"""The chart's environment variables are settings that the services take, and its values are checked before anything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gradwire.job.settings import JobSettings, load_job_settings, reference_values
from gradwire_coordinator.settings import CoordinatorSettings, load_coordinator_settings
from gradwire_protocol.channels import parse_address
from gradwire_protocol.settings import Settings
from gradwire_stage.settings import StageSettings, load_stage_settings
from helm_chart import CHART, VALUE_SETS, HelmRefusal, Pod, ask_helm, needs_helm, rendered, request

pytestmark = needs_helm

CLASSES: Mapping[str, type[Settings]] = {
    "coordinator": CoordinatorSettings,
    "stage": StageSettings,
    "parameter": StageSettings,
    "client": JobSettings,
}
PORTS = {"coordinator": 7070, "stage": 7080, "parameter": 7080}
# What the chart leaves alone: plaintext, the parent's pipe, what the program says itself, names that are made up.
NEVER = {
    "coordinator": {"insecure"},
    "stage": {"insecure", "ready_fd", "role", "server"},
    # A flag says where the run's directory is; the last is the local cluster's.
    "client": {"insecure", "out", "threads"},
}


def fields_of(pod: Pod) -> dict[str, str]:
    """Return the pod's variables by their setting's name."""
    prefix = str(CLASSES[pod.component].model_config["env_prefix"])
    for name in pod.environment:
        assert name.startswith(prefix), name
    return {name.removeprefix(prefix).lower(): value for name, value in pod.environment.items()}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these, and none of Gradwire's else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("GRADWIRE_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def load(pod: Pod, folder: Path) -> Any:
    folders = {mount["name"]: folder / mount["name"] for mount in pod.container["volumeMounts"]}
    for place in folders.values():
        place.mkdir(exist_ok=True)
    with environment({name: pod.placed(value, folders) for name, value in pod.environment.items()}):
        if pod.component == "coordinator":
            return load_coordinator_settings({}, None)
        if pod.component == "client":
            return load_job_settings({})
        return load_stage_settings({"role": "parameter"} if pod.component == "parameter" else {}, None)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_services_take_what_the_chart_sets(name: str, tmp_path: Path) -> None:
    for pod in rendered(VALUE_SETS[name]).pods:
        if pod.owner["kind"] == "Pod":  # of `helm test`: its settings are flags
            continue
        fields = fields_of(pod)
        assert set(fields) <= set(CLASSES[pod.component].model_fields)
        settings = load(pod, tmp_path)
        # Nothing is lost: what was set is not what would be there without it, or agrees with it as text.
        for field, value in fields.items():
            assert getattr(settings, field) not in (None, "", ()), field
            if value in ("true", "false"):
                assert getattr(settings, field) is (value == "true")
        if pod.component == "client":
            continue
        assert settings.tls is not None
        # Every path that a service uses is a volume, and the ports are those that the pod says.
        ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        assert parse_address(settings.listen)[1] == ports["grpc"] == PORTS[pod.component]
        assert parse_address(settings.advertise)[1] == ports["grpc"]
        assert parse_address(settings.metrics_listen)[1] == ports["metrics"] == 9464


def test_servers_dial_the_coordinator_where_it_says_it_is(tmp_path: Path) -> None:
    chart = rendered(VALUE_SETS["everything"])
    advertised = load(chart.pod("coordinator"), tmp_path).advertise
    for component in ("stage", "parameter", "client"):
        assert load(chart.pod(component), tmp_path).coordinator == advertised
    (test,) = [pod for pod in chart.pods if pod.owner["kind"] == "Pod"]
    assert test.environment == {"GRADWIRE_COORDINATOR": advertised}
    name, namespace, _ = parse_address(advertised)[0].split(".", 2)
    assert chart.named("Service", name)["spec"]["ports"][0]["port"] == 7070
    assert namespace == "training"


def test_values_of_settings_arrive_as_they_were_given(tmp_path: Path) -> None:
    values = {
        "coordinator": {"settings": {"lease_seconds": 12.5, "profiling_seconds": 0}},
        "stage": {
            "threads": 3,
            "settings": {"send_bytes": 2**31, "tensor_bytes": 10**10, "operators": ["/operators/shapes", "losses"]},
            "sharedMemoryHostPath": "/run/gradwire",
        },
        "trainer": {"enabled": True, "settings": {"lr": 3e-5, "steps": 10**6, "check": False, "compression": "int8"}},
        "checkpoints": {"enabled": True},
        "weights": {"existingClaim": "models"},
    }
    chart = rendered(values)
    coordinator, stage, job = (load(chart.pod(each), tmp_path) for each in ("coordinator", "stage", "client"))
    assert (coordinator.lease_seconds, coordinator.profiling_seconds) == (12.5, 0.0)
    assert (stage.threads, stage.send_bytes, stage.tensor_bytes) == (3, 2**31, 10**10)
    assert stage.operators == ("/operators/shapes", "losses")
    assert stage.shared_memory is True
    assert stage.shared_memory_directory == tmp_path / "run"
    assert coordinator.checkpoint_root == stage.checkpoint_root == tmp_path / "checkpoints"
    assert stage.weights_root == tmp_path / "weights"
    assert (job.lr, job.steps, job.check, job.compression) == (3e-5, 10**6, False, "int8")
    # Pods see nothing of each other, unless they are given a directory of the node.
    assert load(rendered({}).pod("stage"), tmp_path).shared_memory is False


def test_the_schema_knows_every_setting() -> None:
    """What is settable is set by the chart, or named in the schema, or left alone on purpose."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    named = {
        "coordinator": schema["properties"]["coordinator"]["properties"]["settings"],
        "stage": schema["definitions"]["serverSettings"],
        "client": schema["properties"]["trainer"]["properties"]["settings"],
    }
    everything = {
        **VALUE_SETS["everything"],
        "stage": {"sharedMemoryHostPath": "/run/gradwire"},
        "trainer": {"enabled": True},
        "coordinator": {},
    }
    chart = rendered(everything)
    # What values.yaml gives can be given otherwise.
    defaults = {"client": {"wait_seconds"}}
    for component, described in named.items():
        own = set(fields_of(chart.pod(component))) - defaults.get(component, set())
        given = set(described["properties"])
        assert own.isdisjoint(given)
        assert own | given | NEVER[component] == set(CLASSES[component].model_fields), component


def test_the_trainer_begins_a_run_or_goes_on_with_one() -> None:
    def command(trainer: Mapping[str, Any]) -> list[str]:
        pod = rendered({"trainer": {"enabled": True, **trainer}}).pod("client")
        (train,) = pod.containers
        # Its pod may be there before the servers'.
        assert {"name": "GRADWIRE_WAIT_SECONDS", "value": "600"} in train["env"]
        return list(train["command"])

    assert command({"name": "small"}) == ["gradwire", "train", "--out", "/runs/small"]
    resumed = {"name": "more", "runsClaim": "runs", "resume": "small"}
    assert command(resumed) == ["gradwire", "train", "--resume", "/runs/small"]
    with pytest.raises(HelmRefusal, match=r"trainer\.resume needs trainer\.runsClaim"):
        command({"resume": "small"})


def test_the_trainer_takes_no_more_servers_than_there_are() -> None:
    stages = reference_values()["stages"]
    rendered({"stage": {"replicas": stages}, "trainer": {"enabled": True}})
    with pytest.raises(HelmRefusal, match=rf"take {stages} stage servers, and stage\.replicas is {stages - 1}: raise"):
        rendered({"stage": {"replicas": stages - 1}, "trainer": {"enabled": True}})
    grid = {"enabled": True, "settings": {"stages": 2, "replicas": 2, "tensor": 2}}
    rendered({"stage": {"replicas": 8}, "trainer": grid})
    with pytest.raises(HelmRefusal, match="take 8 stage servers"):
        rendered({"stage": {"replicas": 7}, "trainer": grid})


# Values, and what Helm must say of them: where, and what is wrong.
REFUSED: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"stages": {"replicas": 2}}, "additional properties 'stages' not allowed"),
    ({"stage": {"replica": 2}}, "at '/stage': additional properties 'replica' not allowed"),
    ({"stage": {"replicas": "two"}}, "at '/stage/replicas': got string, want integer"),
    ({"stage": {"replicas": -1}}, "at '/stage/replicas': minimum: got -1, want 0"),
    ({"stage": {"threads": 0}}, "at '/stage/threads': minimum"),
    ({"stage": {"settings": {"insecure": True}}}, "at '/stage/settings': additional properties 'insecure' not allowed"),
    ({"stage": {"settings": {"listen": "0.0.0.0:1"}}}, "additional properties 'listen' not allowed"),
    ({"stage": {"gpu": {"count": 0}}}, "at '/stage/gpu/count': minimum"),
    ({"stage": {"updateStrategy": "Recreate"}}, "at '/stage/updateStrategy': value must be one of"),
    ({"stage": {"sharedMemoryHostPath": "run/gradwire"}}, "at '/stage/sharedMemoryHostPath'"),
    ({"stage": None}, "missing property 'stage'"),
    ({"coordinator": {"replicas": 2}}, "at '/coordinator': additional properties 'replicas' not allowed"),
    ({"coordinator": {"settings": {"lease_seconds": 0.5}}}, "at '/coordinator/settings/lease_seconds': minimum"),
    ({"coordinator": {"state": {"size": "big"}}}, "at '/coordinator/state/size'"),
    ({"checkpoints": {"accessModes": ["ReadWriteOnce"]}}, "at '/checkpoints/accessModes'"),
    ({"graceSeconds": 0}, "at '/graceSeconds': minimum: got 0, want 1"),
    ({"listenHost": "127.0.0.1"}, "at '/listenHost': value must be one of"),
    ({"image": {"pullPolicy": "Sometimes"}}, "at '/image/pullPolicy': value must be one of"),
    ({"certificates": {"certManager": {"enabled": "yes"}}}, "enabled': got string, want boolean"),
    ({"certificates": {"certManager": {"enabled": True}}}, "needs certificates.certManager.issuerRef.name"),
    ({"certificates": {"secrets": {"server": "x"}}}, "additional properties 'server' not allowed"),
    ({"networkPolicy": {"clients": [{}]}}, "at '/networkPolicy/clients/0'"),
    ({"networkPolicy": {"clients": [{"pods": {}}]}}, "additional properties 'pods' not allowed"),
    ({"probes": {"liveness": {"periodSeconds": None}}}, "at '/probes/liveness': missing property 'periodSeconds'"),
    ({"trainer": {"name": "Reference job"}}, "at '/trainer/name'"),
    ({"trainer": {"settings": {"coordinator": "elsewhere:7070"}}}, "additional properties 'coordinator' not allowed"),
    ({"fullnameOverride": "A"}, "at '/fullnameOverride'"),
)


def test_wrong_values_are_refused_and_named() -> None:
    answers = ask_helm([request(values) for values, _ in REFUSED])
    for (values, said), answer in zip(REFUSED, answers, strict=True):
        assert said in answer.get("error", "it was taken"), values


def test_release_names_that_make_no_host_names_are_refused() -> None:
    for release in ("a" * 32, "lab.two", "9lab"):
        with pytest.raises(HelmRefusal, match=r"cannot begin the names of services.*set fullnameOverride"):
            rendered({}, release=release)
    assert rendered({"fullnameOverride": "lab"}, release="9lab").named("StatefulSet", "lab-stage")
    # A release that is called after the chart does not get its name twice.
    assert rendered({}, release="gradwire").named("StatefulSet", "gradwire-stage")
