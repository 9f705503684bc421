"""The coordinator's settings: flags over environment variables over a TOML file.

Made once, in `__main__.py`, and handed inward.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from gradwire_protocol.channels import TlsFiles
from gradwire_protocol.errors import SettingsError

ENVIRONMENT_PREFIX = "GRADWIRE_COORDINATOR_"


class CoordinatorSettings(BaseSettings):
    """What `gradwire-coordinator` can be told. Environment: GRADWIRE_COORDINATOR_ and the field's name."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, frozen=True, extra="forbid")

    listen: str = "127.0.0.1:7070"
    # HOST:PORT that others dial; empty: the bound address.
    advertise: str = ""
    metrics_listen: str = ""
    # Where the run log is kept; none: in a temporary directory, which goes with the process.
    state_dir: Path | None = None
    lease_seconds: float = Field(default=10.0, ge=1.0, le=3600.0)
    heartbeat_seconds: float = Field(default=2.0, ge=0.2, le=600.0)
    tls_authority: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> CoordinatorSettings:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("lease_seconds must be at least twice heartbeat_seconds")
        given = [path is not None for path in (self.tls_authority, self.tls_certificate, self.tls_key)]
        if any(given) and not all(given):
            raise ValueError("tls_authority, tls_certificate and tls_key belong together: give all three, or none")
        return self

    @property
    def tls(self) -> TlsFiles | None:
        """The TLS files, if they are given."""
        if self.tls_authority is None or self.tls_certificate is None or self.tls_key is None:
            return None
        return TlsFiles(authority=self.tls_authority, certificate=self.tls_certificate, key=self.tls_key)


def load_settings(flags: dict[str, Any], config: Path | None) -> CoordinatorSettings:
    """Return the settings from flags (None: not given), the environment, and a TOML file; SettingsError."""

    class FromFile(CoordinatorSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if config is None:
                return init_settings, env_settings
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config)

    if config is not None and not config.is_file():
        raise SettingsError(f"There is no settings file {config}", remedy="check --config")
    try:
        return FromFile(**{name: value for name, value in flags.items() if value is not None})
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"The settings file {config} is not TOML", got=str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the settings together"
        raise SettingsError(
            f"Wrong setting: {field}",
            expected=first["msg"],
            got=repr(first["input"]) if first["loc"] else "",
            remedy=f"flags go over the environment ({ENVIRONMENT_PREFIX}…), and that over the file: check all three",
        ) from error
