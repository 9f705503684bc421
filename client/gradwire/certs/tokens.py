"""Join tokens: made by whoever has the authority, used once (or a few times) by who joins, and kept as hashes only.

A token is `gradwire.ROLE.CODE`; CODE holds an identifier, a secret, and the fingerprint of the authority to trust.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradwire_protocol.certificates import checked_host, checked_name
from gradwire_protocol.errors import NotAllowed, SettingsError
from gradwire_protocol.roles import MEMBERS, Role

MAXIMUM_CHARACTERS = 200
_PREFIX = "gradwire"
# A multiple of three in all: base64 needs no padding.
_IDENTIFIER_BYTES, _SECRET_BYTES, _FINGERPRINT_BYTES = 6, 25, 32
# What has expired is kept so long, to say so.
_KEPT_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class JoinToken:
    """What a token says. The role is for its reader only: the one that counts is kept with the authority."""

    role: Role
    identifier: str
    secret: bytes
    fingerprint: bytes

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read a token; SettingsError for what is none."""
        parts = text.strip().split(".")
        try:
            if len(text) > MAXIMUM_CHARACTERS or len(parts) != 3 or parts[0] != _PREFIX:
                raise ValueError("its form is another")
            role = Role(parts[1])
            code = base64.b64decode(parts[2], altchars=b"-_", validate=True)
            if role not in MEMBERS or len(code) != _IDENTIFIER_BYTES + _SECRET_BYTES + _FINGERPRINT_BYTES:
                raise ValueError("its length is another")
        except (ValueError, binascii.Error) as error:
            raise SettingsError(
                "Not a join token",
                expected="what `gradwire certs token` has printed, whole",
                got=f"{len(text)} characters: {error}",
            ) from None
        return cls(
            role=role,
            identifier=code[:_IDENTIFIER_BYTES].hex(),
            secret=code[_IDENTIFIER_BYTES:-_FINGERPRINT_BYTES],
            fingerprint=code[-_FINGERPRINT_BYTES:],
        )

    def __str__(self) -> str:
        code = bytes.fromhex(self.identifier) + self.secret + self.fingerprint
        return f"{_PREFIX}.{self.role}.{base64.urlsafe_b64encode(code).decode()}"


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What is kept of a token. expires: Unix time. name, addresses: the only ones it is for, if there are any."""

    secret_hash: str
    role: str
    expires: float
    uses: int
    name: str
    addresses: tuple[str, ...]


class TokenBook:
    """The tokens of an authority's directory. Several processes may use it at once."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory / "tokens"
        self._clock = clock

    def make(
        self,
        *,
        role: Role,
        fingerprint: bytes,
        seconds: float = 1800.0,
        uses: int = 1,
        name: str = "",
        addresses: Sequence[str] = (),
    ) -> JoinToken:
        """Make a token that may be used so often and for so long. name, addresses: all to ask for, if given."""
        token = JoinToken(
            role=role,
            identifier=secrets.token_hex(_IDENTIFIER_BYTES),
            secret=secrets.token_bytes(_SECRET_BYTES),
            fingerprint=fingerprint,
        )
        kept = _Kept(
            secret_hash=_hash(token.secret),
            role=role,
            expires=self._clock() + seconds,
            uses=uses,
            name=checked_name(name) if name else "",
            addresses=tuple(checked_host(address) for address in addresses),
        )
        with self._locked():
            self._sweep()
            self._write(token.identifier, kept)
        return token

    def use(self, token: JoinToken, name: str, addresses: Sequence[str]) -> Role:
        """Use a token up by one, and return the role that it is for; NotAllowed. name, addresses: those asked for."""
        with self._locked():
            kept = self._read(token.identifier)
            # Whoever does not know the secret is told nothing about a token.
            if kept is None or not hmac.compare_digest(kept.secret_hash, _hash(token.secret)):
                raise _refused("it is not known here")
            if kept.expires <= self._clock():
                raise _refused("it has expired")
            if kept.uses < 1:
                raise _refused("it has been used")
            if kept.role != token.role:
                raise _refused(f"it was made for the role {kept.role}, not {token.role}")
            if kept.name not in ("", name):
                raise _refused(f"it was made for the name {kept.name}, not {name}")
            others = [address for address in addresses if kept.addresses and address not in kept.addresses]
            if others:
                raise _refused(f"it is not for {', '.join(others)}, but for {', '.join(kept.addresses)}")
            self._write(token.identifier, replace(kept, uses=kept.uses - 1))
            return Role(kept.role)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SettingsError(f"Cannot keep tokens in {self._directory}", got=str(error)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _read(self, identifier: str) -> _Kept | None:
        try:
            values: dict[str, Any] = json.loads(self._path(identifier).read_text())
        except FileNotFoundError:
            return None
        return _Kept(**{**values, "addresses": tuple(values["addresses"])})

    def _write(self, identifier: str, kept: _Kept) -> None:
        path = self._path(identifier)
        made = path.with_suffix(".new")
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(kept), file)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)

    def _sweep(self) -> None:
        for path in self._directory.glob("*.json"):
            kept = self._read(path.stem)
            if kept is not None and kept.expires + _KEPT_SECONDS < self._clock():
                path.unlink(missing_ok=True)

    def _path(self, identifier: str) -> Path:
        # Hexadecimal digits, by `JoinToken.parse`.
        return self._directory / f"{identifier}.json"


def _hash(secret: bytes) -> str:
    # 25 random bytes: nothing to guess, so no slow hash is needed.
    return hashlib.sha256(secret).hexdigest()


def _refused(reason: str) -> NotAllowed:
    return NotAllowed(
        "The join token is refused",
        expected="one that is unused, in time, and for this role, name and addresses",
        got=reason,
        remedy="make another with `gradwire certs token DIR --role …`",
    )
