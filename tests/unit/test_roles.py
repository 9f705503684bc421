"""The table of who may call what: complete, and what a refusal says."""

import importlib
import pkgutil
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

import gradwire_protocol.v1
from gradwire_protocol.errors import NotAllowed
from gradwire_protocol.roles import CALLERS, ENROLL, MEMBERS, Role, check_call, role_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"


def every_method():
    files = [health_pb2.DESCRIPTOR]
    for module in pkgutil.iter_modules(gradwire_protocol.v1.__path__):
        if module.name.endswith("_pb2"):
            files.append(importlib.import_module(f"gradwire_protocol.v1.{module.name}").DESCRIPTOR)
    services = [service for file in files for service in file.services_by_name.values()]
    return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}


def test_every_method_of_every_service_is_in_the_table_and_nothing_else():
    methods = every_method()
    assert len(methods) > 20
    assert set(CALLERS) == methods
    assert ENROLL in methods


def test_only_members_call():
    for method, callers in CALLERS.items():
        assert callers, method
        assert callers <= set(MEMBERS), method


@pytest.mark.parametrize("role", [Role.STAGE, Role.PARAMETER, Role.COORDINATOR, Role.ENROLMENT, None])
def test_only_clients_submit_runs(role):
    check_call("/gradwire_protocol.v1.CoordinatorService/CreateRun", Role.CLIENT, "me")
    with pytest.raises(NotAllowed) as caught:
        check_call("/gradwire_protocol.v1.CoordinatorService/CreateRun", role, "gpu-1")
    error = caught.value
    assert "CoordinatorService/CreateRun" in error.message
    assert "client" in error.expected
    assert "gpu-1" in error.got
    assert (f"role {role}" if role else "without a role") in error.got
    assert "gradwire certs issue" in error.remedy


def test_a_method_that_is_not_in_the_table_is_nobodys():
    for role in Role:
        with pytest.raises(NotAllowed, match="nobody"):
            check_call("/gradwire_protocol.v1.StageService/Anything", role, "x")


@pytest.mark.parametrize(
    ("uris", "role"),
    [
        (["spiffe://gradwire/role/stage"], Role.STAGE),
        (["https://example.org/", "spiffe://gradwire/role/client"], Role.CLIENT),
        ([], None),
        (["spiffe://gradwire/role/"], None),
        (["spiffe://gradwire/role/root"], None),
        (["spiffe://gradwire/role/Stage"], None),
        (["spiffe://other/role/stage"], None),
        (["spiffe://gradwire/role/stage", "spiffe://gradwire/role/client"], None),
    ],
)
def test_a_certificate_has_one_role_of_ours_or_none(uris, role):
    assert role_of(uris) is role


def test_the_document_has_the_table_as_it_is():
    rows = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 2:
            rows[cells[0].strip("`")] = set(cells[1].split(", "))
    shown = {method.split(".")[-1]: {str(role) for role in callers} for method, callers in CALLERS.items()}
    shown[ENROLL.split(".")[-1]] = {"whoever holds a join token"}
    assert rows == shown
