"""The model card: what a model is, what it was trained on, with which command, how long, and how well."""

import re
import subprocess
from pathlib import Path

from torch import nn

from vgen import __version__
from vgen.hub import component_folders, find_local
from vgen.training.config import TrainingConfig
from vgen.training.curves import BOOKKEEPING


def model_card(
    config: TrainingConfig, model: nn.Module, figures: dict[str, float], times: tuple[float, float], command: str
) -> str:
    """Markdown with the Hub's metadata; `figures` are the last logged ones, `times` wall-clock and CPU seconds."""
    seconds, cpu_seconds = times
    rows = {
        "data": f"{config.data}, train split",
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        "command": f"`{command}`",
        **({"begun with": f"`{config.init_from}`{_spent_on(config)}"} if config.init_from else {}),
        "steps": f"{config.steps}, batch {config.batch_size}",
        "time": f"{cpu_seconds / 60:.0f} CPU-minutes of training steps ({seconds / 60:.0f} minutes of wall clock)",
        "code revision": revision(),
        **{name: f"{value:.4g}" for name, value in figures.items() if name not in BOOKKEEPING},
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    head = f"---\nlicense: {config.license}\nlibrary_name: vgen\n---\n# {config.name}\n"
    return f"{head}\n{config.notes.strip()}\n\n| | |\n|---|---|\n{table}"


def cpu_minutes(card: str) -> int | None:
    """CPU-minutes of training that a card tells, with those of the model that it began with; None where it does not."""
    found = re.search(r"^\| time \| (\d+) CPU-minutes", card, re.MULTILINE)
    before = re.search(r"^\| begun with \| .*\((\d+) CPU-minutes\)", card, re.MULTILINE)
    return int(found[1]) + (int(before[1]) if before else 0) if found else None


def _spent_on(config: TrainingConfig) -> str:
    """What a card adds to the name of the model that a run began with; nothing where that has no card."""
    folder = find_local(str(config.init_from))
    if folder is not None and config.kind in ("tokenizer", "decoder"):
        folder = component_folders(folder)["tokenizer"]
    card = (folder or Path(str(config.init_from)).expanduser()) / "README.md"
    minutes = cpu_minutes(card.read_text(errors="replace")) if card.is_file() else None
    return "" if minutes is None else f" ({minutes} CPU-minutes)"


def revision() -> str:
    """The git commit of this checkout, or the released version."""
    root = Path(__file__).parents[2]
    if (root / "pyproject.toml").is_file():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return f"vgen {__version__}"
