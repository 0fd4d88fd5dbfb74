"""A certificate for the loopback interface that only those who are given it believe."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from services.base import require


class Certificate(NamedTuple):
    """Files in PEM format. The certificate is its own authority, unless it was made by another's."""

    certificate: Path
    key: Path


def make_certificate(folder: Path, authority: Certificate | None = None) -> Certificate:
    """For 127.0.0.1 and localhost, valid for two days. Raises ``ServiceMissing`` without openssl."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = [require("openssl", "openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    if authority is not None:
        command += ["-CA", str(authority.certificate), "-CAkey", str(authority.key)]
    subprocess.run([*command, "-keyout", str(made.key), "-out", str(made.certificate)], check=True, capture_output=True)
    return made
