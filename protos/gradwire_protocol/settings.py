"""How every program takes its settings: flags over environment variables over a TOML file over built-in values.

Each program's own fields are a subclass of `Settings`; `load_settings` merges the sources and words what is wrong.
"""

from __future__ import annotations

import socket
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from gradwire_protocol.errors import SettingsError
from gradwire_protocol.tls_files import TlsFiles

# What files and built-in values say, for the one call of `load_settings` in progress: pydantic-settings makes its
# sources by itself.
_lower_sources: ContextVar[tuple[Mapping[str, Any], ...]] = ContextVar("lower_sources", default=())


class Settings(BaseSettings):
    """Base of a program's settings. Subclasses set `model_config`'s env_prefix."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, then what `load_settings` adds."""
        lower = (InitSettingsSource(settings_cls, init_kwargs=dict(values)) for values in _lower_sources.get())
        return (init_settings, env_settings, *lower)


Kind = TypeVar("Kind", bound=Settings)


def load_settings(
    kind: type[Kind], flags: Mapping[str, Any], file: Path | None, built_in: Mapping[str, Any] | None = None
) -> Kind:
    """Merge the sources of settings; flags that are None were not given. SettingsError names each wrong value."""
    token = _lower_sources.set((_read(file), built_in or {}))
    try:
        return kind(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()]
        prefix = kind.model_config.get("env_prefix", "")
        raise SettingsError(
            "The settings are not valid",
            got="; ".join(problems),
            remedy=f"correct the flag, the environment variable {prefix}…, or the settings file",
        ) from None
    finally:
        _lower_sources.reset(token)


def with_host_name(address: str) -> str:
    """Return an address with this machine's name in place of {hostname}: one setting for many alike containers."""
    return address.replace("{hostname}", socket.gethostname())


def tls_files(authority: Path | None, certificate: Path | None, key: Path | None) -> TlsFiles | None:
    """Return the TLS files, None if there are none; SettingsError if some are missing."""
    if authority is not None and certificate is not None and key is not None:
        return TlsFiles(authority=authority, certificate=certificate, key=key)
    if authority is None and certificate is None and key is None:
        return None
    raise SettingsError(
        "Mutual TLS needs three files", expected="--tls-authority, --tls-certificate and --tls-key", got="some of them"
    )


def _read(file: Path | None) -> Mapping[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The settings file {file} cannot be read", expected="a TOML file of settings", got=str(error)
        ) from error


def _problem(item: Any) -> str:
    where = ".".join(map(str, item["loc"]))
    return f"{where}: {item['msg']} (got {item['input']!r})" if where else str(item["msg"])
