"""Whether forward passes run in bf16."""

import torch


def use_bf16(precision: str, device: torch.device | str) -> bool:
    """Resolves `run.precision` for a device: auto is bf16 where there are instructions for it.

    On a GPU (not yet run): compute capability 8.0, Ampere, and later. On a CPU: AVX-512 bf16 or AMX.
    """
    if precision != "auto":
        return precision == "bf16"
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
