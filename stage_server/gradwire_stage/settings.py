"""What a stage server can be told: flags over GRADWIRE_STAGE_* variables over a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import DirectoryPath, Field, field_validator
from pydantic_settings import SettingsConfigDict

from gradwire_protocol.channels import TlsFiles, parse_address
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.serving import ServiceSettings
from gradwire_protocol.settings import Settings, load_settings, tls_files

# Each stream of tensors, in either traffic class, keeps a thread of the pool while it is open.
_WORKERS = 512


class StageSettings(Settings):
    """Settings of one stage server. Sizes are in bytes; 0 means a share of the device's memory."""

    model_config = SettingsConfigDict(env_prefix="GRADWIRE_STAGE_")

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
    # Where runs may have this server read weights from safetensors files.
    weights_root: DirectoryPath | None = None
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

    @property
    def tls(self) -> TlsFiles | None:
        """The TLS files; None for plaintext. SettingsError if some are missing."""
        return tls_files(self.tls_authority, self.tls_certificate, self.tls_key)

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


def load_stage_settings(flags: dict[str, Any], file: Path | None) -> StageSettings:
    """Merge the sources; flags that were not given (None) leave the choice to the others. SettingsError."""
    return load_settings(StageSettings, flags, file)
