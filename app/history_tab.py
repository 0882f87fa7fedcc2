"""The History tab: what a visitor has made, on disk, to search, star, look at again, delete and bring back."""

import base64
import html
import io
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from vgen.app.core import Studio, told
from vgen.app.forms import copy_as, whole
from vgen.app.generate import COPIES, GenerateTab
from vgen.app.library import MOST, Entry
from vgen.app.parts import PRIVATE, QUICK, friendly, owner_of, picture_html, status_html, tab_named, text_to_copy
from vgen.types import Request, SettingError

PAGE = 48  # files shown at first, and more with every press
TILE = 96  # pixels a side of a thumbnail
MAX_ID = (1 << 62) - 1
MAX_TEXT = 200  # characters of a search
LARGE = 640  # pixels a side of the picture of an opened file
EMPTY = "Nothing here yet: what you generate is kept, and found here again."
NOT_FOUND = "Nothing of yours has all of these words."
CHOOSE = "Choose a picture to see how it was made."
ACTIONS_JS = """
const tell = (data) => trigger('click', data);
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-do]');
  if (!button) return;
  const id = Number(button.dataset.id);
  if (button.dataset.do === 'ticked') {
    const ids = [...element.querySelectorAll('input[data-id]:checked')].map((box) => Number(box.dataset.id));
    return tell({action: 'delete', items: ids});
  }
  tell({action: button.dataset.do, items: [id]});
});
"""


