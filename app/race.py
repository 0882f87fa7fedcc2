"""A race of samplers: the same class and seeds by several samplers or settings, and what tokens they differ in.

Knows no Gradio.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.app.core import Studio
from vgen.app.forms import MAX_TEXT, Ask, parse_settings
from vgen.app.measured import Comparison, Measured, names_below, write_table
from vgen.types import SettingError, Step

MAX_ENTRANTS = 8
MAX_EACH = 9  # samples of each run
GUIDED, UNGUIDED = ("guidance_scale=1", "guidance_scale=2", "guidance_scale=4"), ("temperature=0.5", "temperature=1")
SCHEDULES = ("autoregressive", "pyramid", "full-sequence")


def parse_entrant(line: str) -> tuple[str | None, dict[str, Any]]:
    """ "halton steps=8, top_k=10" -> sampler and settings; the sampler may be left out. Raises SettingError."""
    words = [word for word in re.split(r"[,\s]+", re.sub(r"\s*=\s*", "=", line.strip())) if word]
    sampler = words.pop(0) if words and "=" not in words[0] else None
    settings = parse_settings("\n".join(words))
    named = settings.pop("sampler", None)
    if named is not None and sampler is not None:
        raise SettingError(f"{line[:60]!r} names two samplers: name one")
    return sampler if named is None else str(named), settings


def entrants(studio: Studio, base: Ask, text: str) -> Comparison:
    """A race of the lines of a text, each a sampler and settings. Raises SettingError, naming the line."""
    if len(text) > MAX_TEXT:
        raise SettingError(f"the entrants have {len(text)} characters, the limit is {MAX_TEXT}")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not 1 < len(lines) <= MAX_ENTRANTS:
        raise SettingError(
            f"a race has 2 to {MAX_ENTRANTS} entrants, not {len(lines)}: write one a line, such as {GUIDED[1]}"
        )
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            sampler, settings = parse_entrant(line)
            request = studio.request(replace(base, sampler=sampler, settings=settings))
        except SettingError as error:
            raise SettingError(f"entrant {number}, {line[:60]!r}: {error}") from error
        runs.append(Measured(f"{number}. {line}", request))
    return Comparison(base.model, runs)


def suggest(pipeline: Any) -> list[str]:
    """Entrants that tell something about a model: its samplers, or what its only one does with other settings."""
    settings = pipeline.resolve_settings({})
    if len(pipeline.samplers) > 1:
        return list(pipeline.samplers)
    if "schedule" in settings:
        return [f"schedule={name}" for name in SCHEDULES]
    return list(GUIDED if pipeline.null_class else UNGUIDED)


def placed(comparison: Comparison) -> list[Measured]:
    """Finished runs, the quickest first."""
    return sorted(comparison.done, key=lambda run: run.seconds)


# ---- differences


def differing(first: Step | None, other: Step | None) -> list[Tensor] | None:
    """Which tokens of two steps differ: (B, n) bool of every scale, one scale where there are none.

    None where tokens are no codes, or of other shapes.
    """
    if first is None or other is None:
        return None
    ours, theirs = (step.tokens if isinstance(step.tokens, list) else [step.tokens] for step in (first, other))
    if [part.shape for part in ours] != [part.shape for part in theirs] or ours[0].is_floating_point():
        return None
    return [a != b for a, b in zip(ours, theirs, strict=True)]


def pixel_difference(first: Measured, other: Measured) -> float:
    """Mean absolute difference of the finished pixels, in levels of 255."""
    assert first.newest is not None and other.newest is not None
    a, b = (run.newest.pixels(-1).float() for run in (first, other))  # type: ignore[union-attr]
    return float((a - b).abs().mean())


def describe_difference(first: Measured, other: Measured) -> str:
    """In how many tokens, scale by scale, and by how much in pixels a run differs from the first."""
    levels = f"pixels differ by {pixel_difference(first, other):.1f} of 255 levels on average"
    found = differing(first.step, other.step)
    if found is None:
        return f"no codes to compare; {levels}"
    counts = [(int(part.sum()), part.numel()) for part in found]
    changed, number = sum(count for count, _ in counts), sum(total for _, total in counts)
    if not changed:
        return f"the same {number} tokens; {levels}"
    text = f"{changed} of {number} tokens differ ({100 * changed / number:.0f}%)"
    if len(counts) > 1:
        text += f", by scale {' '.join(f'{count}/{total}' for count, total in counts)}"
    return f"{text}; {levels}"


def outline(mask: Tensor) -> tuple[int, str, str] | None:
    """Of the cells of a square grid that are set, (n,) bool: its side, the other cells as an SVG path, and the border
    between the two as another one; None where it is no square."""
    side = round(len(mask) ** 0.5)
    if side * side != len(mask):
        return None
    found = {divmod(index, side) for index in torch.nonzero(mask.cpu())[:, 0].tolist()}
    others = [(row, column) for row in range(side) for column in range(side) if (row, column) not in found]
    border = []
    for row, column in sorted(found):
        sides = {
            (row - 1, column): f"M{column} {row}h1",
            (row + 1, column): f"M{column} {row + 1}h1",
            (row, column - 1): f"M{column} {row}v1",
            (row, column + 1): f"M{column + 1} {row}v1",
        }
        border += [path for neighbour, path in sides.items() if neighbour not in found]
    return side, "".join(f"M{column} {row}h1v1h-1z" for row, column in others), "".join(border)


# ---- files


def summarise(comparison: Comparison, folder: Path) -> Sequence[Path]:
    """The finishing order as a table."""
    first = comparison.runs[0]
    rows = []
    for place, run in enumerate(placed(comparison), start=1):
        found = differing(first.step, run.step) if first.state == "done" else None
        rows.append(
            {
                "place": place,
                "entrant": run.label,
                "evaluations": run.evaluations,
                "milliseconds": round(run.milliseconds, 3),
                "milliseconds_per_evaluation": round(run.milliseconds / max(1, run.evaluations), 3),
                "tokens_unlike_first": "" if found is None else sum(int(part.sum()) for part in found),
                "files": names_below(run.files, folder),
            }
        )
    return [write_table(rows, folder / "race.csv")]
