"""VAR's published transformers and their multi-scale tokenizer."""

import re
from typing import Any

import torch

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
from vgen.generators.var import VAR
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.types import CheckpointError, SettingError


def convert_var(
    transformer: Source,
    tokenizer: Source | None = None,
    *,
    scales: list[int] | None = None,
    heads: int | None = None,
    phi_ratio: float = 0.5,
    class_names: list[str] | None = None,
) -> NextScalePipeline:
    """VAR (var_d16 ... var_d36, or any other size) and its tokenizer (vae_ch160v4096z32, or any other size).

    `scales` overrides what the checkpoint's `lvl_1L` says; `heads` serves checkpoints without the q/k norm, which are
    taken to have heads of width 64; `phi_ratio` (the weight of the residual convolutions) is in no tensor.
    VAR's published cfg = c is guidance_scale = 1 + c here.
    """
    with inferring("VAR transformer"):
        state = read_state(transformer, "transformer", ("var_wo_ddp", "mvar_wo_ddp"))
        if any(".mamba." in name for name in state):
            raise CheckpointError(
                "this is an M-VAR checkpoint (it has Mamba blocks), not a VAR one: convert it as mvar"
            )
        config = transformer_config(state, scales, heads, "VAR transformer")
        generator = build(VAR, config, rename_transformer(state, VAR_NAMES), "VAR transformer", VAR_NAMES)
    return with_tokenizer(generator, tokenizer, phi_ratio, class_names)


def with_tokenizer(
    generator: Any, tokenizer: Source | None, phi_ratio: float, class_names: list[str] | None
) -> NextScalePipeline:
    """The pipeline of a converted transformer and the tokenizer to convert, where there is one."""
    names = labels(class_names, generator.config["num_classes"])
    converted = None
    if tokenizer is not None:
        with inferring("VAR tokenizer"):
            state = read_state(tokenizer, "tokenizer", ("vae_local",))
            converted = _multiscale_tokenizer(state, list(generator.config["scales"]), phi_ratio)
    return NextScalePipeline(converted, generator, id2label=names)


# ---- the transformer

VAR_NAMES = [  # published, ours; {i} is a number
    ("word_embed.", "code_embed."),
    ("class_emb.", "class_embed."),
    ("lvl_embed.", "scale_embed."),
    ("pos_start", "start_position"),
    ("pos_1LC", "position"),
    ("shared_ada_lin.1.", "adaln."),
    ("head_nm.ada_lin.1.", "head_adaln."),
    ("blocks.{i}.ada_lin.1.", "blocks.{i}.adaln."),
    ("blocks.{i}.ada_gss", "blocks.{i}.adaln_table"),
    ("blocks.{i}.attn.mat_qkv.", "blocks.{i}.attn.qkv."),
    ("blocks.{i}.attn.scale_mul_1H11", "blocks.{i}.attn.log_scale"),
]
# These follow from the configuration, and are dropped once it is known.
BUFFERS = re.compile(r"^(lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.(zero_k_bias|patch_nums))$")


def transformer_config(state: State, scales: list[int] | None, heads: int | None, what: str) -> dict[str, Any]:
    """What the tensors of VAR's and M-VAR's transformers tell alike."""
    require(state, what, "word_embed.weight", "pos_1LC", "class_emb.weight", "head.weight")
    width, code_dim = state["word_embed.weight"].shape
    qk_norm = "blocks.0.attn.scale_mul_1H11" in state
    told = state["blocks.0.attn.scale_mul_1H11"].numel() if qk_norm else heads or max(1, width // 64)  # as published
    if heads and heads != told:
        raise SettingError(f"heads is {heads}, but the checkpoint has {told}: leave it out")
    config: dict[str, Any] = {
        "scales": scales or _scales_of(state),
        "vocab_size": state["head.weight"].shape[0],
        "code_dim": code_dim,
        "num_classes": state["class_emb.weight"].shape[0] - 1,
        "width": width,
        "depth": count(state, r"^blocks\.(\d+)\."),
        "heads": told,
        "qk_norm": qk_norm,
        "shared_adaln": "shared_ada_lin.1.weight" in state,
    }
    if sum(side * side for side in config["scales"]) != state["pos_1LC"].shape[1]:
        raise CheckpointError(f"scales {config['scales']} do not add up to the {state['pos_1LC'].shape[1]} positions")
    return config


def rename_transformer(state: State, names: list[tuple[str, str]]) -> State:
    """The tensors under our names, less what follows from the configuration."""
    renamed = {rename(name, names): tensor for name, tensor in state.items() if not BUFFERS.match(name)}
    for name, tensor in renamed.items():  # published tables have leading axes of 1, to be broadcast
        if name.endswith(("position", "log_scale", "adaln_table")):
            renamed[name] = tensor.flatten(0, 2 if name.endswith("adaln_table") else 1)
    return renamed


def _scales_of(state: State) -> list[int]:
    """Sides of the scales from `lvl_1L`, the scale number of each position."""
    if "lvl_1L" not in state:
        raise CheckpointError("the transformer has no lvl_1L, so its scales are unknown: give scales=[1, 2, ...]")
    lengths = torch.bincount(state["lvl_1L"].flatten().long()).tolist()
    sides = [round(length**0.5) for length in lengths]
    if [side * side for side in sides] != lengths:
        raise CheckpointError(f"lvl_1L gives scales of {lengths} tokens, which are not squares")
    return sides


# ---- VAR's tokenizer

VQ_NAMES = [
    ("quantize.embedding.weight", "codebook.weight"),
    ("quantize.ema_vocab_hit_SV", "codebook.usage"),
    ("quantize.quant_resi.qresi_ls.{i}.", "phi.{i}."),
    ("quantize.quant_resi.qresi.", "phi.0."),
    ("quantize.quant_resi.{i}.", "phi.{i}."),
]


def _multiscale_tokenizer(state: State, scales: list[int], phi_ratio: float) -> MultiScaleVQ:
    require(state, "VAR tokenizer", "quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight")
    vocab_size, code_dim = state["quantize.embedding.weight"].shape
    size = network_size(state)
    levels = len(size["channel_multipliers"])
    renamed = {rename(name, VQ_NAMES): tensor for name, tensor in state.items()}
    usage = renamed.get("codebook.usage")
    if usage is None or usage.shape != (len(scales), vocab_size):
        usage = torch.zeros(len(scales), vocab_size)  # statistics only: for other scales there are none yet
    renamed["codebook.usage"] = usage / usage.sum(1, keepdim=True).clamp_min(1)  # hit counts to shares
    config = {
        "scales": scales,
        "vocab_size": vocab_size,
        "code_dim": code_dim,
        **size,
        "attention_levels": [i for i in range(levels) if f"encoder.down.{i}.attn.0.qkv.weight" in state],
        "num_phi": count(renamed, r"^phi\.(\d+)\."),
        "phi_ratio": phi_ratio,
    }
    return build(MultiScaleVQ, config, renamed, "VAR tokenizer", VQ_NAMES)
