"""M-VAR's published transformers; the tokenizer is VAR's."""

from typing import Any

from vgen.converters.shared import Source, State, build, inferring, read_state, require
from vgen.converters.var import VAR_NAMES, rename_transformer, transformer_config, with_tokenizer
from vgen.generators.mvar import MVAR
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.types import CheckpointError

WHAT = "M-VAR transformer"
NAMES = [*VAR_NAMES, ("blocks.{i}.mamba.conv1d.", "blocks.{i}.mamba.conv.")]


def convert_mvar(
    transformer: Source,
    tokenizer: Source | None = None,
    *,
    scales: list[int] | None = None,
    heads: int | None = None,
    phi_ratio: float = 0.5,
    class_names: list[str] | None = None,
) -> NextScalePipeline:
    """M-VAR (d12 ... d30, or any other size) and VAR's tokenizer. The overrides are those of `convert_var`.

    Depth, width and everything of Mamba are read off the file: the paper's "d32" has the parameters of depth 30.
    M-VAR's published cfg = c is guidance_scale = 1 + c here.
    """
    with inferring(WHAT):
        state = read_state(transformer, "transformer", ("mvar_wo_ddp", "var_wo_ddp"))
        if "word_embed.weight" in state and not any(".mamba." in name for name in state):
            raise CheckpointError(
                "this is a VAR checkpoint (it has no Mamba blocks), not an M-VAR one: convert it as var"
            )
        config = transformer_config(state, scales, heads, WHAT) | _mamba_config(state)
        generator = build(MVAR, config, rename_transformer(state, NAMES), WHAT, NAMES)
    return with_tokenizer(generator, tokenizer, phi_ratio, class_names)


def _mamba_config(state: State) -> dict[str, Any]:
    """Sizes of Mamba: the convolution sees the inner channels, and B and C of the state's size each."""
    names = [f"blocks.0.mamba.{name}" for name in ("norm.weight", "dt_bias", "conv1d.weight")]
    require(state, WHAT, *names)
    inner, heads, (mixed, _, conv_width) = state[names[0]].numel(), state[names[1]].numel(), state[names[2]].shape
    return {
        "expand": inner // state["word_embed.weight"].shape[0],
        "mamba_head_width": inner // heads,
        "state_size": (mixed - inner) // 2,
        "conv_width": conv_width,
    }
