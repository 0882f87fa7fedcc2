"""MaskGIT's and MAGE's published transformers, and the VQGAN that both use."""

import math
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
from vgen.generators.mage import MAGE
from vgen.generators.masked import MaskedTransformer
from vgen.pipelines.masked import MaskedPipeline
from vgen.tokenizers.vqgan import VQGAN
from vgen.types import CheckpointError, SettingError

Names = list[tuple[str, str]]  # published, ours; {i} is a number

# ReCAP's released run of 16 steps, of which it makes the last eight in pairs: full_steps=8, partial_steps=1.
MASKGIT_SETTINGS: dict[str, Any] = {
    "steps": 16,
    "mask_schedule": "recap",
    "temperature": 0.65,
    "temperature_schedule": "sqrt",
    "choice_temperature": 5.5,
    "guidance_scale": 1.0,
}
MAGE_SETTINGS: dict[str, Any] = {
    "steps": 20,
    "mask_schedule": "cosine",
    "choice_temperature": 6.0,
    "resample_singletons": False,
    "guidance_scale": 1.0,
}


def convert_maskgit(
    transformer: Source,
    tokenizer: Source | None = None,
    *,
    heads: int | None = None,
    class_names: list[str] | None = None,
) -> MaskedPipeline:
    """The U-ViT of AutoNAT and ReCAP (nnet_ema.pth, or any other size) and its VQGAN (vqgan_jax_strongaug.ckpt).

    `heads` is in no tensor: by default they are 96 wide, as in the released model, which has 8 of them at width 768.
    Sampling defaults to the settings of ReCAP's released run of 16 steps, all of them whole evaluations; its partial
    ones are full_steps=8, partial_steps=1. Raises SettingError and CheckpointError as `vgen.convert` does.
    """
    with inferring("MaskGIT transformer"):
        generator = _maskgit_generator(read_state(transformer, "transformer"), heads)
    names = labels(class_names, generator.config["num_classes"])
    converted = None if tokenizer is None else _vqgan(tokenizer, generator.config["num_tokens"])
    return MaskedPipeline(converted, generator, id2label=names, settings=_settings(MASKGIT_SETTINGS, generator))


