"""Where in the user's code something comes from: module path and source line, for messages and for graph nodes."""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType

import torch
from torch import nn

MODEL = "model"  # attribute of the exported wrapper that holds the user's model
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep
_MAX_CODE = 120  # characters of a line of code
_FRAME = re.compile(r'File "(.*?)", line (\d+)')


@dataclass(frozen=True)
class Location:
    """A module path in the user's own names and a "file.py:12: code" line; either may be empty."""

    module_path: str = ""
    source: str = ""

    def __str__(self) -> str:
        parts = [f"module '{self.module_path}'"] if self.module_path else []
        return ", ".join(parts + ([self.source] if self.source else [])) or "unknown place"


def user_name(qualified: str) -> str:
    """Turn a name inside the exported wrapper into the user's own: the model's prefix goes."""
    return "" if qualified == MODEL else qualified.removeprefix(f"{MODEL}.")


def location_of_node(node: torch.fx.Node) -> Location:
    """Return where the call that made a traced node stands."""
    paths = _module_paths(node)
    return Location(user_name(paths[-1]) if paths else "", _source_of_trace(node.meta.get("stack_trace") or ""))


def is_in_model(node: torch.fx.Node) -> bool:
    """Whether a traced node was made by the user's model, rather than by its loss."""
    return MODEL in _module_paths(node)


def location_of_function(function: object) -> str:
    """Return the source line where a function is defined; empty for anything else."""
    code = getattr(function, "__code__", None)
    return _text(code.co_filename, code.co_firstlineno) if isinstance(code, CodeType) else ""


def location_of_traceback(traceback: TracebackType | None, modules: Mapping[int, str]) -> Location:
    """Return where an exception was raised. `modules` maps the id of each module to its name."""
    frames: list[tuple[FrameType, int]] = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return _innermost(reversed(frames), modules)


def location_of_caller(modules: Mapping[int, str]) -> Location:
    """Return the innermost place outside torch that is running now."""
    return _innermost(((frame, frame.f_lineno) for frame in calling_frames()), modules)


def calling_frames() -> list[FrameType]:
    """Return the running frames below this package's own, innermost first."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frames or not frame.f_code.co_filename.startswith(_HERE):
            frames.append(frame)
        frame = frame.f_back
    return frames


def outside_torch(code: CodeType) -> bool:
    """Whether a frame is the user's: neither torch's, nor ours, nor the standard library's."""
    name = code.co_filename
    if name.startswith((_TORCH, _HERE, "<frozen", "<eval_with_key")):
        return False
    return not name.startswith(_PYTHON) or "site-packages" in name


def _innermost(frames: Iterable[tuple[FrameType, int]], modules: Mapping[int, str]) -> Location:
    source = module_path = ""
    for frame, line in frames:
        if not source and outside_torch(frame.f_code):
            source = _text(frame.f_code.co_filename, line)
        first = frame.f_code.co_varnames[:1]
        owner = frame.f_locals.get(first[0]) if first else None
        if not module_path and isinstance(owner, nn.Module):
            module_path = user_name(modules.get(id(owner), ""))
    return Location(module_path, source)


def _module_paths(node: torch.fx.Node) -> list[str]:
    """The modules around a call, outermost first. Export puts marks of its own among them."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return [path for path in paths if not path.startswith("_")]


def _source_of_trace(trace: str) -> str:
    frames = [frame for frame in _FRAME.findall(trace) if not frame[0].startswith(_HERE)]
    users = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    chosen = (users or frames)[-1:]
    return _text(chosen[0][0], int(chosen[0][1])) if chosen else ""


def _text(filename: str, line: int) -> str:
    return f"{os.path.basename(filename)}:{line}: {linecache.getline(filename, line).strip()[:_MAX_CODE]}"
