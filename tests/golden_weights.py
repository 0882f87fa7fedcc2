"""Golden figures of the published code, and the rule that rebuilds the weights they were computed with."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
State = dict[str, Tensor]


def golden_layout(name: str) -> dict[str, Any]:
    """Names and shapes of every tensor of the small published-layout models."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def golden_figures(name: str) -> State:
    """What the published code computed."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def fill(name: str, shape: list[int]) -> Tensor:
    """The value of a floating tensor, which follows from its name and shape alone."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "scale_mul" in name:
        return math.log(4) + 0.1 * noise
    value = noise / noise[0].numel() ** 0.5 if len(shape) >= 2 else 0.1 * noise
    if name.endswith("A_log"):
        return value.abs() + 0.1
    return value + 1 if "norm" in name and name.endswith("weight") else value


def scale_numbers(scales: list[int]) -> Tensor:
    """The number of the scale at each position, (L,)."""
    return torch.arange(len(scales)).repeat_interleave(torch.tensor([side * side for side in scales]))


def published_state(layout: dict[str, list[int]], scales: list[int]) -> State:
    """A state dict as the published code would have saved it."""
    numbers = scale_numbers(scales)
    within = any(".mamba." in name for name in layout)  # M-VAR attends within scales alone
    allowed = numbers[:, None] == numbers if within else numbers[:, None] >= numbers
    buffers = {
        "lvl_1L": lambda: numbers[None],
        "attn_bias_for_masking": lambda: torch.where(allowed, 0.0, -torch.inf)[None, None],
    }
    state = {}
    for name, shape in layout.items():
        if name in buffers:
            state[name] = buffers[name]()
        elif name.endswith("zero_k_bias"):
            state[name] = torch.zeros(shape)
        elif name.endswith("patch_nums"):
            state[name] = torch.tensor([side * side for side in scales], dtype=torch.int32)
        else:
            state[name] = fill(name, shape)
    return state
