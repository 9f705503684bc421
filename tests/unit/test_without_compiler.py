"""A server's process works without torch's compiler, and gets it when somebody wants it after all."""

from __future__ import annotations

import subprocess
import sys

import pytest

PREPARE = """
import sys, torch
from gradwire_stage.without_compiler import leave_compiler_out
leave_compiler_out()
def is_there():
    return any(name.startswith("torch._dynamo.") for name in sys.modules)
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_optimizer_and_custom_operators_work_without_it() -> None:
    code = """
from gradwire_stage.optimizer import ALLOWED
for name in sorted(ALLOWED):
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1)
    parameter.grad = torch.ones(3, 3)
    optimizer.step()
    assert not torch.equal(parameter.detach(), torch.ones(3, 3)), name
from torch.library import custom_op
@custom_op("tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
doubled.register_autograd(lambda context, gradient: 2 * gradient)
x = torch.ones(2, requires_grad=True)
doubled(x).sum().backward()
assert x.grad.tolist() == [2.0, 2.0]
import inspect
inspect.getmodule(inspect.currentframe())
print(is_there())
"""
    assert run(code).split() == ["False"]


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo.config; print(torch._dynamo.config.verbose in (True, False))",
        "import torch._dynamo as d; print(callable(d.reset))",
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.zeros(1)).item() == 1)",
    ],
)
def test_who_wants_it_gets_it(code: str) -> None:
    assert run(code + "\nprint(is_there())").split() == ["True", "True"]
