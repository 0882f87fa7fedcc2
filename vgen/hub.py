"""Finding and loading models: bundled names, folders and Hub ids."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vgen.files import weight_files
from vgen.generators.far import FAR
from vgen.generators.mage import MAGE
from vgen.generators.mar import MAR
from vgen.generators.masked import MaskedTransformer
from vgen.generators.mvar import MVAR
from vgen.generators.recurrent import RecurrentTransformer
from vgen.generators.var import VAR
from vgen.pipelines.clips import CONTEXT_FILE
from vgen.pipelines.mar import MARPipeline
from vgen.pipelines.masked import MaskedPipeline
from vgen.pipelines.next_frame import NextFramePipeline
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.pipelines.raster import RasterPipeline
from vgen.tokenizers.frames import DCAutoencoder, PatchPCA, PixelPatches, VQLatents
from vgen.tokenizers.frequency import FrequencyVQ
from vgen.tokenizers.kl import KLAutoencoder
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.tokenizers.vqgan import VQGAN
from vgen.types import CheckpointError, SettingError

ZOO = Path(__file__).parent / "zoo"
ROLES = ("tokenizer", "generator")
PIPELINES = {
    cls.__name__: cls for cls in (NextScalePipeline, MaskedPipeline, MARPipeline, NextFramePipeline, RasterPipeline)
}
CODECS = (DCAutoencoder, VQLatents, PatchPCA, PixelPatches)  # of video frames
IMAGE_TOKENIZERS = (MultiScaleVQ, FrequencyVQ, VQGAN, KLAutoencoder)
GENERATORS = (VAR, MVAR, MaskedTransformer, MAGE, MAR, FAR, RecurrentTransformer)
COMPONENTS = (*IMAGE_TOKENIZERS, *CODECS, *GENERATORS)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def list_models() -> list[str]:
    """Names of the bundled models."""
    return sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))


def load(name: str | Path, *, device: Any = None, dtype: Any = None) -> Any:
    """Load a pipeline: a bundled name, a folder, or a Hub id ("user/model"; only that touches the network).

    Args:
        device: torch device or its name; default "cuda" where present, else "cpu".
        dtype: torch dtype or its name; default float32 on a CPU, bfloat16 on a GPU. Codebooks stay float32.

    Raises SettingError for an unknown name, CheckpointError for damaged files.
    """
    folder = find(str(name))
    chosen, kind = place(device, dtype)
    pipeline_class, components, config = _read_index(folder)
    places = component_folders(folder)
    parts = {role: load_component(cls, places[role], kind) for role, cls in components.items()}
    try:
        pipeline = pipeline_class(**{role: parts.get(role) for role in ROLES}, **config)
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'model_index.json'} has settings of another kind: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.source, pipeline.folder, pipeline.files = str(name), folder, model_files(folder)
    return pipeline.to(chosen)


def load_tokenizer(name: str | Path, *, device: Any = None, dtype: Any = None) -> tuple[Any, Path]:
    """A tokenizer and its folder: of a pipeline that `load` takes, or trained by itself. Raises like `load`."""
    own = Path(name).expanduser()
    folder = own if (own / "config.json").is_file() else component_folders(find(str(name)))["tokenizer"]
    chosen, kind = place(device, dtype)
    try:
        class_name = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{name} holds no tokenizer: name a pipeline that has one, or a trained tokenizer"
        ) from error
    known = {cls.__name__: cls for cls in COMPONENTS if hasattr(cls, "encode") and hasattr(cls, "decode")}
    if not isinstance(class_name, str) or class_name not in known:
        raise SettingError(f"{name} is a {class_name}, no tokenizer: use one of {', '.join(known)}")
    return load_component(known[class_name], folder, kind).to(chosen), folder


def place(device: Any, dtype: Any) -> tuple[torch.device, torch.dtype]:
    """Where and in which precision to load: by default on the GPU in bfloat16, else on the CPU in float32."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SettingError(f"device is {device!r}: use 'cpu' or 'cuda'") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingError("device is 'cuda', but no GPU is visible: use device='cpu'")
    if dtype is not None:
        return chosen, parse_dtype(dtype)
    return chosen, torch.float32 if chosen.type == "cpu" else torch.bfloat16


