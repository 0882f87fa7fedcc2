"""The grid of tokens over a picture on which tokens are marked by clicks or keys."""

import html
import math
from collections.abc import Sequence

from torch import Tensor

from vgen.app.parts import picture_html

# Clicks report a token; arrow keys move, and the button that has the focus keeps it when the grid is drawn anew.
MARKS_JS = """
let place = null;
const cells = () => [...element.querySelectorAll('button[data-token]')];
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-token]');
  if (!button) return;
  place = Number(button.dataset.token);
  trigger('click', {token: place});
});
element.addEventListener('keydown', (event) => {
  const button = event.target.closest('button[data-token]');
  if (!button) return;
  const side = Number(button.parentElement.dataset.side);
  const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side}[event.key];
  if (by === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  const next = cells()[Number(button.dataset.token) + by];
  if (!next) return;
  cells().forEach((cell) => { cell.tabIndex = cell === next ? 0 : -1; });
  next.focus();
});
watch('value', () => {
  if (place !== null && !element.contains(document.activeElement) && document.activeElement === document.body) {
    const cell = cells()[place];
    if (!cell) return;
    cells().forEach((other) => { other.tabIndex = other === cell ? 0 : -1; });
    cell.focus({preventScroll: true});
  }
});
"""


def marks_html(png: bytes | None, marked: Tensor | None, caption: str, empty: str, notes: Sequence[str] = ()) -> str:
    """Tokens (h, h) bool as buttons over a picture, hatched where they are marked, with a caption and lines below;
    `empty` is said where there is no picture."""
    if png is None or marked is None:
        return picture_html(None, "", "", empty)
    side = math.isqrt(marked.numel())
    buttons = []
    for index, on in enumerate(marked.flatten().tolist()):
        row, column = divmod(index, side)
        words = f"row {row + 1}, column {column + 1}: {'drawn anew' if on else 'kept'}"
        buttons.append(
            f'<button type="button" data-token="{index}" tabindex="{-1 if index else 0}" '
            f'aria-pressed="{str(on).lower()}" aria-label="{words}" title="{words}"></button>'
        )
    lines = "".join(f'<p class="vgen-note">{html.escape(line)}</p>' for line in notes)
    return (
        f'<figure class="vgen-marks"><div class="vgen-marks-box">{picture_html(png, "", "")}'
        f'<div class="vgen-marks-grid" role="group" aria-label="Tokens" data-side="{side}" '
        f'style="grid-template-columns:repeat({side},1fr)">{"".join(buttons)}</div></div>'
        f'<figcaption role="status" aria-live="polite">{html.escape(caption)}</figcaption>{lines}</figure>'
    )
