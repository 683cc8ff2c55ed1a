"""The key that clients have to send, as the endpoint keeps it. Nothing that takes seconds is imported here:
`mahalo serve` looks for the key first.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass

from mahalo_ray.config import ServeConfig
from mahalo_ray.serving.schema import ApiError


@dataclass(frozen=True, repr=False)
class KeyDigest:
    """A salted digest of the key: what travels through Ray to the replicas instead of the key itself."""

    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, key: str) -> KeyDigest:
        """Digest with a fresh salt."""
        salt = os.urandom(16)
        return cls(salt, _digest(salt, key))

    @classmethod
    def from_environment(cls, config: ServeConfig) -> KeyDigest | None:
        """The digest of the key in the variable that `api_key_env` names; None if no key is configured.

        ValueError if the variable is unset or empty: an endpoint meant to be protected must not start open.
        """
        if config.api_key_env is None:
            return None
        key = os.environ.get(config.api_key_env, "").strip()
        variable = f"serve.api_key_env names the environment variable '{config.api_key_env}'"
        if not key:
            raise ValueError(
                f"{variable}, which is unset or empty: put the API key into it, or remove api_key_env to "
                "serve without a key"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                f"{variable}, and the key in it has characters that an HTTP header cannot carry: use "
                "letters, digits and signs of ASCII, without spaces"
            )
        return cls.of(key)

    def check(self, authorization: str | None) -> None:
        """Raise ApiError 401 unless the header reads `Bearer KEY` with the right key."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401,
                "this server wants an API key: send it as 'Authorization: Bearer KEY'",
                code="missing_api_key",
            )
        # Digests of equal length are compared in constant time; neither key is in the message.
        if not hmac.compare_digest(_digest(self.salt, key.strip()), self.digest):
            raise ApiError(401, "the API key is not the right one", code="invalid_api_key")


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.blake2b(key.encode(), salt=salt, digest_size=32).digest()
