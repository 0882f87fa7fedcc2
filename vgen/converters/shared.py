"""What all converters share: reading states, inferring with clear errors, renaming, strict loading."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vgen.files import read_tensors
from vgen.progress import progress
from vgen.types import CheckpointError, SettingError

State = dict[str, Tensor]
Source = str | Path | Mapping[str, Any]


def read_state(source: Source, role: str, inner: Sequence[str] = ()) -> State:
    """The flat dictionary of tensors in a file or mapping; training checkpoints hold it a level or two down.

    `inner` are the keys under which this family's checkpoints keep it, the preferred first.
    """
    found: Any = read_tensors(Path(source)) if isinstance(source, (str, Path)) else source
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
    if all(name.startswith("module.") for name in found):  # saved from inside DistributedDataParallel
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return dict(found)


@contextmanager
def inferring(what: str) -> Iterator[None]:
    """Shapes are unpacked, divided and looked up long before they are compared: say what that means."""
    try:
        yield
    except (CheckpointError, SettingError):
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        found = " ".join(str(error).split())
        raise CheckpointError(f"this is no {what}: its tensors have unexpected names or shapes ({found})") from error


def require(state: State, kind: str, *names: str) -> None:
    """Raise CheckpointError where a checkpoint, which is to be a `kind`, lacks one of these tensors."""
    if missing := [name for name in names if name not in state]:
        raise CheckpointError(f"this is no {kind}: it lacks {', '.join(missing)} (it has {next(iter(state))}, ...)")


def count(state: State, pattern: str) -> int:
    """One more than the highest number that `pattern` finds."""
    numbers = [int(match[1]) for match in (re.match(pattern, name) for name in state) if match]
    return max(numbers, default=-1) + 1


def labels(class_names: list[str] | None, classes: int) -> dict[int, str]:
    """Class names by id. Raises SettingError where there is not one for each class."""
    if class_names and len(class_names) != classes:
        raise SettingError(f"{len(class_names)} class names for {classes} classes: give one for each")
    return dict(enumerate(class_names or []))


def network_size(state: State) -> dict[str, Any]:
    """Channels, widths and blocks of an autoencoder with the published names of its convolutions."""
    base, channels = state["encoder.conv_in.weight"].shape[:2]
    levels = count(state, r"^encoder\.down\.(\d+)\.")
    widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    return {
        "image_channels": channels,
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "blocks": count(state, r"^encoder\.down\.0\.block\.(\d+)\."),
    }


def rename(name: str, table: list[tuple[str, str]]) -> str:
    """`name` with the first matching prefix of the table's left column replaced by the right one."""
    for old, new in table:
        pattern = re.escape(old).replace(re.escape("{i}"), r"(\d+)")
        renamed, hits = re.subn(f"^{pattern}", new.replace("{i}", r"\1"), name)
        if hits:
            return renamed
    return name


def build(kind: type[ModelMixin], config: dict[str, Any], state: State, what: str, names: list[tuple[str, str]]) -> Any:
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
        parts += [f"{rename(name, theirs)} is {given[name]} instead of {wanted[name]}" for name in wrong[:1]]
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
                where = rename(name, theirs)
                raise CheckpointError(f"the {what} holds values that are not numbers, in {where}: get it again")
            shown.advance()
    return finished


def _some(names: list[str], theirs: list[tuple[str, str]]) -> str:
    shown = ", ".join(rename(name, theirs) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
