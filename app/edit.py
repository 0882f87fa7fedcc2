"""The Edit tab: repainting parts of a picture, and going on from a run with tokens locked or from one of its steps."""

from typing import Any

import gradio as gr

from vgen.app.branch_panel import BranchPanel
from vgen.app.core import Studio
from vgen.app.parts import QUICK
from vgen.app.repaint_panel import RepaintPanel


class EditTab:
    """Builds the tab's components and wires them to the studio."""

    def __init__(self, studio: Studio, visitor: gr.BrowserState, current: gr.BrowserState) -> None:
        self.visitor, self.current = visitor, current
        with gr.Tabs():
            with gr.Tab("Repaint a picture"):
                self.repaint = RepaintPanel(studio, visitor, current)
            with gr.Tab("Lock tokens, branch"):
                self.branch = BranchPanel(studio, visitor, current)

    def wire(self, page: gr.Blocks) -> None:
        self.repaint.wire(page)
        self.branch.wire(page)
        opened = _enclosing_tab(self.repaint.source).select
        opened(self.repaint.list_sources, [self.visitor, self.current], [self.repaint.source], **QUICK)
        opened(self.branch.list_runs, self.branch.who, self.branch.chosen, **QUICK)


def _enclosing_tab(component: Any) -> gr.Tab:
    """The outermost tab that a component lies in."""
    found, block = None, component
    while block is not None:
        found = block if isinstance(block, gr.Tab) else found
        block = block.parent
    if found is None:
        raise ValueError("the Edit tab must be built inside a gr.Tab")
    return found
