"""MAR's published transformers and their KL autoencoder."""

import math
from typing import Any

import torch
from torch import Tensor

from vgen.converters.shared import (
    Source,
    State,
    build,
    count,
    inferring,
    labels,
    network_size,
    read_state,
    rename,
    require,
)
from vgen.generators.mar import MAR
from vgen.pipelines.mar import MARPipeline
from vgen.tokenizers.kl import KLAutoencoder
from vgen.types import CheckpointError


def convert_mar(
    transformer: Source,
    tokenizer: Source | None = None,
    *,
    heads: int | None = None,
    class_names: list[str] | None = None,
) -> MARPipeline:
    """MAR (mar_base, mar_large, mar_huge, or any other size) and its autoencoder (kl16, or any other size).

    Of a training checkpoint the averaged weights, `model_ema`, are taken. `heads` is in no tensor: it is 16 for a
    width of 1280, as published, and heads have a width of 64 otherwise, unless told.
    """
    with inferring("MAR transformer"):
        generator = _generator(read_state(transformer, "transformer", ("model_ema", "model")), heads)
    names = labels(class_names, generator.config["num_classes"])
    converted = None
    if tokenizer is not None:
        with inferring("MAR autoencoder"):
            state = read_state(tokenizer, "tokenizer", ("model",))
            converted = _autoencoder(state, generator.config["num_tokens"])
    return MARPipeline(converted, generator, id2label=names)


# ---- the transformer

HEADS = {1280: 16}  # by width, where published heads are not 64 wide
BLOCK_NAMES = [("attn.qkv.", "qkv."), ("attn.proj.", "proj."), ("mlp.fc1.", "fc1."), ("mlp.fc2.", "fc2.")]
MAR_NAMES = [  # published, ours; {i} is a number
    ("class_emb.", "class_embed."),
    ("z_proj.", "token_embed."),
    ("z_proj_ln.", "token_norm."),
    ("encoder_pos_embed_learned", "encoder_position"),
    ("decoder_pos_embed_learned", "decoder_position"),
    ("diffusion_pos_embed_learned", "head_position"),
    *((f"encoder_blocks.{{i}}.{old}", f"encoder_blocks.{{i}}.{new}") for old, new in BLOCK_NAMES),
    *((f"decoder_blocks.{{i}}.{old}", f"decoder_blocks.{{i}}.{new}") for old, new in BLOCK_NAMES),
    ("diffloss.net.time_embed.mlp.0.", "head.time_fc1."),
    ("diffloss.net.time_embed.mlp.2.", "head.time_fc2."),
    ("diffloss.net.cond_embed.", "head.condition_embed."),
    ("diffloss.net.input_proj.", "head.token_embed."),
    ("diffloss.net.res_blocks.{i}.in_ln.", "head.blocks.{i}.norm."),
    ("diffloss.net.res_blocks.{i}.mlp.0.", "head.blocks.{i}.fc1."),
    ("diffloss.net.res_blocks.{i}.mlp.2.", "head.blocks.{i}.fc2."),
    ("diffloss.net.res_blocks.{i}.adaLN_modulation.1.", "head.blocks.{i}.adaln."),
    ("diffloss.net.final_layer.linear.", "head.out."),
    ("diffloss.net.final_layer.adaLN_modulation.1.", "head.out_adaln."),
]


