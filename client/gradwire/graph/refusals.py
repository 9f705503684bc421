"""Refuses, during export, what export would drop without a word and so train wrongly.

torch.export keeps forward operators only: a custom autograd function's backward, hooks on gradients, inference mode
vanish. Errors name the place and the remedy. Patches act on the exporting thread alone.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules import transformer

from gradwire.graph.source import Location, calling_frames, location_of_caller, outside_torch
from gradwire_protocol.errors import ModelError

CUSTOM_OPERATOR = (
    "write it with torch's own differentiable operators, or as torch.library.custom_op with register_fake and "
    "register_autograd, in a module that stage servers are started with (--operators)"
)
# What torch.library's register_autograd makes of a formula: it belongs to the operator, wherever that runs.
_OF_CUSTOM_OPERATORS = "torch._library.autograd"
_SCRIPTED = "give the Python module that the script was made from; stage servers run its operators as they are"
_PACKED = (
    "give padded sequences to the recurrent layer, take the outputs that count by their lengths (gather, or a mask), "
    "and ignore padded targets in the loss"
)
_INNER_GRADIENT = (
    "write the derivative out with torch's operators, or leave the term out: gradients are taken once, by the servers"
)
# What the user calls it, and the way out, by a pattern of an operator's name or of torch's message.
_KNOWN: dict[str, tuple[str, str]] = {
    r"^lazy_load_decompositions$|^_vmap_": (
        "torch.vmap",
        "write the batch dimension out: broadcasting, torch.einsum, matmul",
    ),
    r"^cond$|call_function cond\b": ("torch.cond", "compute both branches and choose with torch.where"),
    r"^while_loop$|call_function while_loop\b": (
        "while_loop",
        "repeat a fixed number of times, and choose with torch.where",
    ),
    r"aten\._ctc_loss\b": (
        "F.ctc_loss",
        "torch cannot trace it: train with another loss, such as cross entropy on aligned targets",
    ),
    r"aten\._nested_": ("A nested tensor", "use padded tensors with a mask"),
    r"\bFlexAttention\b": ("flex_attention", "use F.scaled_dot_product_attention with a mask"),
    r"aten\.\w*_sparse\w*\.": ("A sparse tensor", "use dense tensors"),
    r"\.numpy\(\) is not supported": (
        "Tensor.numpy()",
        "stay with torch's operators: NumPy's leave no trace in the graph",
    ),
}


def known_obstacle(text: str) -> tuple[str, str] | None:
    """What the user calls the operator in torch's message or name, and the way out."""
    return next((known for pattern, known in _KNOWN.items() if re.search(pattern, text)), None)


