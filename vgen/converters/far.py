"""FAR's published transformers, FAR-Long's among them."""

import math
from typing import Any

import torch

from vgen.converters.dcae import convert_dcae
from vgen.converters.shared import Source, State, build, count, inferring, labels, read_state, rename, require
from vgen.generators.far import FAR
from vgen.pipelines.next_frame import NextFramePipeline
from vgen.types import CheckpointError, SettingError

WHAT = "FAR transformer"
STEPS = 50  # of the published samples
GUIDANCE = {"label": 2.0, "action": 1.5}  # of the published samples


def convert_far(
    transformer: Source,
    tokenizer: Source | None = None,
    *,
    side: int = 8,
    patch_size: int = 1,
    rope_axes: list[int] | None = None,
    window: int = 16,
    slope: float = 0.0,
    attention_head_dim: int = 32,
    class_names: list[str] | None = None,
) -> NextFramePipeline:
    """FAR (FAR_B ... FAR_XL, FAR_B_Long, FAR_M_Long, or any other size) and its deep-compression autoencoder.

    What is in no tensor is taken to be as in all published models, unless told: a latent grid of 8 x 8, tokens of one
    latent each, heads rotated in the proportions 2 : 3 : 3 by time, row and column, a window of 16 frames at full
    resolution for FAR-Long, no temporal decay (`slope`), and heads 32 wide in the autoencoder (`attention_head_dim`).
    Sampling defaults to the published 50 steps and guidance (2.0 for classes, 1.5 for actions).
    Raises SettingError and CheckpointError as `vgen.convert` does.
    """
    with inferring(WHAT):
        state = read_state(transformer, "transformer")
        config = far_config(state, side, patch_size, rope_axes)
        config |= {"window": window, "slope": slope}
        generator = build(FAR, config, renamed(state), WHAT, ERROR_NAMES)
    kind = "label" if config["num_classes"] else "action" if config["num_actions"] else ""
    settings = {"steps": STEPS, "guidance_scale": GUIDANCE.get(kind, 1.0)}
    names = labels(class_names, config["num_classes"])
    converted = None if tokenizer is None else convert_dcae(tokenizer, side, attention_head_dim)
    return NextFramePipeline(converted, generator, id2label=names, settings=settings)


STRANGERS = {  # a tensor of another family's checkpoint, and what to do with it
    "word_embed.weight": "a VAR or M-VAR checkpoint, not a FAR one: convert it as var or mvar",
    "z_proj.weight": "an MAR checkpoint, not a FAR one: convert it as mar",
    "token_emb.word_embeddings.weight": "a MaskGIT or MAGE checkpoint, not a FAR one: convert it as maskgit or mage",
    "encoder.conv_out.weight": "an autoencoder, not a FAR transformer: give it as the tokenizer",
}
NAMES = [  # published, ours; {i} is a number
    ("x_embedder.", "token_embed."),
    ("timestep_embedder.linear_1.", "time_fc1."),
    ("timestep_embedder.linear_2.", "time_fc2."),
    ("label_embedder.embedding_table.", "class_embed."),
    ("action_embedder.embedding_table.", "action_embed."),
    ("context_embedder.", "context_embed."),
    ("norm_out.linear.", "head_adaln."),
    ("proj_out.", "head."),
    ("context_proj_out.", "context_head."),
    ("transformer_blocks.{i}.attn.to_out.0.", "blocks.{i}.attn.proj."),
    ("transformer_blocks.{i}.attn.norm_q.weight", "blocks.{i}.attn.norm_q"),
    ("transformer_blocks.{i}.attn.norm_k.weight", "blocks.{i}.attn.norm_k"),
    ("transformer_blocks.{i}.attn.to_add_out.", "blocks.{i}.context_attn.proj."),
    ("transformer_blocks.{i}.attn.norm_added_q.weight", "blocks.{i}.context_attn.norm_q"),
    ("transformer_blocks.{i}.attn.norm_added_k.weight", "blocks.{i}.context_attn.norm_k"),
    ("transformer_blocks.{i}.mlp.net.0.proj.", "blocks.{i}.fc1."),
    ("transformer_blocks.{i}.mlp.net.2.", "blocks.{i}.fc2."),
]
JOINED = [  # ours, and which published layers it holds, one below the other
    ("adaln", ["norm1.linear", "norm2.linear"]),
    ("attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("context_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
]
# By these, errors name tensors as the file does.
ERROR_NAMES = [*NAMES, *((f"transformer_blocks.{{i}}.{old[0]}.", f"blocks.{{i}}.{new}.") for new, old in JOINED)]


def far_config(state: State, side: int, patch_size: int, rope_axes: list[int] | None) -> dict[str, Any]:
    """What names and shapes tell, and what must be told."""
    for name, meaning in STRANGERS.items():
        if name in state:
            raise CheckpointError(f"this is {meaning}")
    require(state, WHAT, "x_embedder.weight", "proj_out.weight", "transformer_blocks.0.attn.norm_q.weight")
    width, features = state["x_embedder.weight"].shape
    head = state["transformer_blocks.0.attn.norm_q.weight"].numel()
    if patch_size < 1 or features % patch_size**2:
        raise SettingError(f"patch_size is {patch_size}, but tokens hold {features} values: use the trained one")
    axes = rope_axes or [head // 4, head * 3 // 8, head * 3 // 8]
    if sum(axes) != head:
        told = "are" if rope_axes else "are taken to be"
        raise SettingError(f"rope_axes {told} {axes}, whose sum is not {head}: give rope_axes= as trained")
    coarse = None
    if "context_embedder.weight" in state:
        ratio = math.isqrt(state["context_embedder.weight"].shape[1] // features)
        coarse = ratio * patch_size
    return {
        "in_channels": features // patch_size**2,
        "side": side,
        "patch_size": patch_size,
        "width": width,
        "depth": count(state, r"^transformer_blocks\.(\d+)\."),
        "heads": width // head,
        "rope_axes": axes,
        "num_classes": _classes(state, "label"),
        "num_actions": _classes(state, "action"),
        "context_patch_size": coarse,
    }


def _classes(state: State, kind: str) -> int:
    table = state.get(f"{kind}_embedder.embedding_table.weight")
    return 0 if table is None else table.shape[0] - 1  # the last row is the null class


def renamed(state: State) -> State:
    """The tensors under our names, those joined that we keep as one. Raises CheckpointError where parts are missing."""
    result, used = {}, set()
    for i in range(count(state, r"^transformer_blocks\.(\d+)\.")):
        for ours, layers in JOINED:
            for kind in ("weight", "bias"):
                parts = [f"transformer_blocks.{i}.{layer}.{kind}" for layer in layers]
                if any(part in state for part in parts):
                    result[f"blocks.{i}.{ours}.{kind}"] = _joined(state, parts)
                    used.update(parts)
    for name, tensor in state.items():
        if name not in used:
            result[rename(name, NAMES)] = tensor
    return result


def _joined(state: State, names: list[str]) -> torch.Tensor:
    """Layers of one shape as one. Raises CheckpointError naming the first that is missing or of another shape."""
    if missing := [name for name in names if name not in state]:
        raise CheckpointError(f"the {WHAT} does not fit its own configuration: missing {missing[0]}")
    first = tuple(state[names[0]].shape)
    if wrong := [name for name in names if tuple(state[name].shape) != first]:
        found = tuple(state[wrong[0]].shape)
        raise CheckpointError(f"the {WHAT} does not fit itself: {wrong[0]} is {found}, but {names[0]} is {first}")
    return torch.cat([state[name] for name in names])
