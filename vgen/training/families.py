"""Building the model that a configuration names."""

from collections.abc import Sequence
from typing import Any

import torch

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
