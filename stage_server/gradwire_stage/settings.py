"""What a stage server can be told: flags over GRADWIRE_STAGE_* variables over a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from gradwire_protocol.channels import TlsFiles, parse_address
from gradwire_protocol.errors import GradwireError, SettingsError
from gradwire_protocol.serving import ServiceSettings

# Each stream of tensors, in either traffic class, keeps a thread of the pool while it is open.
_WORKERS = 512


class StageSettings(BaseSettings):
    """Settings of one stage server. Sizes are in bytes; 0 means a share of the device's memory."""

    model_config = SettingsConfigDict(env_prefix="GRADWIRE_STAGE_", extra="forbid", frozen=True)

    listen: str = "127.0.0.1:0"
    advertise: str = ""
    coordinator: str
    metrics_listen: str = "127.0.0.1:0"
    device: str = "auto"
    # Compute threads.
    threads: int = Field(default=1, ge=1, le=1024)
    # Identifier; made up if empty.
    server: str = Field(default="", max_length=64)
    # Messages that wait to be taken; half of the memory.
    mailbox_bytes: int = Field(default=0, ge=0)
    # Results that wait to be collected; a quarter of the memory.
    outbox_bytes: int = Field(default=0, ge=0)
    # The largest single tensor that is taken.
    tensor_bytes: int = Field(default=8 * 2**30, ge=1)
    tls_authority: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    ready_fd: int | None = Field(default=None, ge=0)

    @field_validator("listen", "coordinator")
    @classmethod
    def _is_address(cls, address: str) -> str:
        return _checked(address)

    @field_validator("advertise", "metrics_listen")
    @classmethod
    def _is_address_or_empty(cls, address: str) -> str:
        return _checked(address) if address else address

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings

    @model_validator(mode="after")
    def _has_all_tls_files_or_none(self) -> StageSettings:
        files = (self.tls_authority, self.tls_certificate, self.tls_key)
        if any(files) and not all(files):
            raise ValueError("TLS needs three files: authority, certificate and key")
        return self

    @property
    def tls(self) -> TlsFiles | None:
        """The TLS files; None for plaintext."""
        if self.tls_authority and self.tls_certificate and self.tls_key:
            return TlsFiles(authority=self.tls_authority, certificate=self.tls_certificate, key=self.tls_key)
        return None

    def service(self) -> ServiceSettings:
        """Return what concerns every service alike."""
        return ServiceSettings(
            listen=self.listen,
            advertise=self.advertise,
            metrics_listen=self.metrics_listen,
            tls=self.tls,
            insecure=self.insecure,
            ready_fd=self.ready_fd,
            workers=_WORKERS,
        )


def _checked(address: str) -> str:
    try:
        parse_address(address)
    except GradwireError as error:
        raise ValueError(str(error)) from error
    return address


def load_settings(flags: dict[str, Any], file: Path | None) -> StageSettings:
    """Merge the sources; flags that were not given (None) leave the choice to the others. SettingsError."""
    given = {name: value for name, value in flags.items() if value is not None}
    kind: type[StageSettings] = StageSettings
    if file is not None:
        if not file.is_file():
            raise SettingsError(f"There is no settings file {file}")

        class _WithFile(StageSettings):
            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], *args: Any, **sources: Any
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                first = super().settings_customise_sources(settings_cls, *args, **sources)
                return *first, TomlConfigSettingsSource(settings_cls, toml_file=file)

        kind = _WithFile
    try:
        return kind(**given)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"The settings file {file} is not TOML", got=str(error)) from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}" for item in error.errors()
        )
        raise SettingsError("The settings of the stage server are wrong", got=problems) from error
