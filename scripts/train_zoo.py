"""The bundled models from their presets, end to end: `python scripts/train_zoo.py moving-far fashion-var`.

Trains what each model stands on first (the tokenizer or model that its preset names under runs/), goes on where it was
stopped, skips what is finished, and with --install puts the finished models, each with its card, into vgen/zoo.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from vgen.files import atomic_folder, read_tensors, weight_files
from vgen.hub import ZOO
from vgen.training.config import TrainingConfig, list_presets, load_config
from vgen.training.decoders import DECODERS
from vgen.training.run import start
from vgen.training.trainer import checkpoints
from vgen.types import SettingError

LIMIT = 40_000_000  # bytes of the whole zoo, so that a clone stays small


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Which; default: all that have a preset.")] = None,
    install: Annotated[bool, typer.Option(help="Put finished models into the zoo.")] = False,
    data_root: Annotated[str | None, typer.Option(help="Where data sets lie.")] = None,
    zoo: Annotated[Path, typer.Option(help="The folder of bundled models.")] = ZOO,
) -> None:
    """Train models of the zoo in runs/, each after what it needs."""
    bundled = sorted(path.name for path in ZOO.iterdir() if path.name in list_presets())
    try:
        for name in models or bundled:
            last = finished_by(name)
            for preset in chain(last):
                print(train(preset, data_root))
            if install:
                print(put(Path("runs") / last / "model", zoo / name))
    except SettingError as error:
        raise typer.BadParameter(str(error)) from error


def finished_by(model: str) -> str:
    """The preset whose run ends with a bundled model: that of its decoder, where it is trained further."""
    return f"{model}-decoder" if f"{model}-decoder" in list_presets() else model


def chain(preset: str) -> list[str]:
    """The presets that must be trained for `preset`, in order, itself last: of what it takes out of runs/."""
    config = load_config(preset)
    needed = [Path(path).parts[1] for path in (config.tokenizer, config.init_from) if path and path[:5] == "runs/"]
    return list(dict.fromkeys([*[name for item in needed for name in chain(item)], preset]))


def train(preset: str, data_root: str | None) -> Path:
    """The folder of a preset's finished model, trained from where its run stands."""
    config: TrainingConfig = load_config(preset, [f"data_root={data_root}"] if data_root else [])
    out = Path("runs") / config.name
    if (out / "model").is_dir():
        return out / "model"
    command = f"vgen train {config.kind} --preset {preset}"
    return start(config, out, resume=bool(checkpoints(out)), command=command)


def put(trained: Path, place: Path) -> Path:
    """Replace the model in `place` by a trained one. A tokenizer that another bundled model has is not stored again.

    Raises SettingError where the zoo would grow too large; then it stays as it was.
    """
    owner = tokenizer_owner(trained / "tokenizer", place)
    with atomic_folder(place) as partial:
        shutil.copytree(trained, partial, dirs_exist_ok=True)
        if owner:
            shutil.rmtree(partial / "tokenizer")
            index = json.loads((partial / "model_index.json").read_text()) | {"_tokenizer_of": owner}
            (partial / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        others = [path for path in place.parent.iterdir() if path.name[0] != "." and path != place]
        files = [file for folder in (*others, partial) for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        if size > LIMIT:
            raise SettingError(f"with {place.name} the zoo has {size / 1e6:.2f} MB: {LIMIT / 1e6:.0f} at most")
    return place


def tokenizer_owner(tokenizer: Path, place: Path) -> str | None:
    """The bundled model, not that of `place`, whose tokenizer gives the same tokens; None: this one must be stored."""
    if not tokenizer.is_dir():
        return None
    others = (path for path in sorted(place.parent.glob("*/tokenizer")) if path.parent != place)
    return next((path.parent.name for path in others if _same_tokens(path, tokenizer)), None)


def _same_tokens(one: Path, other: Path) -> bool:
    """Whether two tokenizers have the same settings, and the same weights but for a decoder trained further."""
    settings = [json.loads((part / "config.json").read_text()) for part in (one, other)]
    ours, theirs = ({key: value for key, value in found.items() if key[0] != "_"} for found in settings)
    weights, others = _coding_weights(one), _coding_weights(other)
    if ours != theirs or weights.keys() != others.keys():
        return False
    return all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def _coding_weights(tokenizer: Path) -> dict[str, torch.Tensor]:
    """Those that tokens come from."""
    found = {name: tensor for file in weight_files(tokenizer) for name, tensor in read_tensors(file).items()}
    return {name: tensor for name, tensor in found.items() if name.split(".")[0] not in DECODERS}


if __name__ == "__main__":
    typer.run(main)
