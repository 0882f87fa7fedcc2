"""The published recurrent-depth language model (2502.05171, huginn-0125) to ours."""

import re
from typing import Any

import torch

from vgen.converters.shared import Source, State, build, count, inferring, read_state, rename, require
from vgen.generators.recurrent import RecurrentTransformer
from vgen.pipelines.raster import RasterPipeline
from vgen.types import CheckpointError, SettingError

NAMES = [
    ("transformer.wte.", "token_embed."),
    ("transformer.ln_f.", "norm."),
    ("transformer.adapter.", "adapter."),
]
BLOCK_NAMES = [
    ("norm_1.", "norm1."),
    ("norm_2.", "norm2."),
    ("norm_3.", "norm3."),
    ("norm_4.", "norm4."),
    ("attn.Wqkv.", "qkv."),
    ("attn.qk_bias", "qk_bias"),
    ("attn.proj.", "proj."),
    ("mlp.fc.", "fc1."),
    ("mlp.proj.", "fc2."),
]
for theirs, ours in (("prelude", "prelude"), ("core_block", "core"), ("coda", "coda")):
    NAMES += [(f"transformer.{theirs}.{{i}}.{old}", f"{ours}_blocks.{{i}}.{new}") for old, new in BLOCK_NAMES]
DERIVED = ("freqs_cis", "lm_head.weight")  # computed, and tied to the embeddings


def convert_recurrent(
    transformer: Source,
    tokenizer: Source | None = None,
    *,
    heads: int | None = None,
    recurrences: int = 32,
    num_tokens: int | None = None,
    rope_base: float = 50_000.0,
) -> RasterPipeline:
    """A recurrent-depth language model, whose words are integers: it comes without tokenizer and gives no images.

    Args:
        transformer: published weights; everything but the overrides is read off their shapes.
        heads: where there are no biases of queries and keys, which tell it.
        recurrences: of the core when sampling; the published mean is 32.
        num_tokens: longest text; by default as many as the table of rotations has, else 4096.
        rope_base: of the rotations.

    Raises CheckpointError for other weights, SettingError for a `tokenizer` or a missing `heads`.
    """
    if tokenizer is not None:
        raise SettingError("the recurrent language model reads words, no image tokens: leave the tokenizer out")
    state = read_state(transformer, "transformer")
    require(state, "recurrent-depth transformer", "transformer.wte.weight", "transformer.adapter.weight")
    with inferring("recurrent-depth transformer"):
        config = _config(state, heads) | {"recurrences": recurrences, "rope_base": rope_base}
        table = state.get("freqs_cis")
        config["num_tokens"] = num_tokens or (4096 if table is None else table.shape[1])
        head, embedding = state.get("lm_head.weight"), state["transformer.wte.weight"]
        if head is not None and not torch.equal(head, embedding):
            raise CheckpointError("lm_head.weight differs from transformer.wte.weight, and this model has one for both")
    renamed = {rename(name, NAMES): tensor for name, tensor in state.items() if name not in DERIVED}
    model = build(RecurrentTransformer, config, renamed, "transformer", NAMES)
    return RasterPipeline(None, model)


def _config(state: State, heads: int | None) -> dict[str, Any]:
    vocab, width = state["transformer.wte.weight"].shape
    blocks = {
        ours: count(state, rf"^transformer\.{theirs}\.(\d+)\.")
        for theirs, ours in (("prelude", "prelude"), ("core_block", "core"), ("coda", "coda"))
    }
    bias = next((tensor for name, tensor in state.items() if re.search(r"\.qk_bias$", name)), None)
    if bias is None and heads is None:
        raise SettingError("no tensor tells the number of heads: give heads=, as --heads 55")
    return {
        "vocab_size": vocab,
        "num_classes": None,
        "width": width,
        "heads": heads if bias is None else bias.shape[-2],
        "mlp_width": state["transformer.core_block.0.mlp.proj.weight"].shape[1],
        "qk_bias": bias is not None,
        **blocks,
    }
