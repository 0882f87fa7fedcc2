"""The FAR part of `benchmark.py`: a denoising step and whole frames at the size of FAR-B, and cost against context.

Imported by `benchmark.py`, whose `far` command prints the tables and draws the plot.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

SIZE = {"in_channels": 32, "side": 8, "width": 768, "depth": 12, "heads": 12}  # FAR-B: 64 tokens a frame
LONG = {"context_patch_size": 4, "window": 16, "num_actions": 4}
WAYS = ("published", "cached", "no cache")


def run_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one denoising step and of whole frames, each way turn by turn; job: context, frames, steps, dtype,
    threads, device, repeats."""
    import torch
    from benchmark import random_model
    from published_far import PublishedFAR

    from vgen.generators.far import FAR

    torch.set_num_threads(job["threads"])
    model = random_model(lambda: FAR(**SIZE), getattr(torch, job["dtype"]), job["device"])
    clips = _noise(job["context"] + 1, job["device"])
    works: dict[str, dict[str, Callable[[], Any]]] = {"step": {}, "frames": {}}
    for way in WAYS:
        loop: Any = PublishedFAR(model) if way == "published" else model
        works["step"][way] = _step(loop, clips, way != "no cache")
        works["frames"][way] = _frames(loop, clips[:, :-1], job, way != "no cache")
    with torch.no_grad():
        found = {what: _turns(ways, job) for what, ways in works.items()}
        results = {way: work().float() for way, work in works["step"].items()}
    spread = float(results["cached"].abs().max())
    error = max(float((results[way] - results["cached"]).abs().max()) for way in WAYS) / spread
    return found | {"error": error}


def run_context(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the step that opens a frame and of each later one after `context` frames; job: model, context, dtype,
    threads, device, repeats."""
    import torch
    from benchmark import random_model, seconds

    from vgen.generators.far import FAR

    torch.set_num_threads(job["threads"])
    long = job["model"] == "FAR-Long"
    dtype = getattr(torch, job["dtype"])
    model = random_model(lambda: FAR(**SIZE, **(LONG if long else {})), dtype, job["device"])
    count = job["context"]
    clips = _noise(count + 1, job["device"])
    cache = model.new_cache(1, count + 1)
    times: dict[str, list[float]] = {"first": [], "later": []}
    with torch.no_grad():
        if count > 1:  # all but the last frame of the context are stored, the last one comes with the new frame
            model(clips[:, :count], _times(count - 1, job["device"]), cache=cache, keep=count - 1)
        held, length = cache.held, cache.length
        for turn in range(1 + job["repeats"]):
            cache.held, cache.length = held, length
            start = cache.first_needed(count)
            given = clips[:, start:]
            opening = seconds(
                lambda given=given, start=start: model(
                    given, _times(count - start, job["device"]), cache=cache, start=start, keep=count - start
                ),
                job["device"],
            )
            later = seconds(
                lambda: model(clips[:, count:], _times(0, job["device"]), cache=cache, start=count), job["device"]
            )
            if turn:
                times["first"].append(opening)
                times["later"].append(later)
    return {name: median(found) for name, found in times.items()}


def _noise(frames: int, device: str) -> Any:
    import torch

    shape = (1, frames, SIZE["in_channels"], SIZE["side"], SIZE["side"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _times(clean: int, device: str) -> Any:
    """Timesteps of clean frames and one noisy one behind them."""
    import torch

    return torch.tensor([[-1.0] * clean + [700.0]], device=device)


def _step(loop: Any, clips: Any, cached: bool) -> Callable[[], Any]:
    """One denoising step of the last frame, the others having been stored."""
    count = clips.shape[1] - 1
    if not cached:
        return lambda: loop(clips, _times(count, clips.device))[:, -1:]
    cache = loop.new_cache(1, count + 1)
    stored = False

    def step() -> Any:
        nonlocal stored
        if not stored:
            loop(clips, _times(count, clips.device), cache=cache, keep=count)
            stored = True
        return loop(clips[:, count:], _times(0, clips.device), cache=cache, start=count)

    return step


def _frames(loop: Any, context: Any, job: dict[str, Any], cached: bool) -> Callable[[], Any]:
    """Whole frames by the sampler, the context being evaluated and stored in the first of them."""
    from vgen.rng import SampleStreams
    from vgen.samplers.next_frame import NextFrameSettings, next_frame

    settings = NextFrameSettings(frames=job["context"] + job["frames"], steps=job["steps"], cached=cached)

    def sample() -> Any:
        for step in next_frame(loop, context, None, None, 0, SampleStreams([0], job["device"]), settings):
            last = step
        return last.tokens

    return sample


def _turns(works: dict[str, Callable[[], Any]], job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median seconds of each way, and the median over turns of its ratio to "cached"."""
    from benchmark import by_turns

    times = by_turns(works, job["repeats"], job["device"])
    return {
        name: {
            "seconds": median(found),
            "ratio": median(other / ours for other, ours in zip(found, times["cached"], strict=True)),
        }
        for name, found in times.items()
    }


def plot(rows: list[dict[str, Any]], steps: int, path: Path) -> None:
    """Seconds per frame against frames of context, a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from vgen.files import atomic_file

    figure, axes = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name, style in (("FAR", "o-"), ("FAR-Long", "s--")):
        chosen = [row for row in rows if row["model"] == name]
        cost = [row["first"] + (steps - 1) * row["later"] for row in chosen]
        axes.plot([row["context"] for row in chosen], cost, style, label=f"{name}-B")
    axes.set(xlabel="frames of context", ylabel=f"seconds per frame of {steps} steps", ylim=(0, None))
    axes.set_title("What a frame costs, by context (random weights, one core)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