class HistoryTab:
    """Builds the tab's components and wires them to the studio; `join` ties it to the Generate tab."""

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.studio, self.visitor = studio, visitor
        self.opened = gr.State(0)
        self.limit = gr.State(PAGE)
        with gr.Row(elem_classes="vgen-toolbar"):
            self.text = gr.Textbox(
                label="Search",
                placeholder="class, model, sampler, seed",
                elem_id="history-search",
                scale=4,
                min_width=220,
                max_lines=1,
            )
            self.starred = gr.Checkbox(label="Starred only", elem_id="history-starred", scale=1, min_width=170)
            self.undo = gr.Button("Undo last delete", size="sm", elem_id="history-undo", scale=1, min_width=120)
            self.refresh = gr.Button("Refresh", size="sm", scale=1, min_width=90, elem_id="history-refresh")
        self.status = gr.HTML(status_html(""), elem_id="history-status")
        with gr.Row(equal_height=False, elem_classes="vgen-main"):
            with gr.Column(scale=3, min_width=320):
                self.tiles = gr.HTML("", js_on_load=ACTIONS_JS, elem_id="history-tiles")
                self.more = gr.Button("Show more", size="sm", visible=False, elem_id="history-more")
            with gr.Column(scale=2, min_width=300):
                self._details()

    def _details(self) -> None:
        self.picture = gr.HTML(picture_html(None, "", name="history-picture", empty=CHOOSE))
        self.facts = gr.HTML("", elem_id="history-facts")
        with gr.Row():
            self.restore = gr.Button(
                "Restore into Generate", variant="primary", interactive=False, min_width=140, elem_id="history-restore"
            )
            self.download = gr.DownloadButton("Download", interactive=False, min_width=100, elem_id="history-download")
        self.request = text_to_copy("Request", lines=4)
        with gr.Accordion("Copy as", open=False):
            self.show = gr.Button("Show as commands", size="sm", interactive=False)
            self.copies = [text_to_copy(name) for name in COPIES]

    # ---- wiring

    @property
    def listed(self) -> list[Any]:
        return [self.tiles, self.more, self.status]

    @property
    def detail(self) -> list[Any]:
        return [
            self.opened,
            self.picture,
            self.facts,
            self.restore,
            self.download,
            self.request,
            self.show,
            *self.copies,
        ]

    def wire(self, page: gr.Blocks) -> None:
        who = self.visitor
        sought = [who, self.text, self.starred, self.limit]
        for event in (self.text.change, self.starred.input, self.refresh.click):
            event(self.search, sought, self.listed, **QUICK)
        grown = self.more.click(lambda limit: min(limit + PAGE, MOST), [self.limit], [self.limit], **QUICK)
        grown.then(self.search, sought, self.listed, **QUICK)
        self.tiles.click(
            friendly(self.act),
            [who, self.text, self.starred, self.limit, self.opened],
            [*self.listed, *self.detail],
            **QUICK,
        )
        self.undo.click(self.bring_back, sought, self.listed, **QUICK)
        self.show.click(self.commands, [who, self.opened], self.copies, **PRIVATE)

    def join(self, page: gr.Blocks, tabs: gr.Tabs, others: Sequence[Any]) -> None:
        """Let the Generate tab's form be filled from the opened file, and look anew whenever this tab is chosen."""
        generate = next(tab for tab in others if isinstance(tab, GenerateTab))

        @friendly
        def fill(visitor: Any, opened: Any, request: gr.Request) -> list[Any]:
            return self._fill(generate, owner_of(visitor, request), opened)

        self.restore.click(
            fill, [self.visitor, self.opened], [tabs, generate.repeat_part, *generate.filling], **PRIVATE
        )
        sought = [self.visitor, self.text, self.starred, self.limit]
        tab_named(tabs, "history").select(self.search, sought, self.listed, **QUICK)

    def _fill(self, generate: GenerateTab, owner: str, opened: Any) -> list[Any]:
        filled = generate.fill(self._opened(owner, opened).request)
        return [gr.Tabs(selected="generate"), gr.Accordion(open=True), *filled]  # the part says whether pixels differ

    # ---- handlers

    @friendly
    def search(self, visitor: Any, text: Any, starred: Any, limit: Any, request: gr.Request) -> list[Any]:
        """The visitor's files that are sought."""
        return self._found(owner_of(visitor, request), text, starred, limit, "")

    def _found(self, owner: str, text: Any, starred: Any, limit: Any, said: str) -> list[Any]:
        words, only = str(text or "")[:MAX_TEXT], starred is True
        most = min(whole("number of files", limit, 1, MOST), MOST)
        found = self.studio.library.search(owner, words, only, most + 1 if most < MOST else MOST)
        shown, longer = found[:most], len(found) > most
        empty = NOT_FOUND if words.strip() or only else EMPTY
        count = f"{len(shown)}{' newest' if longer else ''} {'file' if len(shown) == 1 else 'files'}"
        status = said or (count if shown else "")
        return [tiles_html(self.studio, shown, empty), gr.Button(visible=longer), status_html(status)]

    def act(
        self, visitor: Any, request: gr.Request, text: Any, starred: Any, limit: Any, opened: Any, event: gr.EventData
    ) -> list[Any]:
        """Open, star or delete what was clicked. What comes from the browser may be anything."""
        owner = owner_of(visitor, request)
        action, items = getattr(event, "action", None), getattr(event, "items", None)
        if not isinstance(items, list) or len(items) > MOST:
            raise SettingError(f"items must be a list of at most {MOST} numbers")
        ids = [whole("item", item, 1, MAX_ID) for item in items]
        nothing: list[Any] = [gr.skip()] * len(self.detail)
        if action == "open" and ids:
            return [*[gr.skip()] * len(self.listed), *self._open(owner, ids[0])]
        if action == "star" and ids:
            entry = self._entry(owner, ids[0])
            self.studio.library.star(owner, entry.id, not entry.starred)
            return [*self._found(owner, text, starred, limit, ""), *nothing]
        if action == "delete":
            return self._delete(owner, ids, text, starred, limit, opened, nothing)
        raise SettingError(f"there is no action {str(action)[:40]!r}: use open, star or delete")

    def _delete(
        self, owner: str, ids: list[int], text: Any, starred: Any, limit: Any, opened: Any, nothing: list[Any]
    ) -> list[Any]:
        theirs = [item for item in ids if self.studio.library.get(owner, item) is not None]
        if not theirs:
            return [*self._found(owner, text, starred, limit, "Nothing is ticked."), *nothing]
        self.studio.library.delete(owner, theirs)
        number = f"{len(theirs)} {'file' if len(theirs) == 1 else 'files'}"
        said = f"Deleted {number}. Undo brings them back for a week."
        return [*self._found(owner, text, starred, limit, said), *(self._close() if opened in theirs else nothing)]

    @friendly
    def bring_back(self, visitor: Any, text: Any, starred: Any, limit: Any, request: gr.Request) -> list[Any]:
        """Undo the last delete."""
        owner = owner_of(visitor, request)
        number = self.studio.library.restore(owner)
        files = f"{number} {'file' if number == 1 else 'files'}"
        return self._found(owner, text, starred, limit, f"Brought back {files}." if number else "Nothing to undo.")

    @friendly
    def commands(self, visitor: Any, opened: Any, request: gr.Request) -> list[str]:
        """The opened file's request as commands, its model being loaded for that."""
        return self._commands(self._opened(owner_of(visitor, request), opened).request)

    # ---- an opened file

    def _opened(self, owner: str, opened: Any) -> Entry:
        return self._entry(owner, whole("item", opened, 0, MAX_ID))

    def _entry(self, owner: str, item: int) -> Entry:
        entry = self.studio.library.get(owner, item)
        if entry is None:
            raise SettingError("this file is not there any more: it was deleted, or is somebody else's")
        return entry

    def _open(self, owner: str, item: int) -> list[Any]:
        entry = self._entry(owner, item)
        asked = entry.request
        copies = self._commands(asked) if asked.model in self.studio.models.loaded() else [""] * len(COPIES)
        ready = gr.Button(interactive=True)
        download = gr.DownloadButton(value=str(entry.path), interactive=True)
        text = json.dumps(json.loads(asked.to_json()), indent=2)
        picture = entry_picture(entry, self._words(asked))
        return [entry.id, picture, facts_html(entry, self._words(asked)), ready, download, text, ready, *copies]

    def _close(self) -> list[Any]:
        empty = picture_html(None, "", name="history-picture", empty=CHOOSE)
        off = gr.Button(interactive=False)
        return [0, empty, "", off, gr.DownloadButton(value=None, interactive=False), "", off, *[""] * len(COPIES)]

    def _commands(self, request: Request) -> list[str]:
        pipeline = self.studio.models.get(request.model)
        pipeline.resolve_sampler(request.sampler)
        return list(copy_as(pipeline, request).values())

    def _words(self, request: Request) -> str:
        return request_words(self.studio, request)


