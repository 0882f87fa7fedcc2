"""In which type a device computes fast enough to train."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch


@lru_cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether a device's arithmetic has bfloat16. Processors without it emulate it: matrix products then take ten times
    as long as in float32, and convolutions' gradients longer still."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # recent torch
    return device.type == "cpu" and any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def usual_device() -> torch.device:
    """The kind of device that training runs on here; asking accelerate would settle how processes talk."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast_type(precision: str, device: torch.device) -> str:
    """What the setting means on a device, "no", "fp16" or "bf16": "auto" is bf16 where the device has it, else no."""
    if precision != "auto":
        return precision
    return "bf16" if has_bfloat16(device) else "no"
