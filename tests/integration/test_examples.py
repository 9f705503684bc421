"""The examples run as printed, differ from their single-process scripts in a few lines, and pass verification.

One pair runs as its user starts it, with processes of its own. The others differ from it in model and data: they run
here, where torch and transformers are imported already, on one cluster. They take as long as many other tests together:
`make test-examples` runs them, and `make examples` all of the scripts in full.
"""

from __future__ import annotations

import ast
import difflib
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from torch.utils import _pytree as pytree

import gradwire
from gradwire.job.subject import load_subject

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("charlm", "digits_cnn", "finetune_minilm", "hf_gpt2")
KINDS = ("", "_single")
# In processes of its own.
ALONE = "charlm"
# The whole way, but short: a few steps, and little held out.
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


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in SHORT.items():
        monkeypatch.setenv(variable, value)


def check_output(script: str, output: str) -> None:
    figures = [float(figure) for figure in re.findall(r"(?:before|after|images): (\d+\.\d+)", output)]
    assert len(figures) == (1 if script.startswith("digits") else 2), output
    if "loss" in output:
        assert figures[1] < figures[0]
    assert not list(Path.cwd().iterdir())


@pytest.mark.example
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("script", [ALONE + kind for kind in KINDS])
def test_runs_as_printed_in_processes_of_its_own(script: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py"], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    check_output(script, done.stdout)


@pytest.mark.example
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("script", [name + kind for name in NAMES for kind in KINDS if name != ALONE])
def test_runs_as_printed(
    four_processes: gradwire.LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
) -> None:
    def local(*, stage_servers: int) -> gradwire.Cluster:
        assert stage_servers <= len(four_processes.status().servers)
        return gradwire.connect(four_processes.address)

    monkeypatch.setattr(gradwire, "local", local)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as where nobody tests
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    check_output(script, capsys.readouterr().out)


@pytest.mark.example
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", NAMES)
def test_passes_verification(four_processes: gradwire.Cluster, name: str) -> None:
    subject = load_subject(EXAMPLES / f"{name}.py")
    found = gradwire.verify(
        four_processes,
        subject.make_model(),
        subject.make_optimizer,
        loss=subject.loss,
        batch=pytree.tree_map(lambda tensor: tensor[: ROWS.get(name)], subject.make_batch()),
        plan=gradwire.Plan(stages=3, microbatches=4),
        double=True,
    )
    assert found.equal, str(found)
    assert found.weights_judged
