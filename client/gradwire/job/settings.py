"""The main job's settings: flags over environment over a TOML file over the reference job. Imports no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from gradwire_protocol.channels import TlsFiles
from gradwire_protocol.errors import SettingsError

ENVIRONMENT_PREFIX = "GRADWIRE_"

# What the files say, for the one call of `load_settings` in progress: pydantic-settings makes its sources by itself.
_files: ContextVar[tuple[dict[str, Any], ...]] = ContextVar("files", default=())


class JobSettings(BaseSettings):
    """Everything that `gradwire train` can be told. Fields without a default have it in the reference job's file."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True)

    data: Path | None = Field(None, description="File or folder with text [default: Python's standard library]")
    layers: int = Field(ge=1, description="Layers of the GPT")
    width: int = Field(ge=1, description="Width of its residual stream")
    heads: int = Field(ge=1, description="Attention heads a layer")
    context: int = Field(ge=2, description="Bytes that the model sees")
    batch: int = Field(ge=1, description="Windows of text a step")
    steps: int = Field(ge=1, description="Training steps")
    lr: float = Field(gt=0, description="Peak learning rate")
    warmup_steps: int = Field(ge=0, description="Steps of linear warm-up")
    weight_decay: float = Field(ge=0, description="AdamW's weight decay, of matrices only")
    max_grad_norm: float | None = Field(gt=0, description="Clip the gradient's global norm to this")
    seed: int = Field(ge=0, lt=2**63, description="Of the first weights and of the order of the text")
    stages: int = Field(ge=1, description="Pipeline stages")
    microbatches: int = Field(ge=1, description="Micro-batches a step")
    schedule: Literal["auto", "gpipe", "1f1b"] = Field(description="Order of the work in each stage")
    window: int = Field(ge=1, le=16, description="Steps in flight")
    threads: int = Field(ge=1, description="Compute threads of each stage server of the local cluster")
    evaluate_every: int = Field(ge=1, description="Steps between validations")
    validation_windows: int = Field(ge=1, description="Windows of held-out text a validation")
    check: bool = Field(description="End with the comparison of one step with one process")
    coordinator: str | None = Field(None, description="HOST:PORT of a running coordinator [default: a local cluster]")
    tls_authority: Path | None = Field(None, description="PEM file of the authority that both sides trust")
    tls_certificate: Path | None = Field(None, description="PEM file of this client's certificate")
    tls_key: Path | None = Field(None, description="PEM file of this client's key")
    insecure: bool = Field(False, description="Allow plaintext off loopback, on a network that you trust")
    out: Path | None = Field(None, description="Run directory to make [default: runs/<time>]")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the files behind flags and environment."""
        files = (InitSettingsSource(settings_cls, init_kwargs=values) for values in _files.get())
        return (init_settings, env_settings, *files)


def reference_values() -> dict[str, Any]:
    """Return the values of the reference job (examples/reference.toml)."""
    return tomllib.loads(resources.files("gradwire.job").joinpath("reference.toml").read_text())


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> JobSettings:
    """Return the settings for the flags that were given (None: not given). SettingsError names each wrong value."""
    token = _files.set((_read_file(config), reference_values()))
    try:
        return JobSettings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise _readable(error) from None
    finally:
        _files.reset(token)


def _read_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The settings file {path} cannot be read",
            expected="a TOML file with the settings of `gradwire train`, such as examples/reference.toml",
            got=str(error),
        ) from error


def _readable(error: ValidationError) -> SettingsError:
    problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']} (got {item['input']!r})" for item in error.errors()]
    return SettingsError(
        "The settings are not valid",
        got="; ".join(problems),
        remedy=f"correct the flag, the environment variable {ENVIRONMENT_PREFIX}… or the settings file",
    )


def tls_files(authority: Path | None, certificate: Path | None, key: Path | None) -> TlsFiles | None:
    """Return the TLS files, None if there are none; SettingsError if some are missing."""
    if authority is not None and certificate is not None and key is not None:
        return TlsFiles(authority=authority, certificate=certificate, key=key)
    if authority is None and certificate is None and key is None:
        return None
    raise SettingsError(
        "Mutual TLS needs three files", expected="--tls-authority, --tls-certificate and --tls-key", got="some of them"
    )


def write_toml(values: Mapping[str, Any]) -> str:
    """Return flat settings as TOML; what is None is left out."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in values.items() if value is not None)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # TOML's basic strings escape as JSON's do.
    return json.dumps(str(value), ensure_ascii=False)
