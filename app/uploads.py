"""Checkpoints that visitors bring: looked at by content, never by name, and converted to models of the studio's folder.

Nothing is ever unpickled. Names of folders are made here; what a visitor types is only a part of them.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vgen import conversion, inspection
from vgen.app.core import Studio
from vgen.app.forms import parse_settings
from vgen.app.jobs import Job
from vgen.files import MAX_HEADER_BYTES, safetensors_header, sha256
from vgen.types import CheckpointError, SettingError

MAX_BYTES = 4_000_000_000  # of one checkpoint
MAX_NAME = 40
MAX_SHOWN = 200  # tensors
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # of torch.save, new and old


def check_checkpoint(path: Path, name: str) -> None:
    """Raise CheckpointError, naming the file `name`, unless it is a whole safetensors file of a permitted size."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{name} has {size / 1e9:.1f} GB, the limit is {MAX_BYTES / 1e9:.0f} GB: convert it with "
            "'vgen convert' on the machine itself"
        )
    if safetensors_header(path) is None:
        raise CheckpointError(f"{name} {_what_else(path)}")
    try:
        with safe_open(path, "pt"):  # reads the header and compares it with the file's length; no tensor
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{name} is damaged or cut short: get it again") from error


def _what_else(path: Path) -> str:
    """What a file is that is no safetensors file, and what to do."""
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(PICKLES):
        return (
            "is a pickle, whatever its name: reading one can run code, so it is not read here; ask for safetensors, or "
            "use 'vgen convert' on the machine itself"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, no checkpoint: the download gave an error page; get it again"
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= length <= MAX_HEADER_BYTES:
        return "is damaged or cut short: get it again"
    return "is no safetensors file: its content decides, not its name"


def inspect_checkpoint(path: Path, name: str) -> dict[str, Any]:
    """What a checkpoint holds: bytes, hash, parameters, metadata and the shapes of tensors. Raises CheckpointError."""
    check_checkpoint(path, name)
    told = inspection.describe(str(path))
    tensors = told["tensors"]
    shown = dict(list(tensors.items())[:MAX_SHOWN])
    return {
        "file": name,
        "bytes": told["bytes"],
        "sha256": told["sha256"],
        "parameters": told["parameters"],
        "tensors": len(tensors),
        "metadata": told["metadata"],
        "shapes": {tensor: "x".join(map(str, shape)) or "scalar" for tensor, shape in shown.items()},
    }


def slug(text: Any) -> str:
    """A part of a folder's name from what a visitor typed. Raises SettingError where nothing is left of it."""
    found = re.sub(r"[^a-z0-9]+", "-", str(text or "").lower()).strip("-")[:MAX_NAME].strip("-")
    if not found:
        raise SettingError("the name has no letters or digits of a to z and 0 to 9: write some")
    return found


def overrides(family: str, text: Any) -> dict[str, Any]:
    """name=value lines -> what shapes cannot tell. Raises SettingError for what this family does not take."""
    if family not in conversion.FAMILIES:
        raise SettingError(f"there is no family {str(family)[:40]!r}: choose one of {', '.join(conversion.FAMILIES)}")
    found = parse_settings(str(text or ""))
    known = override_names(family)
    for name, value in found.items():
        if name not in known or isinstance(value, str):
            raise SettingError(f"{name} is no number that {family} takes: use {', '.join(known) or 'none'}")
    return found


def override_names(family: str) -> list[str]:
    """Plain values that a family's converter takes."""
    parameters = list(inspect.signature(conversion.FAMILIES[family]).parameters.values())[2:]
    return [item.name for item in parameters if "list" not in str(item.annotation)]


def submit_conversion(
    studio: Studio, owner: str, family: str, name: Any, transformer: Path | None, tokenizer: Path | None, text: Any
) -> Job:
    """Queue a conversion into the studio's folder of models; the job's view is the new model's name at last.

    Raises SettingError or CheckpointError at once for what cannot be converted.
    """
    check_allowed(studio)
    if studio.models.folder is None:
        raise SettingError("there is no folder for more models: start the studio with --models FOLDER")
    if transformer is None:
        raise SettingError("a checkpoint of the generator is needed: hand one in")
    given = overrides(family, text)
    wanted, folder = slug(name), studio.models.folder
    for path in (transformer, tokenizer):
        if path is not None:
            check_checkpoint(path, path.name)

    def work(job: Job) -> Iterator[None]:
        target = f"{wanted}-{sha256(transformer, *([tokenizer] if tokenizer else []))[:8]}"
        if target in studio.models.folders() or (folder / target).exists():
            raise SettingError(f"{target} is there already: the same checkpoint was converted before")
        yield
        pipeline = conversion.convert(family, transformer=transformer, tokenizer=tokenizer, **given)
        yield
        conversion.save(pipeline, folder / target)
        studio.models.forget(target)
        job.show(target)
        yield

    return studio.jobs.submit(owner, "convert", wanted, work)


def check_allowed(studio: Studio) -> None:
    """Raise SettingError where the studio takes no uploads."""
    if not studio.allow_upload:
        raise SettingError("uploads are off here: start the studio with --allow-upload")
