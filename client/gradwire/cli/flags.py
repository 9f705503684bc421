"""Flags made from a settings class: one for each field, so that names, types and help are written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Union, get_args

import typer
from pydantic_settings import BaseSettings


def with_flags(
    settings: type[BaseSettings], defaults: Mapping[str, Any], only: Collection[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, whose last parameter is **flags, one optional flag for each field of `settings`, or for some.

    A flag that was not given arrives as None. `defaults` are shown in the help only.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        fields = {name: field for name, field in settings.model_fields.items() if only is None or name in only}
        made = [_parameter(name, field, defaults.get(name)) for name, field in fields.items()]

        def wrapper(**given: Any) -> None:
            command(**given)

        wrapper.__name__ = command.__name__
        wrapper.__doc__ = command.__doc__
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own + made]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def _parameter(name: str, field: Any, default: Any) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    if field.annotation is bool:
        flag += "/--no-" + name.replace("_", "-")
    shown = str(default) if default is not None else False
    option = typer.Option(flag, help=field.description, show_default=shown)
    kind = field.annotation if type(None) in get_args(field.annotation) else Union[field.annotation, None]  # noqa: UP007
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
