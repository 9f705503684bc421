"""What a stage server can be told: flags over GRADWIRE_STAGE_* variables over a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import DirectoryPath, Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from gradwire_protocol.channels import parse_address
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.roles import Role
from gradwire_protocol.serving import ServiceSettings
from gradwire_protocol.settings import Settings, load_settings, tls_files, with_host_name
from gradwire_protocol.tls_files import TlsFiles


class StageSettings(Settings):
    """Settings of one stage server, or parameter server. Sizes are in bytes; 0 means a share of the device's memory."""

    model_config = SettingsConfigDict(env_prefix="GRADWIRE_STAGE_")

    # What runs may take it for.
    role: Literal["stage", "parameter"] = "stage"
    listen: str = "127.0.0.1:0"
    # HOST:PORT that others dial, in which {hostname} is this machine's name; empty: the bound address.
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
    # Messages of one stream that wait to be taken, before it is held back.
    credit_bytes: int = Field(default=64 * 2**20, ge=1)
    # Messages on a stream to a peer that it has not receipted, before computing waits for it.
    send_bytes: int = Field(default=128 * 2**20, ge=1)
    # Results that wait to be collected; a quarter of the memory.
    outbox_bytes: int = Field(default=0, ge=0)
    # The largest single tensor that is taken.
    tensor_bytes: int = Field(default=8 * 2**30, ge=1)
    # Where runs may have this server read weights from safetensors files.
    weights_root: DirectoryPath | None = None
    # Where runs may have this server write checkpoints, and read them: the same directory as the coordinator's.
    checkpoint_root: DirectoryPath | None = None
    # Modules to import at start, for the custom operators that they define: [DIRECTORY/]MODULE. In the environment
    # separated by commas.
    operators: Annotated[tuple[str, ...], NoDecode] = ()
    # Payloads of this size and larger go through memory to servers of the same host, user and directory.
    shared_memory: bool = True
    shared_memory_threshold_bytes: int = Field(default=256 * 2**10, ge=1)
    # What is held for that, in all; a sixteenth of the host's memory.
    shared_memory_bytes: int = Field(default=0, ge=0)
    # Where servers that share memory find each other; the system's directory for temporary files.
    shared_memory_directory: DirectoryPath | None = None
    # From SIGTERM on, for the run's client to finish its step and to save.
    grace_seconds: float = Field(default=30.0, ge=0.0, le=3600.0)
    tls_authority: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    ready_fd: int | None = Field(default=None, ge=0)

    @field_validator("operators", mode="before")
    @classmethod
    def _split(cls, modules: Any) -> Any:
        return [item.strip() for item in modules.split(",") if item.strip()] if isinstance(modules, str) else modules

    @field_validator("listen", "coordinator")
    @classmethod
    def _is_address(cls, address: str) -> str:
        return _checked(address)

    @field_validator("advertise", "metrics_listen")
    @classmethod
    def _is_address_or_empty(cls, address: str) -> str:
        return _checked(with_host_name(address)) if address else address

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
            role=Role(self.role),
            insecure=self.insecure,
            ready_fd=self.ready_fd,
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
