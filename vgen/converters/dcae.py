"""FAR's published deep-compression autoencoders (2410.10733), whose tensors are named as diffusers names them."""

import re
from itertools import pairwise
from typing import Any

import torch

from vgen.converters.shared import Source, State, build, count, inferring, read_state, require
from vgen.tokenizers.frames import DCAutoencoder
from vgen.types import CheckpointError

WHAT = "FAR autoencoder"
NAMES = [(f"{part}.", f"autoencoder.{part}.") for part in ("encoder", "decoder")]  # published, ours


def convert_dcae(tokenizer: Source, side: int = 8, attention_head_dim: int = 32) -> DCAutoencoder:
    """An autoencoder of any size, for latent grids of `side` rows and columns.

    In no tensor, and taken to be as published: the width of the heads of its linear attention, and the activations,
    which are ReLU where a stage has batch norm and SiLU elsewhere. Raises CheckpointError.
    """
    with inferring(WHAT):
        state = read_state(tokenizer, "tokenizer")
        if "x_embedder.weight" in state:
            raise CheckpointError("this is a FAR transformer, not its autoencoder: give it as the transformer")
        config = {"network": dcae_config(state, attention_head_dim), "side": side}
        ours = {re.sub(r"^(encoder|decoder)\.", r"autoencoder.\1.", name): tensor for name, tensor in state.items()}
        model = build(DCAutoencoder, config, ours, WHAT, NAMES)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.num_batches_tracked is not None:
            module.num_batches_tracked = module.num_batches_tracked.long()  # the one tensor that is no float
    return model


def dcae_config(state: State, attention_head_dim: int) -> dict[str, Any]:
    """AutoencoderDC's configuration from names and shapes."""
    require(state, WHAT, "encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.norm_out.weight")
    stages = {part: _stages(state, f"{part}.{blocks}") for part, blocks in PARTS.items()}
    first = "encoder.conv_in.weight" if "encoder.conv_in.weight" in state else "encoder.conv_in.conv.weight"
    require(state, WHAT, first)
    config: dict[str, Any] = {
        "in_channels": state[first].shape[1],
        "latent_channels": state["encoder.conv_out.weight"].shape[0],
        "attention_head_dim": attention_head_dim,
        "downsample_block_type": _sampling(state, "encoder.down_blocks", stages["encoder"]["channels"]),
        "upsample_block_type": _sampling(state, "decoder.up_blocks", stages["decoder"]["channels"]),
        "decoder_norm_types": stages["decoder"]["norms"],
        "decoder_act_fns": ["relu" if norm == "batch_norm" else "silu" for norm in stages["decoder"]["norms"]],
    }
    for part, found in stages.items():
        config[f"{part}_block_types"] = found["types"]
        config[f"{part}_block_out_channels"] = found["channels"]
        config[f"{part}_layers_per_block"] = found["layers"]
        config[f"{part}_qkv_multiscales"] = found["multiscales"]
    return config


PARTS = {"encoder": "down_blocks", "decoder": "up_blocks"}


def _stages(state: State, prefix: str) -> dict[str, list[Any]]:
    """For each resolution, the highest first: kind, number and channels of its blocks, norms, attention's kernels."""
    found: dict[str, list[Any]] = {name: [] for name in ("types", "layers", "channels", "norms", "multiscales")}
    pattern = re.escape(prefix)
    for i in range(count(state, rf"^{pattern}\.(\d+)\.")):
        blocks = [f"{prefix}.{i}.{j}" for j in range(count(state, rf"^{pattern}\.{i}\.(\d+)\."))]
        residual = [block for block in blocks if f"{block}.conv1.weight" in state]
        attention = [block for block in blocks if f"{block}.attn.to_q.weight" in state]
        block = (residual or attention or [""])[0]
        norm = f"{block}.norm" if residual else f"{block}.attn.norm_out"
        weight = state.get(f"{block}.conv2.weight" if residual else f"{block}.attn.to_q.weight")
        kernels = [state[f"{block}.attn.to_qkv_multiscale.{k}.proj_in.weight"].shape[-1] for k in _scales(state, block)]
        found["types"].append("EfficientViTBlock" if attention else "ResBlock")
        found["layers"].append(len(residual) + len(attention))
        found["channels"].append(0 if weight is None else weight.shape[0])
        found["norms"].append("batch_norm" if f"{norm}.running_mean" in state else "rms_norm")
        found["multiscales"].append(kernels)
    for name in ("channels", "norms"):  # of an empty first stage nothing is read; published: half, and the next's norm
        if found["layers"][0] == 0:
            found[name][0] = found[name][1] // 2 if name == "channels" else found[name][1]
    return found


def _scales(state: State, block: str) -> range:
    return range(count(state, rf"^{re.escape(block)}\.attn\.to_qkv_multiscale\.(\d+)\."))


def _sampling(state: State, prefix: str, channels: list[int]) -> str:
    """How stages change resolution, which the rows of the convolutions between them tell."""
    down = prefix.startswith("encoder")
    for i, (width, next_width) in enumerate(pairwise(channels)):
        for j in range(count(state, rf"^{re.escape(prefix)}\.{i}\.(\d+)\.")):
            conv = state.get(f"{prefix}.{i}.{j}.conv.weight")
            if conv is not None:
                shuffled = conv.shape[0] * 4 == next_width if down else conv.shape[0] == width * 4
                return (
                    ("pixel_unshuffle" if down else "pixel_shuffle") if shuffled else ("conv", "interpolate")[not down]
                )
    return "pixel_unshuffle" if down else "pixel_shuffle"
