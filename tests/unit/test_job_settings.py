from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from gradwire.job.settings import (
    JobSettings,
    TensorPlanName,
    TransportName,
    load_job_settings,
    plan_of,
    reference_values,
    servers_of,
    write_toml,
)
from gradwire.plan import Plan
from gradwire.tensor_plans import AUTO, READY_PLANS
from gradwire_protocol.errors import SettingsError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JobSettings.model_fields:
        monkeypatch.delenv(f"GRADWIRE_{name.upper()}", raising=False)


def test_the_defaults_are_the_reference_jobs_file() -> None:
    committed = tomllib.loads((REPOSITORY / "examples" / "reference.toml").read_text())
    assert reference_values() == committed
    settings = load_job_settings({}).model_dump()
    assert {name: settings[name] for name in committed} == committed


def test_every_field_without_a_default_is_in_the_reference_job() -> None:
    required = {name for name, field in JobSettings.model_fields.items() if field.is_required()}
    assert required == reference_values().keys()


def test_flags_over_environment_over_file_over_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "job.toml"
    file.write_text("steps = 5\nlayers = 6\nwidth = 64\n")
    monkeypatch.setenv("GRADWIRE_STEPS", "7")
    monkeypatch.setenv("GRADWIRE_LAYERS", "3")
    settings = load_job_settings({"steps": 9, "layers": None}, file)
    assert (settings.steps, settings.layers, settings.width) == (9, 3, 64)
    assert settings.batch == reference_values()["batch"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"schedule": "zigzag"}, "schedule"),
        ({"lr": -1.0}, "lr"),
        ({"window": 17}, "window"),
        ({"tensor": 0}, "tensor"),
        ({"tensor_plan": "bert"}, "tensor_plan"),
    ],
)
def test_a_wrong_flag_is_named(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_job_settings(flags)
    assert named in caught.value.got
    assert caught.value.remedy


def test_servers_of_a_stage_are_counted_and_come_into_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWIRE_TENSOR_PLAN", "gpt")
    settings = load_job_settings({"stages": 2, "replicas": 3, "tensor": 2, "transport": "gloo"})
    assert servers_of(settings) == 12
    plan = plan_of(settings)
    assert (plan.tensor, plan.tensor_plan, plan.transport) == (2, "gpt", "gloo")
    assert servers_of(load_job_settings({})) == 2
    assert get_args(TensorPlanName) == (AUTO, *READY_PLANS)
    for transport in get_args(TransportName):
        assert Plan(transport=transport).transport == transport


def test_a_wrong_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWIRE_BATCH", "many")
    with pytest.raises(SettingsError, match="batch"):
        load_job_settings({})


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text("stepz = 5\n")
    with pytest.raises(SettingsError, match="stepz"):
        load_job_settings({}, file)


def test_written_settings_load_again(tmp_path: Path) -> None:
    settings = load_job_settings({"data": tmp_path / 'a "quoted" folder', "lr": 1e-3, "check": False})
    file = tmp_path / "settings.toml"
    file.write_text(write_toml(settings.model_dump()))
    assert load_job_settings({}, file) == settings
