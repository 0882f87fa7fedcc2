"""The scan of Mamba-2 (state space duality, 2405.21060): one linear recurrence per head, with its state in your hands.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,        y_t = S_t C_t + D x_t

Three ways to compute it, the same in exact arithmetic: token by token, in chunks of matrix products, and by
mamba-ssm's kernels. Knows no model.

Letters: batch b, tokens T, heads H, channels per head P, state size N. The state is a head's (P, N) matrix.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vgen.types import SettingError

METHODS = ("auto", "sequential", "chunked", "mamba-ssm")
VARIABLE = "VGEN_SCAN"  # environment variable that says what "auto" means
CHUNK = 64  # tokens per chunk: a chunk's decay matrices, H Q^2 numbers, still fit a core's cache
TOLERANCE = 1e-2  # mamba-ssm's kernels multiply in TF32 by default


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan T tokens from a state: x (b, T, H, P) -> y (b, T, H, P), at least float32, and the state after the last.

    Args:
        dt: step sizes (b, T, H), not negative, at least float32.
        A: rates (H,), negative, at least float32.
        B, C: what is written with and read with, (b, T, N), shared by all heads.
        D: weight of the direct path (H,); None for none.
        state: (b, H, P, N) in float32 (float64 where x is); None is zero. It is not written to.
        method: "sequential", "chunked", "mamba-ssm" or "auto": mamba-ssm's kernels for tensors on CUDA where they
            work, else "chunked"; the environment variable VGEN_SCAN overrides "auto".

    Differentiable in every tensor. Scanning a sequence piece by piece, passing the state on, equals scanning it whole.
    Raises SettingError for an unknown method, or for "mamba-ssm" where its kernels cannot serve.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[-1], dtype=wide)
    way = {"sequential": sequential, "chunked": chunked, "mamba-ssm": _by_kernels}[choose(method, x.device)]
    with _full_precision(x.device):
        y, state = way(x, dt.to(wide), A.to(wide), B.to(x.dtype), C.to(x.dtype), state)
        return (y if D is None else y + x * D.to(wide)[:, None]).to(wide), state


def choose(method: str, device: torch.device) -> str:
    """The method that "auto" stands for on a device, and any other one itself. Raises as `scan`."""
    named = f"scan method {method!r}"
    if method == "auto" and (given := os.environ.get(VARIABLE)):
        method, named = given, f"{VARIABLE}={given}"
    if method not in METHODS:
        raise SettingError(f"unknown {named}: use one of {', '.join(METHODS)}")
    if method == "auto":
        return "chunked" if kernels(device)[0] is None else "mamba-ssm"
    if method == "mamba-ssm" and kernels(device)[0] is None:
        raise SettingError(f"{named} cannot be had, {kernels(device)[1]}: use chunked")
    return method


def sequential(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, token by token and without the direct path: the reference for the others."""
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]  # (b, H, 1, 1)
        written = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]  # (b, H, P, N)
        state = decay * state + written
        outputs.append((state @ C[:, t, None, :, None].to(state.dtype))[..., 0])
    return torch.stack(outputs, dim=1) if outputs else x.to(state.dtype), state


def chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The same as matrix products over chunks of `size` tokens, passing the state from chunk to chunk."""
    outputs = []
    for start in range(0, x.shape[1], size):
        part = slice(start, start + size)
        y, state = _chunk(x[:, part], dt[:, part], A, B[:, part], C[:, part], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1) if outputs else x.to(state.dtype), state


def _chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of Q tokens. With a_i = sum_{j <= i} dt_j A:

    y_i = sum_{j <= i} exp(a_i - a_j) (C_i . B_j) dt_j x_j + exp(a_i) S C_i
    S'  = exp(a_Q) S + sum_j exp(a_Q - a_j) dt_j x_j B_j^T
    """
    length, heads, width = x.shape[1:]
    total = (dt * A).cumsum(1)  # (b, Q, H)
    scaled = (x * dt[..., None]).to(x.dtype)  # (b, Q, H, P)
    # What comes from before the chunk: one matrix product serves all heads.
    before = C @ state.to(x.dtype).flatten(1, 2).mT  # (b, Q, H P)
    y = before.unflatten(-1, (heads, width)) * total.exp()[..., None]
    # What comes from inside it. Future tokens are masked before the exponential, which would overflow for them.
    rows = total.transpose(1, 2)  # (b, H, Q)
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    decay = (rows[..., :, None] - rows[..., None, :]).masked_fill(future, -torch.inf).exp()  # (b, H, Q, Q)
    weights = ((C @ B.mT)[:, None] * decay).to(x.dtype)
    y = y + (weights @ scaled.transpose(1, 2)).transpose(1, 2)
    # What is left for the next chunk.
    left = scaled * (total[:, -1:] - total).exp()[..., None]
    written = left.to(x.dtype).flatten(2).mT @ B  # (b, H P, N)
    return y, total[:, -1].exp()[..., None, None] * state + written.unflatten(1, (heads, width))


def _full_precision(device: torch.device) -> torch.autocast:
    """No autocast: dtypes are chosen here. The meta device, which has none, passes for a CPU."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


# ---- mamba-ssm


def report() -> dict[str, str]:
    """Which method serves on this machine, why, and what there is to say about mamba-ssm."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings():  # the report says it
        warnings.simplefilter("ignore")
        found, reason = kernels(device)
    told = os.environ.get(VARIABLE)
    return {
        "method": choose("auto", device),
        "chosen_by": f"{VARIABLE}={told}" if told else "what works here",
        "mamba_ssm": "works" if found else reason,
    }


@lru_cache
def kernels(device: torch.device) -> tuple[Callable[..., Any] | None, str]:
    """mamba-ssm's chunked scan if it works on this device, else None and why not.

    Tried once per process and device, on a few numbers; a package that is there but does not work is warned of, once.
    """
    if importlib.util.find_spec("mamba_ssm") is None:
        return None, "mamba-ssm is not installed"
    try:
        if device.type != "cuda":
            raise RuntimeError(f"its kernels need CUDA, these tensors are on {device.type}")
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as found

        _try(found, device)
    except Exception as error:  # whatever a foreign build does: missing symbols, other ABIs, unsupported GPUs
        reason = " ".join(f"mamba-ssm is installed but cannot be used ({type(error).__name__}: {error})".split())[:300]
        warnings.warn(f"{reason}: scanning in chunks instead", stacklevel=2)
        return None, reason
    return found, ""


def _try(found: Callable[..., Any], device: torch.device) -> None:
    """Compare kernels with the chunked scan; raises RuntimeError where they disagree."""
    rng = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(shape, generator=rng).to(device) for shape in ((1, 20, 2, 16), (1, 20, 16), (1, 20, 16)))
    dt, A = torch.rand(1, 20, 2, generator=rng).to(device), -torch.rand(2, generator=rng).to(device)
    state = torch.randn(1, 2, 16, 16, generator=rng).to(device)
    with _full_precision(device):
        ours, theirs = chunked(x, dt, A, B, C, state), _call(found, x, dt, A, B, C, state)
    for name, expected, got in zip(("output", "state"), ours, theirs, strict=True):
        error = (got - expected).abs().max() / expected.abs().max()
        if not error < TOLERANCE:
            raise RuntimeError(f"its {name} is off by {float(error):.1g}")


def _by_kernels(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    found = kernels(x.device)[0]
    assert found is not None
    return _call(found, x, dt, A, B, C, state)


def _call(
    found: Callable[..., Any], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's calling convention: one group of heads shares B and C, (b, T, 1, N)."""
    return found(
        x.contiguous(),
        dt.contiguous(),
        A,
        B[:, :, None].contiguous(),
        C[:, :, None].contiguous(),
        chunk_size=256,
        initial_states=state.contiguous(),
        return_final_states=True,
    )
