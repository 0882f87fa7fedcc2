"""Published checkpoints to vgen pipelines: `convert`, one converter per family, and writing what it gives."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vgen.converters.far import convert_far
from vgen.converters.mar import convert_mar
from vgen.converters.maskgit import convert_mage, convert_maskgit
from vgen.converters.mvar import convert_mvar
from vgen.converters.recurrent import convert_recurrent
from vgen.converters.shared import Source
from vgen.converters.var import convert_var
from vgen.files import atomic_folder, sha256
from vgen.pipelines.base import Pipeline
from vgen.types import SettingError

FAMILIES: dict[str, Callable[..., Pipeline]] = {
    "var": convert_var,
    "mvar": convert_mvar,
    "maskgit": convert_maskgit,
    "mage": convert_mage,
    "mar": convert_mar,
    "far": convert_far,
    "recurrent": convert_recurrent,
}


def convert(family: str, *, transformer: Source, tokenizer: Source | None = None, **overrides: Any) -> Pipeline:
    """Turn published weights into a pipeline.

    Args:
        family: "var", "mvar", "maskgit", "mage", "mar", "far" or "recurrent".
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
