"""What whoever runs the service may choose. Light: the command line builds its options from it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from qformers.errors import ConfigError
from qformers.models.config import Dtype


@dataclass(frozen=True)
class ServeConfig:
    """Where the service listens, and the limits that keep it answering."""

    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs a token."""
    port: int = 8000
    """0: any that is free; the log says which."""
    token: str | None = None
    """Clients must send it (Authorization: Bearer TOKEN). Better given as QFORMERS_TOKEN than on the command line."""
    dtype: Dtype = "float32"
    """Of all weights; auto: as saved. In half precision near-ties may fall otherwise in a batch than alone."""
    max_batch: int = 32
    """Pictures or pairs that share a forward pass; 1: no batching."""
    batch_window_seconds: float = 0.03
    """How long the first of a batch waits for others, while fewer have come than shared the last one."""
    max_requests: int = 64
    """Waiting or running at the same time; one more is told to come again (503)."""
    time_limit_seconds: float = 60.0
    """For one request, its upload included."""
    drain_seconds: float = 60.0
    """On SIGTERM, how long those that are running may take to finish."""
    max_body_bytes: int = 20_000_000
    """Of one request."""
    max_waiting_bytes: int = 256_000_000
    """Of all requests that are being read or answered."""
    max_pixels: int = 40_000_000
    """Width × height of one picture, checked before it is decoded."""
    kept_features_bytes: int = 256_000_000
    """Patch embeddings of the pictures asked about last, kept for the next question; 0: none."""

    def __post_init__(self) -> None:
        if not self.is_local and not self.token:
            raise ConfigError(
                f"host {self.host} lets other machines in: set a token (QFORMERS_TOKEN or --token), or serve 127.0.0.1"
            )
        if self.token is not None and (len(self.token) < 8 or not self.token.isascii() or not self.token.isprintable()):
            raise ConfigError(
                "the token must be at least 8 printable ASCII characters: anyone could guess a shorter one"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}: must be 0 to 65535")
        for name in ("max_batch", "max_requests", "time_limit_seconds", "max_body_bytes", "max_waiting_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be above 0")
        for name in ("batch_window_seconds", "drain_seconds", "kept_features_bytes", "max_pixels"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must not be below 0")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the host."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
