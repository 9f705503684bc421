"""Building a model without memory for its parameters, while everything that no weight file holds stays real."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakIdKeyDictionary


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """While active, parameters that this thread gives to modules have no memory; buffers are built as usual.

    For models that are too big for this machine, whose weights come with `weights=`. `torch.device("meta")` would also
    empty tables that no weight file holds (rotary embeddings, masks). A parameter takes its memory for the moment
    in which it is made: not touched, where it is made with torch.empty, as torch's own layers do.
    """
    owner = threading.get_ident()
    # A parameter may be given to a second module before it is seen again: the ties stay.
    moved = WeakIdKeyDictionary()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != owner or parameter.is_meta or isinstance(parameter, UninitializedParameter):
            return None
        if parameter not in moved:
            # The class and the marks of a subclass or library stay.
            empty = type(parameter)(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            empty.__dict__.update(parameter.__dict__)
            moved[parameter] = empty
        emptied: nn.Parameter = moved[parameter]
        return emptied

    # torch takes what the hook returns in the parameter's place; its annotation says otherwise.
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
