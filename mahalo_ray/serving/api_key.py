"""The keys that clients have to send, as the endpoint keeps them, and how often one of them may ask. Nothing
that takes seconds is imported here: `mahalo serve` looks for the keys first.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from dataclasses import dataclass

from mahalo_ray.config import ServeConfig
from mahalo_ray.serving.schema import ApiError


@dataclass(frozen=True, repr=False)
class KeyDigests:
    """Salted digests of the keys: what travels through Ray to the replicas instead of the keys themselves."""

    salt: bytes
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, *keys: str) -> KeyDigests:
        """Digests with a fresh salt."""
        salt = os.urandom(16)
        return cls(salt, tuple(_digest(salt, key) for key in dict.fromkeys(keys)))

    @classmethod
    def configured(cls, config: ServeConfig) -> KeyDigests | None:
        """The digests of the keys in the variable `api_key_env` (separated by commas) and in the file
        `api_key_file` (one a line); None if neither is configured.

        ValueError if the variable or file has no key, or one that no client could send: an endpoint meant to
        be protected must not start open.
        """
        keys: list[str] = []
        if config.api_key_env is not None:
            name = f"serve.api_key_env names the environment variable '{config.api_key_env}'"
            keys += _checked(os.environ.get(config.api_key_env, "").split(","), name, "api_key_env")
        if config.api_key_file is not None:
            name = f"serve.api_key_file names the file '{config.api_key_file}'"
            try:
                with open(config.api_key_file, encoding="utf-8") as file:
                    lines = [line for line in file.read().splitlines() if not line.lstrip().startswith("#")]
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{name}, which cannot be read: {error}") from error
            keys += _checked(lines, name, "api_key_file")
        return cls.of(*keys) if keys else None

    def check(self, authorization: str | None) -> int:
        """The number of the key in a header `Bearer KEY`; ApiError 401 unless it is one of the right ones."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401,
                "this server wants an API key: send it as 'Authorization: Bearer KEY'",
                code="missing_api_key",
            )
        # Each comparison takes constant time, and all are made; no key is in the message.
        sent = _digest(self.salt, key.strip())
        equal = [hmac.compare_digest(sent, digest) for digest in self.digests]
        if not any(equal):
            raise ApiError(401, "the API key is not the right one", code="invalid_api_key")
        return equal.index(True)


def _checked(given: list[str], source: str, field: str) -> list[str]:
    keys = [key.strip() for key in given if key.strip()]
    if not keys:
        raise ValueError(
            f"{source}, which is unset or empty: put an API key into it, or remove {field} to serve without "
            "a key"
        )
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                f"{source}, and the key in it has characters that an HTTP header cannot carry: use "
                "letters, digits and signs of ASCII, without spaces"
            )
    return keys


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.blake2b(key.encode(), salt=salt, digest_size=32).digest()


class RateLimiter:
    """At most `per_minute` requests of each key in any minute's time, as a bucket that fills evenly (None: no
    limit). Not for several threads."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._buckets: dict[int, tuple[float, float]] = {}  # requests left, and when that was

    def take(self, key: int) -> None:
        """Count a request of this key; ApiError 429 with Retry-After if it is one too many."""
        if self._per_minute is None:
            return
        now, limit = time.monotonic(), float(self._per_minute)
        left, then = self._buckets.get(key, (limit, now))
        left = min(limit, left + (now - then) * limit / 60)
        self._buckets[key] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            message = f"more than {self._per_minute} requests in a minute: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=(1 - left) * 60 / limit)
