"""The coordinator's settings: flags over environment variables over a TOML file.

Made once, in `__main__.py`, and handed inward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import DirectoryPath, Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from gradwire_protocol.roles import Role
from gradwire_protocol.serving import ServiceSettings
from gradwire_protocol.settings import Settings, load_settings, tls_files, with_host_name
from gradwire_protocol.tls_files import TlsFiles


class CoordinatorSettings(Settings):
    """What `gradwire-coordinator` can be told. Environment: GRADWIRE_COORDINATOR_ and the field's name."""

    model_config = SettingsConfigDict(env_prefix="GRADWIRE_COORDINATOR_")

    listen: str = "127.0.0.1:7070"
    # HOST:PORT that others dial, in which {hostname} is this machine's name; empty: the bound address.
    advertise: str = ""
    metrics_listen: str = ""
    # Where the run log is kept; none: in a temporary directory, which goes with the process.
    state_dir: Path | None = None
    # Where servers write checkpoints, and read them: the same directory as every stage server's.
    checkpoint_root: DirectoryPath | None = None
    lease_seconds: float = Field(default=10.0, ge=1.0, le=3600.0)
    heartbeat_seconds: float = Field(default=1.0, ge=0.2, le=600.0)
    # To measure in what a new model's nodes cost, on one server of each kind of device; 0: never measure.
    profiling_seconds: float = Field(default=2.0, ge=0.0, le=60.0)
    # From SIGTERM on, for clients to finish their steps and to save.
    grace_seconds: float = Field(default=30.0, ge=0.0, le=3600.0)
    tls_authority: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False

    @field_validator("advertise")
    @classmethod
    def _with_host_name(cls, address: str) -> str:
        return with_host_name(address)

    @model_validator(mode="after")
    def _consistent(self) -> CoordinatorSettings:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("lease_seconds must be at least twice heartbeat_seconds")
        return self

    @property
    def tls(self) -> TlsFiles | None:
        """The TLS files; None for plaintext. SettingsError if some are missing."""
        return tls_files(self.tls_authority, self.tls_certificate, self.tls_key)

    def service(self, ready_fd: int | None = None) -> ServiceSettings:
        """Return what concerns every service alike."""
        return ServiceSettings(
            listen=self.listen,
            advertise=self.advertise,
            metrics_listen=self.metrics_listen,
            tls=self.tls,
            role=Role.COORDINATOR,
            insecure=self.insecure,
            ready_fd=ready_fd,
        )


def load_coordinator_settings(flags: dict[str, Any], config: Path | None) -> CoordinatorSettings:
    """Return the settings from flags (None: not given), the environment, and a TOML file; SettingsError."""
    return load_settings(CoordinatorSettings, flags, config)
