"""What `gradwire verify` compares: a user's file as model, optimizer, batch and loss, or the reference job's GPT."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gradwire.job.gpt import GPT, Shape, make_optimizer, next_byte_loss
from gradwire.job.settings import JobSettings, load_job_settings
from gradwire_protocol.errors import SettingsError

_FUNCTIONS = ("make_model", "make_optimizer", "make_batch")
_MODULE = "__gradwire_subject__"
_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Subject:
    """How to make what is compared. loss: None if the model's output is the loss."""

    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    make_batch: Callable[[], Any]
    loss: Callable[..., Any] | nn.Module | None


def load_subject(file: Path) -> Subject:
    """Run a Python file as a module, and return what it defines. SettingsError if it does not run, or lacks a name.

    Modules beside the file can be imported by it, as when it is run as a script.
    """
    module = _run(file)
    missing = [name for name in _FUNCTIONS if not callable(getattr(module, name, None))]
    if not hasattr(module, "loss"):
        missing.append("loss")
    if missing:
        raise SettingsError(
            f"{file} does not define all that is compared",
            expected="make_model(), make_optimizer(model), make_batch(), and loss, which may be None",
            got=f"no {', no '.join(missing)}",
            remedy="see examples/charlm.py",
        )
    make_model, make_optimizer, make_batch = (_guarded(file, name, getattr(module, name)) for name in _FUNCTIONS)
    return Subject(make_model=make_model, make_optimizer=make_optimizer, make_batch=make_batch, loss=module.loss)


def reference_subject(settings: JobSettings | None = None) -> Subject:
    """Return a job's model, optimizer, and batch of random bytes; None: the reference job's, with a small batch."""
    rows = settings.batch if settings is not None else _ROWS
    settings = settings or load_job_settings({})
    shape = Shape(layers=settings.layers, width=settings.width, heads=settings.heads, context=settings.context)

    def make_model() -> GPT:
        torch.manual_seed(settings.seed)
        return GPT(shape)

    def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.randint(256, (rows, shape.context + 1), generator=torch.Generator().manual_seed(settings.seed))
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return Subject(
        make_model=make_model,
        make_optimizer=lambda model: make_optimizer(model, lr=settings.lr, weight_decay=settings.weight_decay),
        make_batch=make_batch,
        loss=next_byte_loss,
    )


def _run(file: Path) -> ModuleType:
    path = file.resolve()
    spec = importlib.util.spec_from_file_location(_MODULE, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise SettingsError("There is no such Python file", expected="the path of a .py file", got=str(file))
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and source look-ups need it there; a script's own folder is on the path too.
    sys.modules[_MODULE] = module
    sys.path.insert(0, str(path.parent))
    _guarded(file, "the file itself", spec.loader.exec_module)(module)
    return module


def _guarded(file: Path, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the user's function with its errors worded as wrong input, with the user's own lines."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
            own = [frame for frame in frames if frame.filename == str(file.resolve())]
            where = f", line {own[-1].lineno}" if own else ""
            raise SettingsError(
                f"{file} does not run: {what} raised {type(error).__name__}{where}",
                got=str(error) or type(error).__name__,
                remedy="run it by itself: python " + str(file),
            ) from error

    return call
