"""The chart's network policies let through what the table of roles says, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from gradwire_protocol.roles import CALLERS
from helm_chart import NAMESPACE, Rendered, needs_helm, rendered, selects

pytestmark = needs_helm

COORDINATOR, SERVER, METRICS = 7070, 7080, 9464
PORTS = {"coordinator": COORDINATOR, "stage": SERVER, "parameter": SERVER}


@dataclass(frozen=True)
class Party:
    """A pod as policies see it."""

    name: str
    labels: Mapping[str, str]
    # Of its ports: name and number.
    ports: Mapping[str, int]
    namespace: str = NAMESPACE


def parties(chart: Rendered) -> list[Party]:
    found = []
    for pod in chart.pods:
        ports = {port["name"]: port["containerPort"] for port in pod.container.get("ports", ())}
        found.append(Party(pod.component, pod.labels, ports))
    return found


# Pods that are not the release's. The first is a client.
FRIEND = Party("client", {"gradwire/client": "true"}, {})
STRANGER = Party("stranger", {"app": "web"}, {})
ELSEWHERE = Party("elsewhere", {"gradwire/client": "true"}, {}, namespace="other")
PROMETHEUS = Party("prometheus", {"app": "prometheus"}, {}, namespace="monitoring")
RESOLVER = Party("resolver", {"k8s-app": "kube-dns"}, {}, namespace="kube-system")


def allowed(chart: Rendered, source: Party, target: Party, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection gets through, by Kubernetes' rules: each end's policies must have a rule for it."""
    leaving = _passes(_rules(chart, source, "Egress"), "to", target, target, port, protocol)
    arriving = _passes(_rules(chart, target, "Ingress"), "from", source, target, port, protocol)
    return leaving and arriving


def _rules(chart: Rendered, party: Party, kind: str) -> list[Any] | None:
    """Return the rules that apply to a pod, of all policies that select it; None if none does: all passes."""
    if party.namespace != NAMESPACE:
        return None
    selected = [
        policy["spec"]
        for policy in chart.of_kind("NetworkPolicy")
        if kind in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], party.labels)
    ]
    return [rule for spec in selected for rule in spec.get(kind.lower(), ())] if selected else None


def _passes(rules: Sequence[Any] | None, direction: str, other: Party, target: Party, port: int, protocol: str) -> bool:
    if rules is None:
        return True
    return any(
        any(_is_peer(peer, other) for peer in rule[direction])
        and (
            "ports" not in rule
            or any(
                entry["protocol"] == protocol and target.ports.get(entry["port"], entry["port"]) == port
                for entry in rule["ports"]
            )
        )
        for rule in rules
    )


def _is_peer(peer: Mapping[str, Any], party: Party) -> bool:
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": party.namespace}):
            return False
    elif party.namespace != NAMESPACE:
        return False
    return selects(peer.get("podSelector", {}), party.labels)


def calls() -> set[tuple[str, str]]:
    """Who calls whom, from the table of roles: pairs of components. Health is asked for on the spot."""
    served = {"CoordinatorService": ["coordinator"], "StageService": ["stage", "parameter"]}
    return {
        (str(role), component)
        for method, roles in CALLERS.items()
        for component in served.get(method.split("/")[1].rpartition(".")[2], ())
        for role in roles
    }


@pytest.fixture(scope="module")
def chart() -> Rendered:
    return rendered({"parameter": {"replicas": 1}, "trainer": {"enabled": True}})


def pairs(chart: Rendered) -> Iterator[tuple[Party, Party, int]]:
    inside = parties(chart)
    outside = [FRIEND, STRANGER, ELSEWHERE, PROMETHEUS]
    ports = (COORDINATOR, SERVER, METRICS, 7071, 22, 50_000)
    yield from itertools.product([*inside, *outside], [party for party in inside if party.ports], ports)


def test_who_may_call_is_let_through_and_nobody_else(chart: Rendered) -> None:
    wanted = calls()
    assert {("stage", "coordinator"), ("client", "parameter"), ("coordinator", "stage")} <= wanted
    tried = 0
    for source, target, port in pairs(chart):
        expected = (source.name, target.name) in wanted and port == PORTS[target.name]
        expected = expected or (source.name == "prometheus" and port == METRICS)
        assert allowed(chart, source, target, port) == expected, (source.name, target.name, port)
        tried += expected
    # client stands for the trainer, `helm test`, and a pod with the label.
    assert tried == len(wanted) + 2 * 3 + 3


def test_no_pod_reaches_anything_else(chart: Rendered) -> None:
    for source in parties(chart):
        for target in (STRANGER, ELSEWHERE, PROMETHEUS, RESOLVER):
            for port in (COORDINATOR, SERVER, 443, 6443):
                assert not allowed(chart, source, target, port)
        for protocol in ("UDP", "TCP"):
            assert allowed(chart, source, RESOLVER, 53, protocol)
            assert not allowed(chart, source, STRANGER, 53, protocol)


def test_a_kind_of_pod_that_no_policy_knows_is_shut_off(chart: Rendered) -> None:
    labels = {"app.kubernetes.io/name": "gradwire", "app.kubernetes.io/instance": "lab"}
    unknown = Party("unknown", labels, {"grpc": SERVER})
    for other in (*parties(chart), FRIEND, STRANGER, PROMETHEUS):
        assert not allowed(chart, unknown, other, other.ports.get("grpc", SERVER))
        assert not allowed(chart, other, unknown, SERVER)
    # Even one that anybody would let in, or out to.
    assert _rules(chart, unknown, "Ingress") == _rules(chart, unknown, "Egress") == []


def test_torch_moves_sums_between_servers_only_if_it_is_told(chart: Rendered) -> None:
    loose = rendered(
        {"parameter": {"replicas": 1}, "trainer": {"enabled": True}, "networkPolicy": {"torchTransport": True}}
    )
    for source, target, port in pairs(loose):
        among = {source.name, target.name} <= {"stage", "parameter"}
        assert allowed(loose, source, target, port) == (allowed(chart, source, target, port) or among)


def test_without_policies_everything_passes_as_anywhere_in_the_cluster() -> None:
    open_to_all = rendered({"networkPolicy": {"enabled": False}})
    assert open_to_all.of_kind("NetworkPolicy") == []
    stage = next(party for party in parties(open_to_all) if party.name == "stage")
    assert allowed(open_to_all, STRANGER, stage, SERVER)


def test_clients_and_prometheus_are_whom_the_values_name() -> None:
    peers = {
        "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "other"}}}],
        "metrics": [],
        "dns": {"to": [{"ipBlock": {"cidr": "169.254.20.10/32"}}], "port": 5353},
    }
    chart = rendered({"networkPolicy": peers})
    stage = next(party for party in parties(chart) if party.name == "stage")
    assert allowed(chart, ELSEWHERE, stage, SERVER)
    assert not allowed(chart, FRIEND, stage, SERVER)
    assert not allowed(chart, PROMETHEUS, stage, METRICS)
    policy = chart.named("NetworkPolicy", "lab-gradwire-stage")
    assert {"protocol": "UDP", "port": 5353} in policy["spec"]["egress"][-1]["ports"]
    assert policy["spec"]["egress"][-1]["to"] == peers["dns"]["to"]
