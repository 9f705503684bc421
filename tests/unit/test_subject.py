from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradwire.job.subject import load_subject, reference_subject
from gradwire_protocol.errors import SettingsError

SUBJECT = """
import torch

def make_model():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 6)

def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def make_batch():
    return torch.randn(8, 6), torch.randn(8, 6)

loss = torch.nn.functional.mse_loss
"""


def test_a_file_as_a_subject(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    (tmp_path / "beside_the_subject.py").write_text("LOSS = None\n")
    file.write_text(SUBJECT + "from beside_the_subject import LOSS as loss\n")
    subject = load_subject(file)
    assert subject.loss is None
    model = subject.make_model()
    assert isinstance(subject.make_optimizer(model), torch.optim.SGD)
    assert len(subject.make_batch()) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def make_batch", "def make_something", "no make_batch"),
        ("loss = ", "other = ", "no loss"),
        ("import torch\n", "import nothing_of_this_name\n", "nothing_of_this_name"),
        ("import torch\n", "import torch (\n", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "file.py"
    assert old in SUBJECT
    file.write_text(SUBJECT.replace(old, new))
    with pytest.raises(SettingsError, match=message):
        load_subject(file)


def test_an_error_of_the_users_function_names_their_line(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(SUBJECT.replace("Linear(6, 6)", "Linear(6, 6).nothing"))
    with pytest.raises(SettingsError, match="make_model raised AttributeError, line 6"):
        load_subject(file).make_model()


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.py"):
        load_subject(tmp_path / "nowhere.py")


def test_the_reference_job() -> None:
    subject = reference_subject()
    x, y = subject.make_batch()
    assert subject.loss is not None
    loss = subject.loss(subject.make_model()(x), y)
    assert loss.item() == pytest.approx(5.5, abs=0.3)  # ln 256: nothing is learnt yet
