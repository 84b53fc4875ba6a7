"""What can be wrong with TLS to PostgreSQL, in words: asyncpg and OpenSSL say it in theirs, or not at all.

``sslmode``, ``sslrootcert`` and the like stand in the address, or in ``PGSSLMODE`` and so on, as libpq has them.
"""

from __future__ import annotations

import os
import ssl
from urllib.parse import parse_qsl

import asyncpg

from pgmcp.store.connection.error_text import WillNotDo

VERIFYING = frozenset({"require", "verify-ca", "verify-full"})


def check(url: str) -> None:
    """Look whether the authority's certificate can be read.

    Raises:
        WillNotDo: it cannot.
    """
    named = dict(parse_qsl(url.partition("?")[2]))
    mode = named.get("sslmode") or os.environ.get("PGSSLMODE", "")
    path = named.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
    if mode in VERIFYING and path and not os.access(path, os.R_OK):
        message = f"the file {path} of sslrootcert cannot be read"
        raise WillNotDo(message)


def explained(error: Exception) -> Exception:
    """An error of a connection, in words if it is one of TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return WillNotDo(
            f"its certificate is refused ({error.verify_message.rstrip('.')}): sslrootcert must be its authority's, "
            "and with sslmode=verify-full its name must be the host of the address"
        )
    if isinstance(error, asyncpg.exceptions.ClientConfigurationError) and "root certificate" in str(error):
        return WillNotDo("sslmode asks for a check of its certificate: name the authority's in sslrootcert")
    return error
