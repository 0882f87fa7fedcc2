"""The token inspector: click a token for its code, its probability, and what others would look like."""

import html
import math
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import gradio as gr
import torch
from torch import Tensor

from vgen.app import drawing
from vgen.app.codebooks import psnr
from vgen.app.drawing import GRID_JS, Tile
from vgen.app.forms import Ask, whole
from vgen.app.inspect_panel import Panel, Work, describe_run, fitted, slider
from vgen.app.inspecting import (
    Measures,
    Question,
    Tokens,
    asks_context,
    has_codes,
    likeliest,
    log_probabilities,
    measure,
    patch_box,
    read_tokens,
    substitute,
)
from vgen.app.parts import QUICK, WATCHING, friendly, owner_of
from vgen.app.recording import Recording
from vgen.types import SettingError

COLOURS = ("Entropy", "Probability", "Step when fixed")
CONTEXTS = ("When it was fixed", "Given all other tokens")
PICTURE = 340  # pixels a side
PATCH = 84
MOST_TEXT = 8  # tokens in a row up to which numbers stand in them
UNLIKELY = 1e-4  # the dark end of the colours for probability
KEPT = 8  # distributions of a run


class TokensPanel(Panel):
    """Tokens of one image of the last run."""

    name = "Tokens"
    example_words = "four sneakers with fashion-var"

    def build(self) -> None:
        self._distributions: WeakKeyDictionary[Recording, dict[Any, list[Tensor]]] = WeakKeyDictionary()
        with gr.Row(elem_classes="vgen-controls"):
            self.image = gr.Slider(1, 2, value=1, step=1, label="Image", visible=False, min_width=200)
            # Without an upper bound: two events of an opening tab may cross, and Gradio refuses the older value then.
            self.scale = gr.Number(99, precision=0, minimum=1, step=1, label="Scale", visible=False, min_width=200)
            self.token = gr.Number(
                1, precision=0, minimum=1, label="Token", info="Counted row by row; or click it.", min_width=140
            )
            self.colour = gr.Radio(COLOURS, value=COLOURS[0], label="Colour by", min_width=240)
            self.context = gr.Radio(
                CONTEXTS, value=CONTEXTS[0], label="Distribution of a token", visible=False, min_width=240
            )
            self.guided = gr.Checkbox(
                False, label="With the run's guidance", info="Off: the model alone.", elem_classes="vgen-check"
            )
        self.grid = gr.HTML("", js_on_load=GRID_JS, elem_id="token-grid")
        self.detail = gr.HTML("", js_on_load=GRID_JS, elem_id="token-detail")
        with gr.Row(elem_classes="vgen-controls", visible=False) as self.substituting:
            self.code = gr.Number(0, precision=0, minimum=0, label="Other code", min_width=140, scale=0)
            self.replace = gr.Button("Substitute and decode", min_width=220, scale=0)
        self.changed = gr.HTML("", elem_id="token-changed")
        self.inputs = [self.image, self.scale, self.token, self.colour, self.context, self.guided]
        self.parts = [
            self.image,
            self.scale,
            self.token,
            self.context,
            self.grid,
            self.detail,
            self.substituting,
            self.code,
            self.changed,
        ]

    def wire(self, page: gr.Blocks) -> None:
        super().wire(page)
        given = [self.visitor, self.current, *self.inputs]
        picked = self.grid.click(self.pick, [self.token], [self.token], **QUICK)
        picked.success(self.show, given, self.shown, **WATCHING)
        where = [self.visitor, self.current, self.image, self.scale, self.token, self.code]
        chosen = self.detail.click(self.choose, [self.code], [self.code], **QUICK)
        for event in (chosen.success, self.replace.click):
            event(self.put, where, [self.status, self.changed], **WATCHING)

    def lacking(self, recording: Recording) -> str | None:
        if recording.pipeline.makes_videos:
            return "Videos have no grid of tokens to click: run an image model, or see Wavefront."
        if recording.pipeline.tokenizer is None:
            return "The model has no tokenizer, so that nothing can be shown: run another one."
        return None

    def example_ask(self) -> Ask:
        return Ask(model="fashion-var", classes=["sneaker"], per_class=4, seed=0)

    def fit(self, recording: Recording, values: Any) -> list[Any]:
        image, scale, token, *rest = values
        row = fitted(image, 1, recording.rows, 1)
        sides = read_tokens(recording, row - 1).sides
        scale = fitted(scale, 1, len(sides), len(sides))
        side = sides[scale - 1]
        return [row, scale, fitted(token, 1, side * side, 1), *rest]

    # ---- showing

    def view(self, recording: Recording, *values: Any) -> Work:
        image, scale, token, colour, context, guided = values
        row = whole("image", image, 1, recording.rows) - 1
        tokens = read_tokens(recording, row)
        k = whole("scale", scale, 1, len(tokens.sides)) - 1
        place = whole("token", token, 1, tokens.sides[k] ** 2) - 1
        others = context == CONTEXTS[1] or recording.steps[-1].evaluations == 0  # handed in: nothing was fixed
        question = Question(row, others=others, guided=bool(guided))
        found = (yield from self._distribution(recording, question)) if has_codes(recording) else None
        measures = None if found is None else measure(found[k], tokens.codes[k])
        grid = self._grids(recording, tokens, k, place, measures, colour, row)
        detail, code = "", 0
        if found is not None and int(tokens.codes[k][place]) >= 0:
            code = likeliest(found[k][place], 1)[0][0]
            detail = self._detail(recording, question, tokens, k, place, found[k])
        yield
        number, side = len(tokens.sides), tokens.sides[k]
        return [
            slider(row + 1, recording.rows),
            gr.Number(value=k + 1, visible=number > 1, label=f"Scale, 1 to {number} ({side}x{side} tokens)"),
            gr.Number(value=place + 1, maximum=side * side),
            gr.Radio(visible=asks_context(recording)),
            grid,
            detail,
            gr.Row(visible=bool(detail)),
            code,
            "",
        ]

    def _distribution(self, recording: Recording, question: Question) -> Any:
        kept = self._distributions.setdefault(recording, {})
        key = (question, recording.steps[-1].index)
        if key not in kept:
            found = yield from log_probabilities(recording, question)
            while len(kept) >= KEPT:
                kept.pop(next(iter(kept)))
            kept[key] = found
        return kept[key]

    def _grids(
        self,
        recording: Recording,
        tokens: Tokens,
        k: int,
        place: int,
        measures: Measures | None,
        colour: Any,
        row: int,
    ) -> str:
        """The picture with its tokens, and the map of what they are coloured by."""
        side = tokens.sides[k]
        total = recording.steps[-1].total
        wanted = COLOURS[2] if measures is None else colour
        tiles = [self._tile(tokens, k, i, measures, wanted, total) for i in range(side * side)]
        bare = [Tile(tile.words) for tile in tiles]
        png = drawing.png_of(recording.pixels(-1)[row], PICTURE)
        picture = drawing.token_grid(bare, side, "Picture: click a token, or move with the arrow keys", place, png)
        heat = drawing.token_grid(tiles, side, f"{wanted} of each token", place)
        return f'<div class="vgen-pair">{picture}{heat}</div>{self._legend(recording, wanted)}'

    def _tile(self, tokens: Tokens, k: int, i: int, measures: Measures | None, colour: Any, total: int) -> Tile:
        side, code, fixed = tokens.sides[k], int(tokens.codes[k][i]), int(tokens.fixed[k][i])
        when = "not known yet" if fixed < 0 else "given" if not fixed else f"fixed at step {fixed}"
        words = [f"row {i // side + 1}, column {i % side + 1}"]
        values = {COLOURS[2]: (fixed / max(total, 1) if fixed >= 0 else math.nan, str(max(fixed, 0)))}
        if code >= 0:
            words.append(f"code {code}")
        if measures is not None and code >= 0:
            p, entropy = float(measures.probability[i]), float(measures.entropy[i])
            words += [f"probability {drawing.per_cent(p)}", f"entropy {entropy:.2f} bits"]
            values[COLOURS[0]] = entropy / measures.most, f"{entropy:.1f}"
            values[COLOURS[1]] = 1 - math.log(max(p, UNLIKELY)) / math.log(UNLIKELY), drawing.per_cent(p)
        share, text = values.get(colour, (math.nan, ""))
        unknown = math.isnan(share)
        shown = text if side <= MOST_TEXT and not unknown else ""
        return Tile(", ".join([*words, when]), shown, (128, 128, 128) if unknown else drawing.ramp(share))

    def _legend(self, recording: Recording, colour: Any) -> str:
        if colour == COLOURS[2]:
            return drawing.scale_legend("given", str(recording.steps[-1].total), "Step when fixed")
        if colour == COLOURS[1]:
            return drawing.scale_legend(f"{100 * UNLIKELY:g}% or less", "100%", "Probability, by its logarithm")
        most = math.log2(recording.pipeline.generator.config["vocab_size"])
        return drawing.scale_legend("0", f"{most:.1f} bits, all codes alike", "Entropy")

    # ---- one token

    def _detail(
        self, recording: Recording, question: Question, tokens: Tokens, k: int, place: int, found: Tensor
    ) -> str:
        code, side = int(tokens.codes[k][place]), tokens.sides[k]
        distribution = found[place]
        top = likeliest(distribution)
        codes = [code, *(other for other, _ in top if other != code)]
        images = substitute(recording, question.row, k, place, codes)
        size = images.shape[-1]
        left, upper, right, lower = patch_box(size, side, place)
        buttons = []
        for image, other in zip(images, codes, strict=True):
            p = drawing.per_cent(float(distribution[other].exp()))
            here = ", in the picture" if other == code else ""
            patch = drawing.figure_html(image[:, upper:lower, left:right], "", f"code {other}{here}: {p}", PATCH)
            words = f"Code {other}, probability {p}{here}: substitute it"
            buttons.append(f'<button type="button" data-code="{other}" aria-label="{words}">{patch}</button>')
        facts = "".join(
            f"<li>{html.escape(fact)}</li>" for fact in _facts(recording, question, tokens, k, place, found)
        )
        return (
            f'<div class="vgen-token-facts"><ul>{facts}</ul><p>The likeliest codes as they would look here; click one '
            f'to put it in.</p><div class="vgen-patches">{"".join(buttons)}</div></div>'
        )

    def pick(self, token: Any, event: gr.EventData) -> Any:
        """The token that was clicked, counted from 1."""
        clicked = getattr(event, "token", None)
        return clicked + 1 if isinstance(clicked, int) and clicked >= 0 else token

    def choose(self, code: Any, event: gr.EventData) -> Any:
        """The code that was clicked."""
        clicked = getattr(event, "code", None)
        return clicked if isinstance(clicked, int) and clicked >= 0 else code

    @friendly
    async def put(
        self, visitor: Any, job_id: Any, image: Any, scale: Any, token: Any, code: Any, request: gr.Request
    ) -> Any:
        """Decode the picture with another code in a token's place."""
        owner = owner_of(visitor, request)
        recording = self.recording(owner, job_id)
        if recording is None or self.lacking(recording) or not has_codes(recording):
            raise SettingError("there is no token to substitute: generate something first")
        work = partial(self._changed, recording, image, scale, token, code)
        async for item in self.answer(owner, work, 2, describe_run(recording)):
            yield item

    def _changed(self, recording: Recording, image: Any, scale: Any, token: Any, code: Any) -> Work:
        row = whole("image", image, 1, recording.rows) - 1
        tokens = read_tokens(recording, row)
        k = whole("scale", scale, 1, len(tokens.sides)) - 1
        place = whole("token", token, 1, tokens.sides[k] ** 2) - 1
        other = whole("code", code, 0, recording.pipeline.generator.config["vocab_size"] - 1)
        own = int(tokens.codes[k][place])
        if own < 0:
            raise SettingError(f"token {place + 1} is not known yet: choose one that is")
        before, after = substitute(recording, row, k, place, [own, other])
        yield
        apart = (before.short() - after.short()).abs().to(torch.uint8)
        changed, most = float((apart.amax(0) > 0).float().mean()), int(apart.max())
        shown = (apart.float() * 255 / max(most, 1)).round().to(torch.uint8)  # brightened, else nothing is seen
        words = f"{100 * changed:.0f}% of pixels differ, by {most} of 255 at most"
        told = f"Difference, brightened: {words}, PSNR {drawing.number(psnr(after[None], before)[0])} dB"
        figures = [
            drawing.figure_html(before, "The picture as it is", f"As it is: code {own}", PICTURE),
            drawing.figure_html(after, "The picture with the other code", f"With code {other}", PICTURE),
            drawing.figure_html(shown, "Difference of the two", told, PICTURE),
        ]
        return [drawing.figures_html(figures)]


