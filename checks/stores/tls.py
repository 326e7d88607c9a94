#!/usr/bin/env python3
"""Puts TLS before a server: `tls.py HOST:PORT DIRECTORY CERTIFICATE`, with a Python that has `cryptography`.

CERTIFICATE is `valid`, for localhost; `expired`; or `misnamed`, for another host. A CA that is made for this
run signs it; DIRECTORY gets the CA's certificate as `ca.pem`. The script prints the URL to connect to, and
ends with its standard input.
"""
import asyncio
import datetime
import pathlib
import ssl
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


def write_certificates(directory, kind="valid"):
    """Writes `ca.pem`, and `server.pem` with a key and the certificate that the CA signed."""
    now = datetime.datetime.now(datetime.timezone.utc)
    host = "elsewhere.example" if kind == "misnamed" else "localhost"
    ends = now - DAY if kind == "expired" else now + DAY
    # Another name each time: with one name and several keys, clients complain of signatures.
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA of tests {x509.random_serial_number():x}"[:64])])
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def signed(name, key, until, extension):
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(authority).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - 2 * DAY).not_valid_after(until)
        made = builder.add_extension(extension, critical=False).sign(ca_key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)

    ca = signed(authority, ca_key, now + DAY, x509.BasicConstraints(ca=True, path_length=None))
    of_host = signed(x509.Name([]), key, ends, x509.SubjectAlternativeName([x509.DNSName(host)]))
    pem, pkcs8, bare = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (directory / "ca.pem").write_bytes(ca)
    (directory / "server.pem").write_bytes(key.private_bytes(pem, pkcs8, bare) + of_host)


async def copy(source, target):
    try:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    except OSError:
        pass
    finally:
        target.close()


async def main():
    server, directory, kind = sys.argv[1:]
    directory, (host, port) = pathlib.Path(directory), server.split(":")
    write_certificates(directory, kind)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem")

    async def serve(reader, writer):
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))

    front = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    print(f"https://localhost:{front.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
