"""Certificates for the tests of mutual TLS: an authority of a minute's life, and what it signs.

Real X.509 from the `cryptography` library, because what is tested is the handshake of the programs
as they are; nothing here is used outside tests.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import NameOID

LIFE = timedelta(hours=1)
PEM = serialization.Encoding.PEM
Key = (
    ec.EllipticCurvePrivateKey
    | rsa.RSAPrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
)


@dataclass(frozen=True, slots=True)
class Files:
    """The three PEM files that a program is given."""

    cert: Path
    key: Path
    ca: Path

    def config(self) -> dict[str, str]:
        """As fields of either program's configuration."""
        return {"tls_cert": str(self.cert), "tls_key": str(self.key), "tls_ca": str(self.ca)}

    def flags(self) -> list[str]:
        """As flags of the command line."""
        return [f"--{name.replace('_', '-')}={path}" for name, path in self.config().items()]

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel of our own."""
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes()
        )

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server of our own, which asks each client for a certificate."""
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.cert.read_bytes())],
            root_certificates=self.ca.read_bytes(),
            require_client_auth=True,
        )


class Authority:
    """Signs certificates for programs on this machine, and for their users."""

    def __init__(self, directory: Path, left: timedelta = LIFE) -> None:
        directory.mkdir(mode=0o700)
        self._left = left
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(f"authority {directory.name}")
        self.path = directory / "ca.pem"
        self.vouch_for(self)

    def vouch_for(self, other: "Authority") -> None:
        """That the other is one: below this one, or by its own word."""
        certificate = (
            self._builder(other._name, other._key, self._left)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        other.path.write_bytes(certificate.public_bytes(PEM))

    def issue(
        self,
        name: str,
        key: Key | None = None,
        host: str = "127.0.0.1",
        left: timedelta = LIFE,
    ) -> Files:
        """A certificate with this common name, good for 127.0.0.1 on either side of a call; with
        another `host`, for a server there alone. Less than nothing `left`: it has expired. The
        files of the same name are written over."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        addresses = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        addresses = addresses if host == "127.0.0.1" else [x509.DNSName(host)]
        certificate = (
            self._builder(_named(name), key, left)
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        cert, secret = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        cert.write_bytes(certificate.public_bytes(PEM))
        secret.touch(mode=0o600)
        secret.write_bytes(
            key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return Files(cert, secret, self.path)

    def _builder(self, subject: x509.Name, key: Key, left: timedelta) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * LIFE)
            .not_valid_after(now + left)
        )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
