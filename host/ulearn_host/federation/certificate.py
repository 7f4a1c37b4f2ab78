"""The host's certificate: self-signed, made at the first start, kept in the job's folder and pinned by every board."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ulearn_host.errors import UserError

FILE = "host.pem"
NAME = "ulearn"  # boards check it; whatever address they reach the host by
# Boards have no clock: they start in 1970, 2000 or 2021. It ends as RFC 5280 says of what has no end (4.1.2.5).
_FROM = datetime(1970, 1, 1)
_UNTIL = datetime(9999, 12, 31, 23, 59, 59)


@dataclass(frozen=True)
class Certificate:
    """path: key and certificate, PEM; der: the certificate, as boards hold it."""

    path: Path
    der: bytes

    def context(self) -> ssl.SSLContext:
        """What a TLS server needs. TLS 1.2 is the newest that boards speak."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.load_cert_chain(self.path)
        return context


def ensure(folder: Path) -> Certificate:
    """The certificate of a job, made where there is none yet. Raises UserError for a file that holds none."""
    path = folder / FILE
    if not path.exists():
        _write(path, _made())
    try:
        der = x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)
        certificate = Certificate(path, der)
        certificate.context()
    except (ValueError, OSError) as fault:
        raise UserError(
            f"{path}: no key with its certificate ({fault}); put the file back, or remove it and enrol every board anew"
        ) from None
    return certificate


def _made() -> bytes:
    """A key on P-256, which boards' TLS knows and is quick at, and its certificate, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)  # it vouches for itself alone
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def _write(path: Path, data: bytes) -> None:
    """Whole, and for its owner alone."""
    beside = path.with_suffix(".new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
