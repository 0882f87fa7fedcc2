"""Building the model that a configuration names."""

from collections.abc import Sequence
from typing import Any

import torch

from vgen.hub import load, load_tokenizer
from vgen.training.config import TrainingConfig
from vgen.types import SettingError


def build_model(
    families: dict[str, Any], config: TrainingConfig, *, without: Sequence[str] = (), **decided: Any
) -> Any:
    """The family's model with the configuration's settings and those that data and tokenizer decide, freshly seeded.

    `without` names settings that are for its initialisation, not its constructor.
    Raises SettingError for an unknown family or setting.
    """
    if config.family not in families:
        raise SettingError(f"unknown {config.kind} family {config.family!r}: use one of {', '.join(families)}")
    torch.manual_seed(config.seed)
    try:
        settings = {name: value for name, value in config.model.items() if name not in without}
        return families[config.family](**decided, **settings)
    except TypeError as error:
        raise SettingError(f"model settings of {config.name}: {error}") from error


def start_from(model: Any, name: str) -> None:
    """Give `model` the weights of a trained one: a tokenizer's, or those of a pipeline's generator.

    Settings that the class calls `adjustable` may differ. Raises SettingError where that is of another class or has
    other settings, CheckpointError where it is damaged.
    """
    if hasattr(model, "encode"):
        trained = load_tokenizer(name, device="cpu", dtype=torch.float32)[0]
    else:
        trained = load(name, device="cpu", dtype=torch.float32).generator
    if type(trained) is not type(model):
        raise SettingError(
            f"init_from is {name!r}, a {type(trained).__name__}: it must be a {type(model).__name__}, as is trained"
        )
    ours, theirs = ({key: value for key, value in found.config.items() if key[0] != "_"} for found in (model, trained))
    for key, value in ours.items():
        if key not in getattr(model, "adjustable", ()) and plain(value) != plain(theirs.get(key)):
            raise SettingError(
                f"init_from is {name!r}, whose {key} is {theirs.get(key)}, here {value}: make them equal"
            )
    model.load_state_dict(trained.state_dict())


def plain(value: Any) -> Any:
    """Settings as JSON would give them back: tuples as lists."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
