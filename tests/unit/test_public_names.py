"""`import gradwire`: cheap, and every public name can be had."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import gradwire


@pytest.mark.parametrize("name", gradwire.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(gradwire, name).__name__ == name
    assert name in dir(gradwire)


def test_the_version_is_the_distributions() -> None:
    assert gradwire.__version__ == importlib.metadata.version("gradwire")


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        gradwire.nonsense  # noqa: B018


def test_importing_and_starting_a_cluster_do_not_import_torch() -> None:
    code = "import gradwire, sys; gradwire.local; gradwire.connect; gradwire.Plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_does_not_import_torch_before_it_starts_servers() -> None:
    code = "import gradwire.cli.app, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
