"""The examples run as printed, differ from their single-process scripts in a few lines, and pass verification."""

from __future__ import annotations

import ast
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils import _pytree as pytree

import gradwire
from gradwire.job.subject import load_subject

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("charlm", "digits_cnn", "finetune_minilm", "hf_gpt2")
# The whole way, but short: a few steps, and little held out. `make examples` runs them in full.
SHORT = {"STEPS": "2", "HELD_OUT": "64", "HF_HUB_OFFLINE": "1"}
# Of the batch that is verified, where the model is large.
ROWS = {"finetune_minilm": 8}


def code_lines(script: Path) -> list[str]:
    """Without the docstring, imports, empty lines, and indentation."""
    source = script.read_text()
    module = ast.parse(source)
    skipped: set[int] = set()
    for node in module.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or node is module.body[0]:
            skipped.update(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), 1)
    return [line.strip() for number, line in lines if number not in skipped and line.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_few_lines_differ_from_one_process(name: str) -> None:
    single, pipeline = code_lines(EXAMPLES / f"{name}_single.py"), code_lines(EXAMPLES / f"{name}.py")
    changes = [line for line in difflib.ndiff(single, pipeline) if line[0] in "+-"]
    added = [line for line in changes if line[0] == "+"]
    assert 0 < len(added) <= 6, added
    assert len(changes) - len(added) <= 6, changes


@pytest.mark.parametrize("script", [f"{name}{kind}" for name in NAMES for kind in ("", "_single")])
def test_runs_as_printed(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py"],
        cwd=tmp_path,
        env=os.environ | SHORT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = [float(figure) for figure in re.findall(r"(?:before|after|images): (\d+\.\d+)", done.stdout)]
    assert len(figures) == (1 if script.startswith("digits") else 2), done.stdout
    if "loss" in done.stdout:
        assert figures[1] < figures[0]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def cluster() -> Iterator[gradwire.Cluster]:
    with gradwire.local(stage_servers=3) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_passes_verification(cluster: gradwire.Cluster, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, value in SHORT.items():
        monkeypatch.setenv(variable, value)
    subject = load_subject(EXAMPLES / f"{name}.py")
    found = gradwire.verify(
        cluster,
        subject.make_model(),
        subject.make_optimizer,
        loss=subject.loss,
        batch=pytree.tree_map(lambda tensor: tensor[: ROWS.get(name)], subject.make_batch()),
        plan=gradwire.Plan(stages=3, microbatches=4),
        double=True,
    )
    assert found.equal, str(found)
    assert found.weights_judged
