"""Does what cert-manager does with a Certificate resource and an issuer of the kind CA: the secret's three files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gradwire.certs.authority import Authority

_EXTENDED = {"client auth": ExtendedKeyUsageOID.CLIENT_AUTH, "server auth": ExtendedKeyUsageOID.SERVER_AUTH}
# Of a key's usages, which a resource may name: as cryptography calls them.
_USAGES = {"digital signature": "digital_signature", "key encipherment": "key_encipherment"}
_ALL_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
_FORMATS = {"PKCS8": PrivateFormat.PKCS8, "PKCS1": PrivateFormat.TraditionalOpenSSL}
_CURVES = {256: ec.SECP256R1}


def issue(resource: Mapping[str, Any], authority: Authority, folder: Path) -> Path:
    """Write tls.crt, tls.key and ca.crt for a Certificate into a folder, and return it."""
    spec = resource["spec"]
    if spec["privateKey"]["algorithm"] != "ECDSA":
        raise ValueError(f"this issuer makes no {spec['privateKey']['algorithm']} keys")
    key = ec.generate_private_key(_CURVES[spec["privateKey"]["size"]]())
    now = datetime.now(UTC)
    names: list[x509.GeneralName] = [
        *map(x509.DNSName, spec.get("dnsNames", ())),
        *(x509.IPAddress(ip_address(number)) for number in spec.get("ipAddresses", ())),
        *map(x509.UniformResourceIdentifier, spec.get("uris", ())),
    ]
    usages = {_USAGES[usage] for usage in spec["usages"] if usage not in _EXTENDED}
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, spec["commonName"])]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + _duration(spec["duration"]))
        .add_extension(x509.BasicConstraints(ca=spec.get("isCA", False), path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{usage: usage in usages for usage in _ALL_USAGES}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_EXTENDED[u] for u in spec["usages"] if u in _EXTENDED]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    folder.mkdir(parents=True)
    private = key.private_bytes(Encoding.PEM, _FORMATS[spec["privateKey"]["encoding"]], NoEncryption())
    files = {
        "tls.crt": certificate.public_bytes(Encoding.PEM),
        "tls.key": private,
        "ca.crt": authority.certificate.public_bytes(Encoding.PEM),
    }
    for name, content in files.items():
        path = folder / name
        path.write_bytes(content)
        # As Kubernetes does for a group that may read: defaultMode of the chart's volumes.
        path.chmod(0o440)
    return folder


def _duration(text: str) -> timedelta:
    """Read Go's notation, "2160h" or "1h30m"."""
    parts = {"h": "hours", "m": "minutes", "s": "seconds"}
    return timedelta(**{parts[unit]: int(number) for number, unit in re.findall(r"(\d+)([hms])", text)})