def _facts(recording: Recording, question: Question, tokens: Tokens, k: int, place: int, found: Tensor) -> list[str]:
    """What is said of a token, `found` (n, V) being the distributions of its scale."""
    code, side, fixed = int(tokens.codes[k][place]), tokens.sides[k], int(tokens.fixed[k][place])
    measures = measure(found, tokens.codes[k])
    rank = int((found[place] > found[place][code]).sum()) + 1
    scale = f" of scale {k + 1}" if len(tokens.sides) > 1 else ""
    request = recording.request
    label = None if request.class_labels is None else recording.pipeline.class_names[request.class_labels[question.row]]
    if isinstance(recording.steps[-1].tokens, list):
        given = "the scales before it"
    elif asks_context(recording):
        given = "all other tokens" if question.others else "what was known when it was fixed"
    else:
        given = "the tokens before it"
    guidance = request.settings.get("guidance_scale", 1)
    under = f"with guidance {guidance:g}" if question.guided and label is not None else "without guidance"
    named = "without a class" if label is None else f"for the class {label}"
    total = recording.steps[-1].total
    when = "given from the start" if not fixed else f"fixed at step {fixed} of {total}"
    return [
        f"Token {place + 1}{scale}, row {place // side + 1}, column {place % side + 1}: code {code}, {when}.",
        f"Probability {drawing.per_cent(float(measures.probability[place]))}, rank {rank} of {found.shape[1]}; "
        f"entropy {float(measures.entropy[place]):.2f} bits of at most {measures.most:.2f}.",
        f"Under the model {named}, given {given}, {under}; temperature 1, nothing cut off.",
    ]
