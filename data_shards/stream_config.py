"""Settings of reading shards from a store (URLs) or a slow mounted disk."""

import math
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True, frozen=True)
class StreamConfig:
    cache_dir: Path | None = None
    """Folder on a fast local disk that all ranks of a machine share; None: facescale in $XDG_CACHE_HOME or ~/.cache."""
    cache_gb: float = 20.0
    """GB (10^9 bytes) that the cache may take on the disk, byte indexes included; what was used longest ago goes first. 0 keeps
    the indexes alone."""
    cache_local: bool = False
    """Shards that lie in a folder are cached, too: for a slow mounted disk."""
    read_ahead_batches: int = 8
    """Batches that are fetched before they are needed."""
    connections: int = 16
    """Ranges that each rank fetches at once."""
    coalesce_kb: int = 64
    """Gap, in kB, up to which neighbouring ranges of a shard are fetched as one."""
    retries: int = 4
    """Further attempts after a failed one, for each range; then the run ends."""
    backoff_s: float = 0.5
    """Seconds before the first further attempt; doubled for each one after it, up to 30, and cut at random by up to half."""
    timeout_s: float = 30.0
    """Seconds that an attempt may take before it counts as failed."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("cache_gb", 0, 1e6),
            ("read_ahead_batches", 1, 1000),
            ("connections", 1, 256),
            ("coalesce_kb", 0, 100_000),
            ("retries", 0, 100),
            ("backoff_s", 0, 30),
            ("timeout_s", 0.1, 300),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and least <= value <= most):
                raise ValueError(f"data.stream.{name} is {value}; allowed is {least} to {most:,.0f}")

    @property
    def folder(self) -> Path:
        """Where the cache lies."""
        return self.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "facescale"

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_gb * 1e9)
