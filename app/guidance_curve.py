"""The editor of guidance over a run: a curve whose points are dragged, or moved by arrow keys."""

from typing import Any

import gradio as gr

from vgen.app.forms import flag_text
from vgen.samplers.logits import read_schedule

POINTS = 6  # of a model whose steps are no scales
TEMPLATE = """
<div class="vgen-curve" role="group" aria-label="Guidance over the run">
  <div class="vgen-presets"></div>
  <svg viewBox="0 0 340 150"></svg>
  <p class="vgen-note" aria-hidden="true"></p>
</div>
"""
SCRIPT = """
const LEFT = 34, RIGHT = 12, TOP = 12, BOTTOM = 24, WIDTH = 340, HEIGHT = 150;
const PRESETS = {
  'Linear': () => 'linear',
  'Constant': () => 'constant',
  'Late': (n) => spread(n, (x) => x * x),
  'Middle': (n) => spread(n, (x) => Math.sin(Math.PI * x)),
};
const spread = (n, height) => Array.from({length: n}, (_, i) => Number(height(i / (n - 1)).toFixed(2))).join(':');
const part = (selector) => element.querySelector(selector);
const points = () => {
  const number = Math.max(2, props.points), value = props.value;
  if (value === 'linear') return Array.from({length: number}, (_, i) => i / (number - 1));
  if (value === 'constant') return Array(number).fill(1);
  return Array.isArray(value) ? value.map(Number) : String(value).split(':').map(Number);
};
const named = (curve) => {
  if (curve.every((height) => height === 1)) return 'constant';
  if (curve.every((height, i) => Math.abs(height - i / (curve.length - 1)) < 0.005)) return 'linear';
  return curve.map((height) => Number(height.toFixed(2))).join(':');
};
const across = (i, n) => LEFT + (WIDTH - LEFT - RIGHT) * i / (n - 1);
const down = (height) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - height);
const guidance = (height) => (1 + (Number(props.guidance) - 1) * height).toFixed(2).replace(/[.]?0+$/, '');
const moment = (i, n) => n === props.points && props.what ? `${props.what} ${i + 1} of ${n}`
  : `${Math.round(100 * i / (n - 1))} % of the run`;
const words = (curve, i) => `Guidance at ${moment(i, curve.length)}`;
const note = (curve, shown) => {
  part('.vgen-note').textContent = Number(props.guidance) === 1 ? 'A guidance scale of 1 is off, whatever the curve.'
    : shown >= 0 ? `${words(curve, shown)}: ${guidance(curve[shown])}` : 'Drag the points, or use the arrow keys.';
};
const draw = (curve = points(), held = -1) => {
  const svg = part('svg'), focused = document.activeElement?.closest?.('[data-point]');
  const again = focused && svg.contains(focused) ? Number(focused.dataset.point) : -1;
  const line = curve.map((height, i) => `${across(i, curve.length)},${down(height)}`).join(' ');
  const text = (x, y, anchor, said) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${said}</text>`;
  svg.innerHTML = [0, 0.5, 1].map((height) => `<line x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${down(height)}" `
    + `y2="${down(height)}"/>` + text(LEFT - 8, down(height) + 4, 'end', guidance(height))).join('')
    + text(LEFT, HEIGHT - 6, 'start', 'start') + text(WIDTH - RIGHT, HEIGHT - 6, 'end', 'end')
    + `<polyline points="${line}"/>`
    + curve.map((height, i) => `<circle cx="${across(i, curve.length)}" cy="${down(height)}" r="${i === held ? 9 : 7}" `
      + `data-point="${i}" tabindex="0" role="slider" aria-orientation="vertical" aria-valuemin="0" aria-valuemax="1" `
      + `aria-valuenow="${height.toFixed(2)}" aria-valuetext="${guidance(height)}" aria-label="${words(curve, i)}"/>`)
      .join('');
  if (again >= 0) svg.querySelector(`[data-point="${again}"]`)?.focus({preventScroll: true});
  note(curve, held >= 0 ? held : again);
  for (const button of part('.vgen-presets').children)
    button.setAttribute('aria-pressed', String(PRESETS[button.textContent](curve.length) === props.value));
};
const keep = (curve) => { props.value = named(curve); draw(); };
const start = () => {
  const presets = part('.vgen-presets'), svg = part('svg');
  if (!presets || presets.children.length) return;
  presets.innerHTML = Object.keys(PRESETS).map((name) => `<button type="button">${name}</button>`).join('');
  presets.addEventListener('click', (event) => {
    const name = event.target.closest('button')?.textContent;
    if (name) { props.value = PRESETS[name](Math.max(2, props.points)); draw(); }
  });
  let curve = null, held = -1;
  const move = (event) => {
    const box = svg.getBoundingClientRect(), y = (event.clientY - box.top) * HEIGHT / box.height;
    const height = 1 - (y - TOP) / (HEIGHT - TOP - BOTTOM);
    curve[held] = Math.round(20 * Math.min(1, Math.max(0, height))) / 20;
    draw(curve, held);
  };
  svg.addEventListener('pointerdown', (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * WIDTH / box.width;
    curve = points();
    held = Math.round((x - LEFT) / (WIDTH - LEFT - RIGHT) * (curve.length - 1));
    held = Math.min(curve.length - 1, Math.max(0, held));
    svg.setPointerCapture(event.pointerId);
    event.preventDefault();
    move(event);
  });
  svg.addEventListener('pointermove', (event) => { if (held >= 0) move(event); });
  for (const ending of ['pointerup', 'pointercancel'])
    svg.addEventListener(ending, () => { if (held >= 0) { held = -1; keep(curve); } });
  svg.addEventListener('focusin', (event) => note(points(), Number(event.target.dataset?.point ?? -1)));
  svg.addEventListener('keydown', (event) => {
    const index = Number(event.target.dataset?.point ?? -1), curve = points();
    const by = {ArrowUp: 0.05, ArrowDown: -0.05, PageUp: 0.25, PageDown: -0.25, Home: -1, End: 1}[event.key];
    const aside = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (index < 0 || (by === undefined && aside === undefined)) return;
    event.preventDefault();
    event.stopPropagation();
    if (aside !== undefined) return svg.querySelector(`[data-point="${index + aside}"]`)?.focus();
    curve[index] = Math.min(1, Math.max(0, Math.round(20 * (curve[index] + by)) / 20));
    keep(curve);
  });
};
const renew = () => { start(); draw(); };
renew();
watch(['value', 'guidance', 'points', 'what'], renew);
"""


def guidance_curve(pipeline: Any, own: dict[str, Any]) -> gr.HTML:
    """The editor as it is for a model and its settings: its value is a guidance schedule, a curve as text."""
    return gr.HTML(
        html_template=TEMPLATE, js_on_load=SCRIPT, elem_id="guidance-curve", **curve_properties(pipeline, own)
    )


def curve_properties(pipeline: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What the editor shows of settings."""
    return {
        "value": flag_text(read_schedule(values.get("guidance_schedule", "linear"))),
        "visible": "guidance_schedule" in values,
        **curve_surroundings(pipeline, values.get("guidance_scale", 1)),
    }


def curve_surroundings(pipeline: Any, guidance: float) -> dict[str, Any]:
    """What the editor shows around its value: shares of `guidance` at each of a next-scale model's scales, or so many.

    Gradio forgets the properties of its own that an update of an HTML component leaves out, even all of them for
    gr.skip(): every update of the editor must have these.
    """
    scales = getattr(pipeline.tokenizer, "scales", None)
    return {
        "guidance": guidance,
        "points": max(2, len(scales)) if scales else POINTS,
        "what": "scale" if scales else "",
    }
