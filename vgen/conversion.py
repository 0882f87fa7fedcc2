"""Published checkpoints to vgen pipelines: one function per family, configuration inferred from names and shapes."""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vgen.files import atomic_folder, read_tensors, sha256
from vgen.generators.var import VAR
from vgen.pipelines.base import Pipeline
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.progress import progress
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.types import CheckpointError, SettingError

State = dict[str, Tensor]
Source = str | Path | Mapping[str, Any]


def convert(family: str, *, transformer: Source, tokenizer: Source | None = None, **overrides: Any) -> Pipeline:
    """Turn published weights into a pipeline.

    Args:
        family: "var".
        transformer: a file (safetensors, or .pth without pickled objects) or a state dict.
        tokenizer: the same for the tokenizer; without it the pipeline gives no images.
        overrides: configuration values that shapes cannot tell, or tell wrongly.

    Loading is strict. Raises SettingError for an unknown family or override, CheckpointError naming the tensors that
    are missing, left over or of the wrong shape.
    """
    if family not in FAMILIES:
        raise SettingError(f"unknown family {family!r}: use one of {', '.join(FAMILIES)}")
    known = inspect.signature(FAMILIES[family]).parameters
    if unknown := [name for name in overrides if name not in known]:
        raise SettingError(f"unknown override {unknown[0]!r} for {family}: use one of {', '.join(list(known)[2:])}")
    return FAMILIES[family](transformer, tokenizer, **overrides)


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
    with _inferring("VAR transformer"):
        generator = _var_generator(_state(transformer, "transformer"), scales, heads)
    classes = generator.config["num_classes"]
    if class_names and len(class_names) != classes:
        raise SettingError(f"{len(class_names)} class names for {classes} classes: give one for each")
    converted = None
    if tokenizer is not None:
        with _inferring("VAR tokenizer"):
            state = _state(tokenizer, "tokenizer")
            converted = _multiscale_tokenizer(state, list(generator.config["scales"]), phi_ratio)
    return NextScalePipeline(converted, generator, id2label=dict(enumerate(class_names or [])))


