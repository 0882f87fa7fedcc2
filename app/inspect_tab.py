"""The Inspect tab: what a run's tokens were, what its tokenizer knows, and how it went."""

from typing import Any

import gradio as gr
from gradio.context import Context

from vgen.app.core import Studio
from vgen.app.inspect_codes import CodebookPanel, RoundTripPanel
from vgen.app.inspect_panel import Panel
from vgen.app.inspect_spectrum import SpectrumPanel
from vgen.app.inspect_tokens import TokensPanel
from vgen.app.inspect_traces import HittingPanel, RecapPanel, WavePanel
from vgen.app.parts import QUICK, WATCHING

PANELS: tuple[type[Panel], ...] = (
    TokensPanel,
    CodebookPanel,
    RoundTripPanel,
    SpectrumPanel,
    HittingPanel,
    WavePanel,
    RecapPanel,
)


class InspectTab:
    """Panels on the visitor's last run, each read anew when it is opened."""

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.outer = _enclosing_tab()
        self.selected = gr.State(PANELS[0].name)
        self.tabs: list[gr.Tab] = []
        self.panels: list[Panel] = []
        with gr.Tabs(elem_id="inspect-tabs"):
            for kind in PANELS:
                with gr.Tab(kind.name) as tab:
                    self.panels.append(kind(studio, visitor, current))
                self.tabs.append(tab)

    def wire(self, page: gr.Blocks) -> None:
        for tab, panel in zip(self.tabs, self.panels, strict=True):
            panel.wire(page)
            given = [self.selected, panel.visitor, panel.current, *panel.inputs]
            chosen = tab.select(lambda name=panel.name: name, None, [self.selected], **QUICK)
            for event in (chosen.success, *([self.outer.select] if self.outer is not None else [])):
                event(panel.open_if_selected, given, panel.shown, **WATCHING)


def _enclosing_tab() -> Any:
    """The tab that is being built, if any."""
    block = Context.block
    while block is not None and not isinstance(block, gr.Tab):
        block = block.parent
    return block
