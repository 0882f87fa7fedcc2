"""How each family makes its pictures, as one animation: `python scripts/animated_strips.py`.

A row per model, a column per class: what is known after every evaluation, all rows over the same time. The last row are
videos, frame by frame.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vgen import hub
from vgen.files import atomic_file
from vgen.media import to_pil

ROWS = {
    "fashion-var": "next scale",
    "fashion-mvar": "next scale, Mamba",
    "fashion-nfig": "next frequency",
    "fashion-maskgit": "masked tokens",
    "fashion-recurrent": "recurrent depth",
    "emoji-var": "next scale, colour",
    "moving-far": "next frame",
}
COLUMNS, TILE, GAP, LEFT, TOP = 10, 64, 4, 150, 6
TICKS, REST = 24, 10  # of the animation: while pictures are made, and when they are finished
TICK_MS = 110
COLOURS = 128  # of the whole animation


def main(
    seed: Annotated[int, typer.Option(help="Of the first column; the others count on.")] = 20,
    out: Annotated[Path, typer.Option(help="A GIF.")] = Path("docs/strips.gif"),
) -> None:
    """Sample all bundled models and write the animation."""
    torch.set_num_threads(1)
    rows = {name: strip(hub.load(name, device="cpu"), seed) for name in ROWS if name in hub.list_models()}
    frames = [frame({name: at(row, tick) for name, row in rows.items()}) for tick in range(TICKS + REST)]
    palette = frames[-1].quantize(COLOURS, dither=Image.Dither.NONE)
    flat = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in frames]
    with atomic_file(out) as partial:
        flat[0].save(
            partial, format="GIF", save_all=True, append_images=flat[1:], duration=TICK_MS, loop=0, optimize=True
        )
    print(out, f"{out.stat().st_size / 1e6:.2f} MB")


def strip(pipeline: Any, seed: int) -> list[Tensor]:
    """After every evaluation, or of every frame: pictures (COLUMNS, 3, TILE, TILE) uint8."""
    classes = pipeline.null_class
    labels = [column % classes for column in range(COLUMNS)] if classes else None
    seeds = list(range(seed, seed + COLUMNS))
    if pipeline.makes_videos:
        *_, last = pipeline.stream(labels, seeds=seeds)
        found = list(pipeline.decode(last).unbind(1))
    else:
        found = [pipeline.decode(step) for step in pipeline.stream(labels, seeds=seeds)]
    side = found[0].shape[-1]
    zoom, margin = TILE // side, TILE % side // 2
    larger = [pictures.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2) for pictures in found]
    return [F.pad(pictures, (margin,) * 4) for pictures in larger]


def at(row: list[Tensor], tick: int) -> Tensor:
    """What of a row is shown at a tick."""
    return row[min(len(row) - 1, tick * len(row) // TICKS)]


def frame(rows: dict[str, Tensor]) -> Image.Image:
    """One picture of the animation."""
    step = TILE + GAP
    canvas = Image.new("RGB", (LEFT + COLUMNS * step, TOP + len(rows) * step), "white")
    pen, bold, plain = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(12)
    for number, (name, pictures) in enumerate(rows.items()):
        top = TOP + number * step
        pen.text((8, top + 14), ROWS[name], fill="black", font=bold)
        pen.text((8, top + 34), name, fill="#666666", font=plain)
        for column, picture in enumerate(to_pil(pictures)):
            canvas.paste(picture, (LEFT + column * step, top))
    return canvas


if __name__ == "__main__":
    typer.run(main)
