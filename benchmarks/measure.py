"""What the benchmarks share: the machine and the versions that a figure belongs to, spread, and memory."""

import socket

from trainer.machine import has, machine, memory, reset_peak, spread

__all__ = ["free_port", "has", "machine", "memory", "reset_peak", "spread"]


def free_port() -> int:
    """One of this machine's that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