def refuse_scripted_modules(model: nn.Module) -> None:
    """ModelError for a submodule of torch.jit."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"A scripted module ('{module.original_name}') cannot be exported, at {Location(path)}",
                expected="Python modules",
                got=type(module).__name__,
                remedy=_SCRIPTED,
            )


def refuse_gradient_hooks(model: nn.Module) -> None:
    """ModelError if a module or parameter has a hook that runs in the backward pass."""
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise _lost(f"The backward hook on {type(module).__name__}", Location(path), "remove the hook")
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise _lost(f"The gradient hook on parameter '{name}'", Location(name), "remove the hook")


@contextlib.contextmanager
def refuse_silent_losses(modules: Mapping[int, str]) -> Iterator[None]:
    """While active, code that export would drop raises ModelError. `modules` maps module ids to names."""

    def refuse(what: str, remedy: str) -> NoReturn:
        raise _lost(what, location_of_caller(modules), remedy)

    apply = torch.autograd.Function.__dict__["apply"]

    def refuse_function(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if function.__module__ == _OF_CUSTOM_OPERATORS:
            return apply.__func__(function, *args, **kwargs)
        if function.__name__ == "CheckpointFunction":
            refuse("A reentrant checkpoint", "call torch.utils.checkpoint.checkpoint with use_reentrant=False")
        refuse(f"The backward of autograd.Function '{function.__name__}'", CUSTOM_OPERATOR)

    def refuse_hook(*_: Any, **__: Any) -> None:
        refuse("A hook on a tensor's gradient", "remove Tensor.register_hook from the forward pass")

    def refuse_gradient(*_: Any, **__: Any) -> None:
        refuse("A gradient taken inside the forward pass or the loss", _INNER_GRADIENT)

    def refuse_packing(*_: Any, **__: Any) -> None:
        raise ModelError(
            f"A packed sequence cannot be exported, at {location_of_caller(modules)}",
            expected="shapes that do not depend on the data",
            got="pack_padded_sequence, whose shapes depend on the lengths",
            remedy=_PACKED,
        )

    enter_inference = torch.inference_mode.__enter__

    def refuse_inference(mode: torch.inference_mode) -> None:
        frames = (frame for frame in calling_frames() if not frame.f_code.co_filename.endswith("_contextlib.py"))
        caller = next(frames)
        if outside_torch(caller.f_code):
            refuse("An inference_mode region", "use torch.no_grad() instead")
        enter_inference(mode)

    with (
        _replaced(torch.autograd.Function, "apply", classmethod(_on_this_thread(refuse_function, apply.__func__))),
        _replaced(torch.Tensor, "register_hook", _on_this_thread(refuse_hook, torch.Tensor.register_hook)),
        _replaced(
            torch.Tensor,
            "register_post_accumulate_grad_hook",
            _on_this_thread(refuse_hook, torch.Tensor.register_post_accumulate_grad_hook),
        ),
        _replaced(torch.autograd, "grad", _on_this_thread(refuse_gradient, torch.autograd.grad)),
        _replaced(torch.autograd, "backward", _on_this_thread(refuse_gradient, torch.autograd.backward)),
        _replaced(torch._VF, "_pack_padded_sequence", _on_this_thread(refuse_packing, torch._VF._pack_padded_sequence)),
        _replaced(torch.inference_mode, "__enter__", _on_this_thread(refuse_inference, enter_inference)),
    ):
        yield


@contextlib.contextmanager
def trace_data_attribute() -> Iterator[None]:
    """While active, `tensor.data` is `tensor.detach()`: the attribute would hide the tensor from tracing."""
    original: Any = torch.Tensor.data
    read = _on_this_thread(lambda tensor: tensor.detach(), original.__get__)
    with _replaced(torch.Tensor, "data", property(read, original.__set__)):
        yield


@contextlib.contextmanager
def take_masks_as_given() -> Iterator[None]:
    """While active, torch's transformer layers do not look into a mask to see whether it is causal.

    They use it as the mask that it is, which gives the same numbers; what a mask holds is not known in export.
    """
    original = transformer._detect_is_causal_mask

    def detect(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    with _replaced(transformer, "_detect_is_causal_mask", _on_this_thread(detect, original)):
        yield


@contextlib.contextmanager
def record_fixed_sizes(modules: Mapping[int, str]) -> Iterator[list[Location]]:
    """Collect the places where code makes a symbolic size a number."""
    places: list[Location] = []
    original = ShapeEnv._set_replacement

    def set_replacement(shape_env: ShapeEnv, symbol: Any, target: Any, message: str) -> None:
        if target.is_number:
            places.append(location_of_caller(modules))
        original(shape_env, symbol, target, message)

    with _replaced(ShapeEnv, "_set_replacement", _on_this_thread(set_replacement, original)):
        yield places


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute of a class or module; what it inherits comes back by deleting the replacement."""
    own = owner.__dict__.get(name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _on_this_thread(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    owner = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (replacement if threading.get_ident() == owner else original)(*args, **kwargs)

    return call


def _lost(what: str, where: Location, remedy: str) -> ModelError:
    return ModelError(
        f"{what} would be lost in export, and the model would train wrongly, at {where}",
        expected="a forward pass whose gradient follows from its operators",
        got=what,
        remedy=remedy,
    )