def parse_dtype(dtype: Any) -> Any:
    """A torch dtype from itself or its name. Raises SettingError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SettingError(f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def find(name: str) -> Path:
    """The folder that holds a model, downloaded from the Hub where `name` is an id."""
    if (folder := find_local(name)) is not None:
        return folder
    if Path(name).expanduser().exists():
        raise SettingError(f"{name} holds no model_index.json: give the folder that 'vgen convert' or training wrote")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _download(name)
    raise SettingError(f"unknown model {name!r}: use {', '.join(list_models())}, a folder, or a Hub id like user/model")


def find_local(name: str) -> Path | None:
    """The folder of a bundled model or of a model on this disk; None for anything else."""
    for folder in (ZOO / name if name in list_models() else None, Path(name).expanduser()):
        if folder is not None and (folder / "model_index.json").is_file():
            return folder
    return None


def component_folders(folder: Path) -> dict[str, Path]:
    """Where the parts of a model lie: in its own folder, but a tokenizer also in that of the bundled model which
    `model_index.json` names under `_tokenizer_of`. Raises CheckpointError where that is no bundled model."""
    places = {role: folder / role for role in ROLES}
    owner = _index(folder).get("_tokenizer_of")
    if owner is not None:
        if owner not in list_models():
            raise CheckpointError(f"{folder} uses the tokenizer of {owner!r}, which is no bundled model: get it again")
        places["tokenizer"] = ZOO / owner / "tokenizer"
    return places


def model_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's parts, in the order in which their hash is taken."""
    return [file for role in sorted(ROLES) for file in weight_files(component_folders(folder)[role])]


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "README.md", CONTEXT_FILE]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise SettingError(
            f"{name!r} is no folder here, and the Hub did not give it ({type(error).__name__}): check the name and "
            f"the network, or use a bundled model: {', '.join(list_models())}"
        ) from error


def _read_index(folder: Path) -> tuple[type, dict[str, type], dict[str, Any]]:
    """The pipeline class, its components' classes and its settings. Only classes of this package are ever built."""
    path, index = folder / "model_index.json", _index(folder)
    try:
        name = index.pop("_class_name")
        named = {role: tuple(index.pop(role, (None, None))) for role in ROLES}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: get the model again") from error
    components = {role: found for role, found in named.items() if any(found)}
    if "generator" not in components:
        raise CheckpointError(f"{path} names no generator: get the model again")
    known = {(cls.__module__, cls.__name__): cls for cls in COMPONENTS}
    strangers = [str(found) for found in components.values() if found not in list(known)]
    if name not in PIPELINES or strangers:
        raise CheckpointError(f"{path} names {(strangers or [name])[0]}, which is no part of this version of vgen")
    config = {key: value for key, value in index.items() if key[0] != "_"}
    return PIPELINES[name], {role: known[found] for role, found in components.items()}, config


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: get the model again") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} is damaged: get the model again")
    return index


def load_component(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model whose weights are all there and all used. Raises CheckpointError."""
    try:
        # diffusers would cast a tokenizer's codes too; loaded in float32 and cast by itself, it keeps them.
        first = torch.float32 if folder.name == "tokenizer" else dtype
        with _quiet_diffusers():
            model, report = cls.from_pretrained(folder, dtype=first, local_files_only=True, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"cannot load {folder}: {lines[0]}; get the model again") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := list(report.get(problem) or []):
            words = problem.replace("_keys", "")
            raise CheckpointError(f"{folder} has {len(found)} {words} tensors, such as {found[0]}: get the model again")
    return torch.nn.Module.to(model.eval(), dtype)  # diffusers' own `to` warns of what is no problem here


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Its warnings about tensors come before our errors, which say the same in one line."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
