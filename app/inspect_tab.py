"""The Inspect tab: what a run's tokens were, what its tokenizer knows, and how it went."""

import gradio as gr

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
ENTERED_JS = "setTimeout(() => trigger('entered'), 0);"  # once the page has put all this in its place


class InspectTab:
    """Panels on the visitor's last run, each read anew when it is opened."""

    def __init__(
        self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState, outer: gr.Tab | None = None
    ) -> None:
        self.outer = outer  # the tab that all this is in
        self.entered = gr.HTML("", js_on_load=ENTERED_JS)
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
            outer = [self.outer.select] if self.outer is not None else []
            for event in (chosen.success, self.entered.entered, *outer):
                event(panel.open_if_selected, given, panel.shown, **WATCHING)