def _generator(state: State, heads: int | None) -> MAR:
    tables = ["mask_token", *(f"{name}_pos_embed_learned" for name in ("encoder", "decoder", "diffusion"))]
    needed = [*tables, "class_emb.weight", "fake_latent", "z_proj.weight", "encoder_blocks.0.mlp.fc1.weight"]
    require(state, "MAR transformer", *needed, "diffloss.net.input_proj.weight")
    num_classes, width = state["class_emb.weight"].shape
    num_tokens = state["diffusion_pos_embed_learned"].shape[1]
    config: dict[str, Any] = {
        "num_tokens": num_tokens,
        "token_dim": state["z_proj.weight"].shape[1],
        "num_classes": num_classes,
        "width": width,
        "encoder_depth": count(state, r"^encoder_blocks\.(\d+)\."),
        "decoder_depth": count(state, r"^decoder_blocks\.(\d+)\."),
        "heads": heads or HEADS.get(width, max(1, width // 64)),
        "mlp_ratio": state["encoder_blocks.0.mlp.fc1.weight"].shape[0] // width,
        "buffer_tokens": state["encoder_pos_embed_learned"].shape[1] - num_tokens,
        "diffusion_width": state["diffloss.net.input_proj.weight"].shape[0],
        "diffusion_depth": count(state, r"^diffloss\.net\.res_blocks\.(\d+)\."),
    }
    if state["fake_latent"].shape != (1, width):
        raise CheckpointError(f"fake_latent is {tuple(state['fake_latent'].shape)} instead of {(1, width)}")
    # What stands for the class in unconditional rows becomes the last class.
    joined = {name: tensor for name, tensor in state.items() if name != "fake_latent"}
    joined["class_emb.weight"] = torch.cat([state["class_emb.weight"], state["fake_latent"]])
    for name in tables:  # with leading axes of 1, to be broadcast
        joined[name] = joined[name].flatten(0, joined[name].ndim - 2)
    joined["mask_token"] = joined["mask_token"].squeeze(0)
    renamed = {rename(name, MAR_NAMES): tensor for name, tensor in joined.items()}
    return build(MAR, config, renamed, "MAR transformer", MAR_NAMES)


# ---- the autoencoder


def _autoencoder(state: State, num_tokens: int) -> KLAutoencoder:
    state = {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}  # the discriminator's
    require(state, "MAR autoencoder", "encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight")
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise CheckpointError(f"the transformer has {num_tokens} tokens, which form no square: leave the tokenizer out")
    size = network_size(state)
    levels, blocks = len(size["channel_multipliers"]), size["blocks"]
    names = kl_names(levels, blocks)
    config = {
        "side": side,
        "token_dim": state["post_quant_conv.weight"].shape[0],
        **size,
        "attention_levels": [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state],
    }
    renamed = {rename(name, names): _as_linear(name, tensor) for name, tensor in state.items()}
    return build(KLAutoencoder, config, renamed, "MAR autoencoder", names)


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """Attention's 1x1 convolutions as the matrices they are."""
    is_attention = ".attn" in name and name.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight"))
    return tensor.flatten(1) if is_attention and tensor.shape[2:] == (1, 1) else tensor


def kl_names(levels: int, blocks: int) -> list[tuple[str, str]]:
    """Published names of an autoencoder's tensors and ours, which are those of diffusers' AutoencoderKL.

    The published decoder counts its levels from the highest resolution, diffusers' from the lowest.
    """
    resnet = [(f"{part}.", f"{part}.") for part in ("norm1", "conv1", "norm2", "conv2")]
    resnet += [("nin_shortcut.", "conv_shortcut.")]
    attention = [("norm.", "group_norm."), ("proj_out.", "to_out.0."), *((f"{x}.", f"to_{x}.") for x in "qkv")]
    places: list[tuple[str, str, list[tuple[str, str]]]] = []
    for part in ("encoder", "decoder"):
        places += [(f"{part}.mid.block_{j + 1}.", f"{part}.mid_block.resnets.{j}.", resnet) for j in range(2)]
        places += [(f"{part}.mid.attn_1.", f"{part}.mid_block.attentions.0.", attention)]
        places += [(f"{part}.norm_out.", f"{part}.conv_norm_out.", [("", "")])]
        places += [(f"{part}.{name}.", f"{part}.{name}.", [("", "")]) for name in ("conv_in", "conv_out")]
    for i in range(levels):
        down, up, ours = f"encoder.down.{i}.", f"decoder.up.{i}.", f"decoder.up_blocks.{levels - 1 - i}."
        for j in range(blocks + 1):
            places += [(f"{down}block.{j}.", f"encoder.down_blocks.{i}.resnets.{j}.", resnet)]
            places += [(f"{down}attn.{j}.", f"encoder.down_blocks.{i}.attentions.{j}.", attention)]
            places += [(f"{up}block.{j}.", f"{ours}resnets.{j}.", resnet)]
        places += [(f"{down}downsample.", f"encoder.down_blocks.{i}.downsamplers.0.", [("", "")])]
        places += [(f"{up}upsample.", f"{ours}upsamplers.0.", [("", "")])]
    places += [(f"{name}.", f"{name}.", [("", "")]) for name in ("quant_conv", "post_quant_conv")]
    return [(old + a, f"autoencoder.{new}{b}") for old, new, parts in places for a, b in parts]