def convert_mage(
    transformer: Source,
    tokenizer: Source | None = None,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> MaskedPipeline:
    """MAGE (mage-vitb, mage-vitl, or any other size); it is unconditional.

    The checkpoint holds its VQGAN, which is taken where no other `tokenizer` is given. Heads are in no tensor: by
    default the encoder's are 64 wide (12 in B, 16 in L), and the decoder has 16 of them, as in both released models.
    Sampling defaults to the published 20 steps. Raises SettingError and CheckpointError as `vgen.convert` does.
    """
    with inferring("MAGE transformer"):
        state = read_state(transformer, "transformer")
        held = {name.removeprefix("vqgan."): tensor for name, tensor in state.items() if name.startswith("vqgan.")}
        own = {name: tensor for name, tensor in state.items() if not name.startswith("vqgan.")}
        generator = _mage_generator(own, heads, decoder_heads)
    source = tokenizer if tokenizer is not None else held or None
    converted = None if source is None else _vqgan(source, generator.config["num_tokens"])
    return MaskedPipeline(converted, generator, settings=_settings(MAGE_SETTINGS, generator))


def _settings(published: dict[str, Any], generator: Any) -> dict[str, Any]:
    """The published settings, with fewer steps for smaller grids: ReCAP's integers need two tokens a step there."""
    return published | {"steps": max(1, min(published["steps"], generator.config["num_tokens"] // 2))}


def _heads(name: str, given: int | None, usual: int, width: int) -> int:
    heads = usual if given is None else given
    if not isinstance(heads, int) or heads < 1 or width % heads:
        told = "is" if given is not None else "is taken to be"
        raise SettingError(f"{name} {told} {heads!r}, which does not divide the width {width}: give {name}= as trained")
    return heads


def _renamed(state: State, names: Names, what: str) -> State:
    """Tensors under our names. Two that would share one are refused: neither may be lost unseen."""
    renamed: State = {}
    for name, tensor in state.items():
        ours = rename(name, names)
        if ours in renamed:
            raise CheckpointError(f"the {what} holds {ours} twice, under two names: one of them is left over")
        renamed[ours] = tensor
    return renamed


def _without_leading(state: State, axes: dict[str, int]) -> State:
    """The tensors, those named less so many leading axes, which must have length 1: flattening would hide a mistake."""
    flat = dict(state)
    for name, number in axes.items():
        if name in state:
            shape = tuple(state[name].shape)
            if len(shape) <= number or shape[:number] != (1,) * number:
                raise CheckpointError(f"{name} is {shape}: it must begin with {number} axes of length 1")
            flat[name] = state[name].flatten(0, number)
    return flat


def _block_names(published: str, ours: str) -> Names:
    """Blocks keep the names of their layers, but not those of the two parts that hold them."""
    parts = (("attn", ("qkv", "proj")), ("mlp", ("fc1", "fc2")))
    names = [(f"{published}.{part}.{layer}.", f"{ours}.{layer}.") for part, layers in parts for layer in layers]
    return names + ([(f"{published}.", f"{ours}.")] if published != ours else [])


# ---- MaskGIT's transformer

HEAD_NAMES: Names = [
    ("mlm_layer.fc.", "head_fc."),
    ("mlm_layer.ln.", "head_norm."),
    ("mlm_layer.bias", "head_bias"),
]
MASKGIT_NAMES: Names = [
    ("token_emb.word_embeddings.", "token_embed."),
    ("token_emb.position_embeddings.weight", "position"),
    ("token_emb.LayerNorm.", "token_norm."),
    ("context_embed.word_embeddings.", "class_embed."),
    ("context_embed.position_embeddings.weight", "class_position"),
    ("context_embed.LayerNorm.", "class_norm."),
    *HEAD_NAMES,
    *_block_names("in_blocks.{i}", "in_blocks.{i}"),
    *_block_names("mid_block", "mid_block"),
    *_block_names("out_blocks.{i}", "out_blocks.{i}"),
]


def _maskgit_generator(state: State, heads: int | None) -> MaskedTransformer:
    what = "MaskGIT transformer"
    if "decoder_pos_embed_learned" in state:
        raise CheckpointError("this is a MAGE checkpoint (it has a decoder), not a MaskGIT one: convert it as 'mage'")
    tables = ("token_emb.word_embeddings.weight", "token_emb.position_embeddings.weight")
    require(state, what, *tables, "context_embed.word_embeddings.weight", "mid_block.mlp.fc1.weight", "mlm_layer.bias")
    rows, width = state["token_emb.word_embeddings.weight"].shape
    config = {
        "num_tokens": state["token_emb.position_embeddings.weight"].shape[0],
        "vocab_size": rows - 1,
        "num_classes": state["context_embed.word_embeddings.weight"].shape[0] - 1,
        "width": width,
        "depth": 2 * count(state, r"^in_blocks\.(\d+)\.") + 1,
        "heads": _heads("heads", heads, max(1, width // 96), width),
        "mlp_ratio": state["mid_block.mlp.fc1.weight"].shape[0] // width,
    }
    flat = _without_leading(state, {"context_embed.position_embeddings.weight": 1, "mlm_layer.bias": 2})
    return build(MaskedTransformer, config, _renamed(flat, MASKGIT_NAMES, what), what, MASKGIT_NAMES)


# ---- MAGE's transformer

MAGE_NAMES: Names = [
    ("token_emb.word_embeddings.", "token_embed."),
    ("token_emb.position_embeddings.weight", "position"),
    ("token_emb.LayerNorm.", "token_norm."),
    ("norm.", "encoder_norm."),
    ("decoder_pos_embed_learned", "decoder_position"),
    *HEAD_NAMES,
    *_block_names("blocks.{i}", "encoder_blocks.{i}"),
    *_block_names("decoder_blocks.{i}", "decoder_blocks.{i}"),
]
# What MAGE inherits from MAE, which works on pixels: nothing on the way of tokens reads these.
MAGE_UNUSED = re.compile(
    r"^(patch_embed\.proj\.(weight|bias)|pos_embed|decoder_pos_embed|mask_token|cls_token"
    r"|decoder_pred\.(weight|bias)|token_emb\.position_ids)$"
)
# Its table of words holds the codes, these classes, one of which is the start token, and the mask: 2025 rows for 1024
# codes, of which 1100 is the start token and 2024 the mask. No other class is used.
MAGE_CLASSES, MAGE_FAKE_CLASS = 1000, 76


def _mage_generator(state: State, heads: int | None, decoder_heads: int | None) -> MAGE:
    what = "MAGE transformer"
    if "context_embed.word_embeddings.weight" in state:
        raise CheckpointError("this is a MaskGIT checkpoint (it has classes), not a MAGE one: convert it as 'maskgit'")
    words, places = "token_emb.word_embeddings.weight", "token_emb.position_embeddings.weight"
    require(state, what, words, places, "decoder_embed.weight", "decoder_pos_embed_learned", "mlm_layer.bias")
    require(state, what, "blocks.0.mlp.fc1.weight", "decoder_blocks.0.mlp.fc1.weight")
    rows, width = state[words].shape
    if rows <= MAGE_CLASSES + 1:
        raise CheckpointError(f"{words} has {rows} rows: MAGE's has one for each code, and {MAGE_CLASSES + 1} more")
    vocab_size, decoder_width = rows - MAGE_CLASSES - 1, state["decoder_embed.weight"].shape[0]
    config = {
        "num_tokens": state[places].shape[0] - 1,
        "vocab_size": vocab_size,
        "width": width,
        "decoder_width": decoder_width,
        "encoder_depth": count(state, r"^blocks\.(\d+)\."),
        "encoder_heads": _heads("heads", heads, max(1, width // 64), width),
        "decoder_depth": count(state, r"^decoder_blocks\.(\d+)\."),
        "decoder_heads": _heads("decoder_heads", decoder_heads, 16, decoder_width),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] // width,
    }
    used = {name: tensor for name, tensor in state.items() if not MAGE_UNUSED.match(name)}
    flat = _without_leading(used, {"decoder_pos_embed_learned": 1, "mlm_layer.bias": 2})
    table, bias = flat[words], flat["mlm_layer.bias"]
    if bias.shape != (rows,):
        raise CheckpointError(f"mlm_layer.bias is {tuple(bias.shape)}, but {words} has {rows} rows")
    flat[words], flat["mlm_layer.bias"] = torch.cat([table[:vocab_size], table[-1:]]), bias[:vocab_size]
    renamed = _renamed(flat, MAGE_NAMES, what) | {"start_embed": table[vocab_size + MAGE_FAKE_CLASS]}
    return build(MAGE, config, renamed, what, MAGE_NAMES)


# ---- the tokenizer of both

VQGAN_NAMES: Names = [("quantize.embedding.", "codebook.")]


def _vqgan(source: Source, num_tokens: int) -> VQGAN:
    """The VQGAN for a grid of `num_tokens`: its convolutions go with any, so the transformer tells the side."""
    with inferring("VQGAN"):
        state = read_state(source, "tokenizer")
        require(state, "VQGAN", "quantize.embedding.weight", "encoder.conv_in.weight")
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise CheckpointError(f"the transformer has {num_tokens} tokens, which form no square grid")
        vocab_size, code_dim = state["quantize.embedding.weight"].shape
        config = {
            "side": side,
            "vocab_size": vocab_size,
            "code_dim": code_dim,
            **network_size(state),
        }
        renamed = _renamed(state, VQGAN_NAMES, "VQGAN")
        renamed.setdefault("codebook.usage", torch.zeros(1, vocab_size))  # our statistics, which start at nothing
        return build(VQGAN, config, renamed, "VQGAN", VQGAN_NAMES)
