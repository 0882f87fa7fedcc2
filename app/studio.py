"""`vgen studio`: the page, and the server around it."""

import contextlib
import importlib.util
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from PIL import Image

from vgen import __version__
from vgen.app.compare import CompareTab
from vgen.app.core import Studio
from vgen.app.edit import EditTab
from vgen.app.endpoints import add_endpoints
from vgen.app.evaluate_tab import EvaluateTab
from vgen.app.generate import GenerateTab
from vgen.app.history_tab import HistoryTab
from vgen.app.inspect_tab import InspectTab
from vgen.app.models_tab import ModelsTab
from vgen.app.parts import PRIVATE, QUICK, WATCHING, visitor_token
from vgen.app.pictures import MAX_PIXELS
from vgen.app.uploads import MAX_BYTES
from vgen.types import SettingError

HERE = Path(__file__).parent
MAX_FILE = "20mb"
MAX_QUEUE = 64
CACHE = (3600, 24 * 3600)  # seconds: how often Gradio's copies are looked through, and how old they become
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]
TABS: dict[str, Any] = {  # after Generate; each is built by (studio, visitor, current)
    "Compare": CompareTab,
    "Edit": EditTab,
    "Inspect": InspectTab,
    "Evaluate": EvaluateTab,
    "Models": ModelsTab,
    "History": HistoryTab,
}


def build(studio: Studio) -> gr.Blocks:
    """The page: all tabs and all endpoints."""
    secret = _secret(studio.folder)
    with gr.Blocks(title="vgen studio", delete_cache=CACHE, analytics_enabled=False) as page:
        visitor = gr.BrowserState(None, storage_key="vgen-visitor", secret=secret)
        current = gr.BrowserState(None, storage_key="vgen-run", secret=secret)
        gr.HTML(_header(), elem_id="header")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(studio, visitor, current)
            others = []
            for name, kind in TABS.items():
                with gr.Tab(name, id=name.lower()) as tab:
                    if kind is InspectTab:
                        _when_opened(page, tab, partial(InspectTab, studio, visitor, current, tab))
                    else:
                        others.append(kind(studio, visitor, current))
        generate.wire(page)
        for tab in others:
            tab.wire(page)
            if isinstance(tab, (ModelsTab, HistoryTab)):
                tab.join(page, tabs, [generate, *others])
        entered = page.load(visitor_token, [visitor], [visitor], **QUICK)
        entered.then(generate.follow, [visitor, current], generate.shown, **WATCHING)
        add_endpoints(studio)
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=8)
    return page


def _when_opened(page: gr.Blocks, tab: gr.Tab, make: Callable[[], Any]) -> None:
    """Give a tab its contents when a visitor first opens it. The browser works through all that is on the page before
    it shows any of it, and no other tab needs what is in this one."""
    opened = gr.State(False)
    tab.select(lambda: True, None, [opened], **PRIVATE)

    @gr.render(inputs=[opened], triggers=[opened.change], show_progress="hidden")
    def draw(is_open: bool) -> None:
        if is_open:
            make().wire(page)


def launch(studio: Studio, page: gr.Blocks, **options: Any) -> Any:
    """Serve the page: Gradio's `launch` with our style, bounds and paths. `options` go on top."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    chosen: dict[str, Any] = {
        "server_name": "127.0.0.1",
        "share": False,
        "show_error": True,
        "allowed_paths": [str(studio.library.files)],
        "max_file_size": MAX_BYTES if studio.allow_upload else MAX_FILE,  # Gradio has one limit for all uploads
        "enable_monitoring": False,
        "run_history": False,
        "ssr_mode": False,
        "footer_links": ["api", "settings"],
        "state_session_capacity": 1000,
        "theme": gr.themes.Default(font=FONTS, font_mono=MONO),
        "css_paths": HERE / "page.css",
        "js": (HERE / "page.js").read_text(),
        "quiet": True,
        "_frontend": False,  # serve it all the same, but do not insist on an answer within three seconds of starting
    }
    return page.launch(**chosen | options)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `vgen studio` was asked for."""

    folder: Path
    models: Path | None = None
    device: str | None = None
    dtype: str | None = None
    allow_upload: bool = False
    port: int | None = None
    listen: bool = False
    auth: list[tuple[str, str]] | None = None
    mcp: bool = False
    browser: bool = False


def serve(options: Options) -> None:
    """Serve until interrupted. Raises SettingError for what cannot be served as asked."""
    if options.mcp and importlib.util.find_spec("mcp") is None:
        raise SettingError("--mcp needs one more package: pip install 'gradio[mcp]'")
    studio = Studio(options.folder, options.models, options.device, options.dtype, options.allow_upload)
    try:
        page = build(studio)
        try:
            _, url, _ = launch(
                studio,
                page,
                server_name="0.0.0.0" if options.listen else "127.0.0.1",
                server_port=options.port,
                auth=options.auth,
                mcp_server=options.mcp,
                inbrowser=options.browser,
                prevent_thread_lock=True,
            )
        except OSError as error:
            asked = "" if options.port is None else f" {options.port}"
            raise SettingError(f"port{asked} is taken: choose another one with --port, or leave it out") from error
        print(f"vgen: the studio is at {url}", file=sys.stderr)
        print(f"vgen: files go to {studio.folder}; Ctrl+C ends it", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):  # the ordinary end of a server
            while page.is_running:
                time.sleep(0.2)
        page.close(verbose=False)
    finally:
        studio.close()


def _header() -> str:
    return (
        '<header class="vgen-header"><h1>vgen studio</h1><span>visual autoregressive generation, step by step</span>'
        '<button type="button" id="theme" class="vgen-link" aria-label="Switch between light and dark">Dark / light'
        '</button><button type="button" id="keys" class="vgen-link">Keys</button>'
        f"<span class='vgen-version'>{__version__}</span></header>"
        '<dialog id="keys-list" aria-label="Keyboard"><p><kbd>Ctrl</kbd>+<kbd>Enter</kbd> generate</p>'
        "<p><kbd>Esc</kbd> stop</p><p><kbd>R</kbd> <span>stop and re-roll</span></p>"
        "<p><kbd>&larr;</kbd> <kbd>&rarr;</kbd> scrub through the steps</p><p><kbd>?</kbd> this list</p></dialog>"
    )


def _secret(folder: Path) -> str:
    """What the browser's state is encrypted with: the same after a restart, readable by this user alone."""
    path = folder / ".secret"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(12)[:16])
    except FileExistsError:
        pass
    return path.read_text()
