"""Tells when a service's certificate ends: a metric, and a warning in its log while another one is due."""

from __future__ import annotations

import threading

import structlog
from prometheus_client import CollectorRegistry, Gauge

from gradwire_protocol.credentials import OwnCertificate

_LOOK_SECONDS = 60.0
_WARN_SECONDS = 12 * 3600.0

_log = structlog.get_logger(__name__)


class CertificateWatch:
    """A thread, from `start` to `stop`, which also takes new files up where no connection asks for them."""

    def __init__(
        self,
        certificate: OwnCertificate,
        registry: CollectorRegistry,
        *,
        look_seconds: float = _LOOK_SECONDS,
        warn_seconds: float = _WARN_SECONDS,
    ) -> None:
        self._certificate = certificate
        self._look_seconds = look_seconds
        self._warn_seconds = warn_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="certificate watch", daemon=True)
        expiry = Gauge(
            "gradwire_certificate_expiry_timestamp_seconds",
            "When this service's certificate ends, as Unix time",
            registry=registry,
        )
        expiry.set_function(lambda: certificate.current().info.not_after.timestamp())
        renewal = Gauge(
            "gradwire_certificate_renewal_timestamp_seconds",
            "From when it is time to replace this service's certificate, as Unix time",
            registry=registry,
        )
        renewal.set_function(lambda: certificate.current().info.due_at.timestamp())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _main(self) -> None:
        quiet_seconds = 0.0
        known = self._certificate.current().info
        while True:
            info = self._certificate.current().info
            if info != known:
                known = info
                _log.info("TLS files were replaced", name=info.name, until=f"{info.not_after:%Y-%m-%d %H:%M} UTC")
            if not info.is_due():
                quiet_seconds = 0.0
            elif quiet_seconds <= 0.0:
                quiet_seconds = self._warn_seconds
                _log.warning(
                    "this service's certificate ends soon",
                    name=info.name,
                    until=f"{info.not_after:%Y-%m-%d %H:%M} UTC",
                    days_left=round(info.left().total_seconds() / 86400, 1),
                    remedy="issue another with `gradwire certs rotate`: it is taken up without a restart",
                )
            if self._stop.wait(self._look_seconds):
                return
            quiet_seconds -= self._look_seconds
