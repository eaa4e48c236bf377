"""A proxy that ends TLS in front of a local server, as a site's web server does in front of Prefect."""

import datetime
import ipaddress
import select
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class TlsProxy:
    """Forwards TLS connections to a port of this machine, and answers 503 while nothing listens there.

    Attributes:
        port: its own port.
        certificate: its certificate, which no authority has signed.
    """

    def __init__(self, folder: Path, target: int) -> None:
        self.certificate, key = folder / "certificate.pem", folder / "key.pem"
        _write_certificate(self.certificate, key)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certificate, key)
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(connection,), daemon=True).start()

    def _forward(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            client = self._context.wrap_socket(connection, server_side=True)
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.recv(65536)
                client.sendall(_UNAVAILABLE)
                return
            with server:
                _exchange(client, server)


def _exchange(client: ssl.SSLSocket, server: socket.socket) -> None:
    """Pass on what each side sends, until one closes."""
    other: dict[socket.socket, socket.socket] = {client: server, server: client}
    while True:
        ready: list[socket.socket] = [client] if client.pending() else select.select(list(other), [], [])[0]
        for side in ready:
            data = side.recv(65536)
            if not data:
                return
            other[side].sendall(data)


def _write_certificate(certificate: Path, key: Path) -> None:
    """Write a certificate of localhost, signed by itself, and its key."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