def save(pipeline: Pipeline, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a converted pipeline into the folder `out`, whole or not at all, with weights cast to `dtype`.

    Where a model beside it holds the very same tokenizer, as VAR's all do, the two folders share one copy on disk.
    """
    if out.exists() and not (out / "model_index.json").is_file() and any(out.iterdir()):
        raise SettingError(f"{out} is not empty and holds no model: choose another --out")
    for module in (pipeline.tokenizer, pipeline.generator):
        if module is not None:
            torch.nn.Module.to(module, dtype)
    with atomic_folder(out) as partial:
        pipeline.save_pretrained(partial)
        for weights in partial.glob("tokenizer/*.safetensors"):
            for twin in out.parent.glob(f"[!.]*/tokenizer/{weights.name}"):
                same_size = twin.stat().st_size == weights.stat().st_size
                if twin.parents[1] != out and same_size and sha256(twin) == sha256(weights):
                    _share(twin, weights)
                    break


def _share(twin: Path, copy: Path) -> None:
    """Replace `copy` by a hard link to `twin`; a file system without such links keeps the copy."""
    link = copy.with_suffix(".link")
    try:
        os.link(twin, link)
    except OSError:
        return
    link.replace(copy)


FAMILIES: dict[str, Callable[..., Pipeline]] = {"var": convert_var}


# ---- VAR's transformer

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
VAR_BUFFERS = re.compile(r"^(lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias)$")


def _var_generator(state: State, scales: list[int] | None, heads: int | None) -> VAR:
    if any(".mamba." in name for name in state):
        raise CheckpointError("this is an M-VAR checkpoint (it has Mamba blocks), not a VAR one")
    _require(state, "VAR transformer", "word_embed.weight", "pos_1LC", "class_emb.weight", "head.weight")
    width, code_dim = state["word_embed.weight"].shape
    depth = _count(state, r"^blocks\.(\d+)\.")
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
        "depth": depth,
        "heads": told,
        "qk_norm": qk_norm,
        "shared_adaln": "shared_ada_lin.1.weight" in state,
    }
    if sum(side * side for side in config["scales"]) != state["pos_1LC"].shape[1]:
        raise CheckpointError(f"scales {config['scales']} do not add up to the {state['pos_1LC'].shape[1]} positions")
    renamed = {_rename(name, VAR_NAMES): tensor for name, tensor in state.items() if not VAR_BUFFERS.match(name)}
    for name, tensor in renamed.items():  # published tables have leading axes of 1, to be broadcast
        if name.endswith(("position", "log_scale", "adaln_table")):
            renamed[name] = tensor.flatten(0, 2 if name.endswith("adaln_table") else 1)
    return _build(VAR, config, renamed, "VAR transformer", VAR_NAMES)


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
    _require(state, "VAR tokenizer", "quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight")
    vocab_size, code_dim = state["quantize.embedding.weight"].shape
    base, channels = state["encoder.conv_in.weight"].shape[:2]
    levels = _count(state, r"^encoder\.down\.(\d+)\.")
    blocks = _count(state, r"^encoder\.down\.0\.block\.(\d+)\.")
    widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    renamed = {_rename(name, VQ_NAMES): tensor for name, tensor in state.items()}
    usage = renamed.get("codebook.usage")
    if usage is None or usage.shape != (len(scales), vocab_size):
        usage = torch.zeros(len(scales), vocab_size)  # statistics only: for other scales there are none yet
    renamed["codebook.usage"] = usage / usage.sum(1, keepdim=True).clamp_min(1)  # hit counts to shares
    config = {
        "scales": scales,
        "vocab_size": vocab_size,
        "code_dim": code_dim,
        "image_channels": channels,
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "blocks": blocks,
        "attention_levels": [i for i in range(levels) if f"encoder.down.{i}.attn.0.qkv.weight" in state],
        "num_phi": _count(renamed, r"^phi\.(\d+)\."),
        "phi_ratio": phi_ratio,
    }
    return _build(MultiScaleVQ, config, renamed, "VAR tokenizer", VQ_NAMES)


# ---- shared by all families


def _state(source: Source, role: str) -> State:
    """The flat dictionary of tensors in a file or mapping; training checkpoints hold it a level or two down."""
    found: Any = read_tensors(Path(source)) if isinstance(source, (str, Path)) else source
    inner = {"transformer": ("var_wo_ddp", "mvar_wo_ddp"), "tokenizer": ("vae_local",)}[role]
    for _ in range(4):
        if any(isinstance(value, Tensor) for value in found.values()):
            break
        wrapped = [key for key in (*inner, "trainer", "state_dict", "model", "module") if key in found]
        if not wrapped or not isinstance(found[wrapped[0]], Mapping):
            break
        found = found[wrapped[0]]
    strangers = [str(key) for key, value in found.items() if not isinstance(value, Tensor)]
    if not found or strangers:
        held = f"{strangers[0]!r} is not a tensor" if strangers else "it is empty"
        raise CheckpointError(f"the {role} is not a dictionary of tensors: {held}")
    return dict(found)


@contextmanager
def _inferring(what: str) -> Iterator[None]:
    """Shapes are unpacked, divided and looked up long before they are compared: say what that means."""
    try:
        yield
    except (CheckpointError, SettingError):
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        found = " ".join(str(error).split())
        raise CheckpointError(f"not a {what}: its tensors have unexpected names or shapes ({found})") from error


def _require(state: State, kind: str, *names: str) -> None:
    if missing := [name for name in names if name not in state]:
        raise CheckpointError(f"not a {kind}: it lacks {', '.join(missing)} (it has {next(iter(state))}, ...)")


def _count(state: State, pattern: str) -> int:
    """One more than the highest number that `pattern` finds."""
    numbers = [int(match[1]) for match in (re.match(pattern, name) for name in state) if match]
    return max(numbers, default=-1) + 1


def _rename(name: str, table: list[tuple[str, str]]) -> str:
    """`name` with the first matching prefix of the table's left column replaced by the right one."""
    for old, new in table:
        pattern = re.escape(old).replace(re.escape("{i}"), r"(\d+)")
        renamed, hits = re.subn(f"^{pattern}", new.replace("{i}", r"\1"), name)
        if hits:
            return renamed
    return name


def _build(
    kind: type[ModelMixin], config: dict[str, Any], state: State, what: str, names: list[tuple[str, str]]
) -> Any:
    """A model of `config` that holds the tensors of `state`, built without spending time on random weights."""
    with torch.device("meta"):
        model = kind(**config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & given.keys() if wanted[name] != given[name])
    theirs = [(ours, published) for published, ours in names]  # errors name tensors as the file does
    if missing or unexpected or wrong:
        parts = [f"missing {_some(missing, theirs)}"] if missing else []
        parts += [f"unexpected {_some(unexpected, theirs)}"] if unexpected else []
        parts += [f"{_rename(name, theirs)} is {given[name]} instead of {wanted[name]}" for name in wrong[:1]]
        raise CheckpointError(f"the {what} does not fit its own configuration: {'; '.join(parts)}")
    model.load_state_dict(_finished(state, what, theirs), assign=True)
    return model.eval().requires_grad_(False)


def _finished(state: State, what: str, theirs: list[tuple[str, str]]) -> State:
    """The tensors in float32, contiguous and checked to be numbers."""
    finished = {}
    with progress(len(state), f"convert {what}", "tensors", lines=4) as shown:
        for name, tensor in state.items():
            finished[name] = tensor.float().contiguous()
            if not torch.isfinite(finished[name]).all():
                where = _rename(name, theirs)
                raise CheckpointError(f"the {what} holds values that are not numbers, in {where}: get it again")
            shown.advance()
    return finished


def _some(names: list[str], theirs: list[tuple[str, str]]) -> str:
    shown = ", ".join(_rename(name, theirs) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
