"""What a file holds, without loading weights: for `vgen info` and the studio."""

import dataclasses
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

from vgen import __version__, hub, scan
from vgen.files import safetensors_header, sha256
from vgen.media import read_request
from vgen.types import CheckpointError, SettingError


def describe(path: str) -> dict[str, Any]:
    """A PNG's request, a safetensors file's tensors, or a model's configuration, parameters, bytes and hash.

    Raises SettingError or CheckpointError for anything else.
    """
    file = Path(path).expanduser()
    if file.is_file():
        header = safetensors_header(file)
        if header is None:
            return {"kind": "image", **dataclasses.asdict(read_request(file))}
        return {"kind": "safetensors", **_describe_tensors(file, header)}
    folder = hub.find_local(path)
    if folder is None:
        raise SettingError(f"{path} is no picture, model folder, .safetensors file or bundled model")
    return {"kind": "model", **_describe_model(folder)}


def describe_machine() -> dict[str, Any]:
    """What decides results and speed here: versions, the device that models are loaded on by default, threads, and
    how Mamba's scans are computed."""
    device, dtype = hub.place(None, None)
    cuda = device.type == "cuda"
    return {
        "kind": "machine",
        "vgen": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"cuda ({torch.cuda.get_device_name()})" if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "scan": scan.report(),
    }


def _describe_tensors(file: Path, header: dict[str, Any]) -> dict[str, Any]:
    tensors = _shapes(file, header)
    return {
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "metadata": header.get("__metadata__", {}),
        "parameters": sum(math.prod(shape) for shape in tensors.values()),
        "tensors": tensors,
    }


def _shapes(file: Path, header: dict[str, Any] | None) -> dict[str, list[int]]:
    """Shapes by tensor name, from a header that may hold anything."""
    try:
        if header is None:
            raise ValueError("it has no header")
        return {name: [int(n) for n in entry["shape"]] for name, entry in header.items() if name != "__metadata__"}
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or truncated: get it again") from error


def _describe_model(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "model_index.json").read_text())
        components = {}
        for role, place in sorted(hub.component_folders(folder).items()):
            if (config := place / "config.json").is_file():
                values = json.loads(config.read_text())
                components[role] = {key: value for key, value in values.items() if key[0] != "_"}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} has a damaged configuration: get the model again") from error
    files = hub.model_files(folder)
    shapes = [shape for file in files for shape in _shapes(file, safetensors_header(file)).values()]
    return {
        "pipeline": index.get("_class_name"),
        "classes": list((index.get("id2label") or {}).values()),
        "components": components,
        "parameters": sum(math.prod(shape) for shape in shapes),
        "bytes": sum(file.stat().st_size for file in files),
        "checkpoint": sha256(*files),
    }