# ---- what is shown


def request_words(studio: Studio, request: Request) -> str:
    """Class and seed in words; classes by number where the model is not there any more."""
    names: Sequence[str] = (
        (told(lambda: studio.models.describe(request.model)["classes"])[0] or [])
        if (request.model in studio.models.folders())
        else []
    )
    labels = list(dict.fromkeys(request.class_labels or []))
    words = [str(names[label]) if 0 <= label < len(names) else f"class {label}" for label in labels[:4]]
    more = f" and {len(labels) - 4} more" if len(labels) > 4 else ""
    return f"{', '.join(words) or 'no class'}{more}, seed {request.seeds[0]}"


def tiles_html(studio: Studio, entries: Sequence[Entry], empty: str) -> str:
    """Every file as a picture to open, a star to press and a box to tick."""
    if not entries:
        return f'<div class="vgen-empty">{html.escape(empty)}</div>'
    tiles = [_tile(entry, request_words(studio, entry.request)) for entry in entries]
    return (
        f'<div class="vgen-tiles">{"".join(tiles)}</div><div class="vgen-tools">'
        '<button type="button" class="vgen-button" data-do="ticked">Delete ticked</button></div>'
    )


def _tile(entry: Entry, words: str) -> str:
    png = thumbnail(entry.path, entry.path.stat().st_mtime_ns)
    said = html.escape(f"{entry.request.model}, {words}", quote=True)
    if png is None:
        inside = f'<span class="vgen-nothumb">{html.escape(entry.path.suffix[1:])}</span>'
    else:
        inside = f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    kind = "" if entry.kind == "image" else f' <span class="vgen-badge">{html.escape(entry.path.suffix[1:])}</span>'
    star, press = ("★", "true") if entry.starred else ("☆", "false")
    return (
        f'<figure class="vgen-tile"><button type="button" data-do="open" data-id="{entry.id}" aria-label="Open {said}">'
        f"{inside}</button><figcaption>{html.escape(words)}{kind}</figcaption><div>"
        f'<button type="button" class="vgen-star" data-do="star" data-id="{entry.id}" aria-pressed="{press}" '
        f'aria-label="Star {said}">{star}</button>'
        f'<label><input type="checkbox" data-id="{entry.id}" aria-label="Tick {said}"></label></div></figure>'
    )


@lru_cache(maxsize=1024)
def thumbnail(path: Path, changed: int) -> bytes | None:
    """A small PNG of a picture, or of the first frame of a video; None where there is none.

    `changed` is the file's time, so that a new file of the same name is looked at anew.
    """
    source = path.with_suffix(".gif") if path.suffix == ".mp4" else path
    try:
        with Image.open(source) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if max(small.size) > TILE:
        small.thumbnail((TILE, TILE))
    file = io.BytesIO()
    small.save(file, format="PNG")
    return file.getvalue()


def entry_picture(entry: Entry, words: str) -> str:
    """An opened file, shown: a GIF moves, and stands in for its video."""
    moving = entry.path.with_suffix(".gif") if entry.path.suffix in (".mp4", ".gif") else None
    alternative = f"{entry.request.model}: {words}"
    if moving is not None and moving.is_file():
        data = base64.b64encode(moving.read_bytes()).decode()
        said = html.escape(alternative, quote=True)
        return f'<img id="history-picture" class="vgen-pixels" alt="{said}" src="data:image/gif;base64,{data}">'
    try:
        with Image.open(entry.path) as image:
            shown = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return picture_html(None, "", name="history-picture", empty="This file cannot be shown here: download it.")
    shown.thumbnail((LARGE, LARGE))
    file = io.BytesIO()
    shown.save(file, format="PNG")
    return picture_html(file.getvalue(), alternative, name="history-picture")


def facts_html(entry: Entry, words: str) -> str:
    """What an opened file is, in a few lines."""
    asked, size = entry.request, entry.path.stat().st_size
    lines = {
        "Model": asked.model,
        "Shows": words,
        "Sampler": asked.sampler or "the model's own",
        "Made": time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.created)),
        "File": f"{entry.path.name}, {size / 1000:.1f} kB",
        "Weights": f"sha256 {asked.checkpoint[:12]}" if asked.checkpoint else "not stated",
    }
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in lines.items())
    return f'<dl class="vgen-facts">{items}</dl>'
