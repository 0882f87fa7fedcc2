"""Timings, each table from one run on one machine: `python scripts/benchmark.py var`, `mvar`, `nfig`, `zoo`, `far`,
`parallel`, `batch`, `masked`, `evaluate` or `studio`.

Every configuration is measured in a process of its own, so that peak memory is its own. Ratios within a table are to
be trusted more than seconds across machines.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def benchmark() -> None:
    """Measure vgen on this machine."""


# ---- VAR-d16 at 256 px with random weights

TOKENIZER = {
    "scales": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    "vocab_size": 4096,
    "code_dim": 32,
    "base_channels": 160,
    "channel_multipliers": [1, 1, 2, 2, 4],
}
TRANSFORMER = {"num_classes": 1000, "width": 1024, "depth": 16, "heads": 16}
GUIDANCE = {"guidance_scale": 2.5, "top_k": 900, "top_p": 0.96}  # the published protocol's cfg = 1.5


@app.command("var")
def compare_var(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed runs per configuration, after one to warm up.")] = 2,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,4",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plans: Annotated[
        str, typer.Option(help="Which loops: published,recomputed,cached.")
    ] = "published,recomputed,cached",
) -> None:
    """VAR-d16 at 256 px, random weights: our cached loop against recomputation and against the published loop.

    "published" is our rewrite of how the published code spends its time: keys and values concatenated at every scale,
    modulations computed at every scale, a contiguous (NCHW) decoder, float32. Same tokens as ours.
    """
    rows = []
    for batch in [int(size) for size in batches.split(",")]:
        for dtype in ("float32", "bfloat16"):
            for plan in plans.split(","):
                if plan == "published" and dtype != "float32":
                    continue  # published CPU inference is float32
                job = {"plan": plan, "batch": batch, "dtype": dtype, "threads": threads, "device": device}
                rows.append(job | _measure_apart("var", job | {"repeats": repeats}))
                print(f"measured {plan} {dtype} batch {batch}", file=sys.stderr)
    _print_var(rows)


def _print_var(rows: list[dict[str, Any]]) -> None:
    columns = ["loop", "dtype", "batch", "transformer", "decoder", "s/image", "speed-up", "memory", "of it imports"]
    columns += ["matmul peak", "share: transformer", "decoder", "both", "tokens"]
    lines = [columns]
    for row in rows:
        base = [r for r in rows if r["plan"] == "published" and r["batch"] == row["batch"]] or rows[:1]
        seconds = row["transformer_s"] + row["decoder_s"]
        flop = row["transformer_gflop"] + row["decoder_gflop"]
        shares = [row[f"{part}_gflop"] / row[f"{part}_s"] for part in ("transformer", "decoder")] + [flop / seconds]
        lines.append(
            [
                row["plan"],
                row["dtype"],
                str(row["batch"]),
                f"{row['transformer_s']:.2f} s",
                f"{row['decoder_s']:.2f} s",
                f"{seconds / row['batch']:.2f}",
                f"{(base[0]['transformer_s'] + base[0]['decoder_s']) / seconds:.2f}x",
                f"{row['memory_gb']:.2f} GB",
                f"{row['imports_gb']:.2f} GB",
                f"{row['peak_gflops']:.0f} GF/s",
                *(f"{share / row['peak_gflops']:.0%}" for share in shares),
                row["tokens"],
            ]
        )
    _print_table(lines)


def _run_var(job: dict[str, Any]) -> dict[str, Any]:
    """Time one configuration in this process."""
    import hashlib

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from vgen import layers
    from vgen.generators.var import VAR
    from vgen.pipelines.next_scale import NextScalePipeline
    from vgen.tokenizers import backbone
    from vgen.tokenizers.multiscale import MultiScaleVQ

    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.set_num_threads(job["threads"])
    dtype, device, batch = getattr(torch, job["dtype"]), job["device"], job["batch"]
    peak = _matmul_peak(dtype, device)
    tokenizer = random_model(lambda: MultiScaleVQ(**TOKENIZER), dtype, device)
    size = {name: TOKENIZER[name] for name in ("scales", "vocab_size", "code_dim")}
    generator = random_model(lambda: VAR(**size, **TRANSFORMER), dtype, device)
    pipeline = NextScalePipeline(tokenizer, generator)
    if job["plan"] == "published":
        from published_loops import PublishedVAR

        layers.ONEDNN_LINEAR = None  # the published code calls torch's own linear layers
        backbone.CPU_DECODE_PIXELS = 1 << 62  # and decodes the whole batch at once
        tokenizer.to(memory_format=torch.contiguous_format)
        pipeline.generator = PublishedVAR(generator)
    elif job["plan"] == "recomputed":
        from published_loops import RecomputedVAR

        pipeline.generator = RecomputedVAR(generator)

    def sample() -> Any:
        for step in pipeline.stream(class_labels=list(range(batch)), seeds=list(range(batch)), **GUIDANCE):
            last = step
        return last

    counted = {torch.ops.mkldnn._linear_pointwise: linear_flop}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counted) as counter:
        step = sample()
    transformer_flop = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pipeline.decode(step)
    times = [(seconds(sample, device), seconds(lambda: pipeline.decode(step), device)) for _ in range(job["repeats"])]
    memory = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "transformer_s": min(first for first, _ in times),
        "decoder_s": min(second for _, second in times),
        "transformer_gflop": transformer_flop / 1e9,
        "decoder_gflop": counter.get_total_flops() / 1e9,
        "memory_gb": memory / 1e9,
        "imports_gb": imports / 1e9,
        "peak_gflops": peak,
        "tokens": hashlib.sha256(torch.cat(step.tokens, 1).cpu().numpy().tobytes()).hexdigest()[:8],
    }


# ---- M-VAR-d16 at 256 and 512 px with random weights


@app.command("mvar")
def compare_mvar(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed runs per configuration, after one to warm up.")] = 2,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 1,
    dtypes: Annotated[str, typer.Option(help="Which of float32,bfloat16.")] = "float32,bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """One transformer pass of M-VAR-d16 over all scales of 256 and 512 px, guidance on, random weights: states carried
    against Mamba over the whole prefix again, and against VAR-d16; then the scan alone, chunked against sequential.

    "published" spends its time as the published loop does: the prefix again, modulations at every scale, torch's own
    linear layers; "recomputed" differs from ours in the prefix alone.
    """
    from benchmark_mvar import SCALES, plans

    shared = {"threads": threads, "repeats": repeats, "device": device}
    lines = [["model", "loop", "dtype", "px", "s/pass", "TFLOP", "speed-up", "512/256", "state", "mean |logit|"]]
    for dtype in dtypes.split(","):
        rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        for model, plan in plans():
            for pixels in SCALES:
                job = shared | {"model": model, "plan": plan, "pixels": pixels, "batch": batch, "dtype": dtype}
                row = rows[model, plan, pixels] = _measure_apart("mvar", job)
                print(f"measured {model} {plan} {pixels} px {dtype}", file=sys.stderr)
                cost, first = row["seconds"], rows["M-VAR", "published", pixels]["seconds"]
                growth = "" if pixels == 256 else f"{cost / rows[model, plan, 256]['seconds']:.2f}"
                lines.append([model, plan, dtype, str(pixels), f"{cost:.2f}", f"{row['gflop'] / 1e3:.2f}"])
                lines[-1] += [f"{first / cost:.2f}x", growth, f"{row['state_mb']:.1f} MB", f"{row['logit']:.4f}"]
    _print_table(lines)
    lines = [["scan", "dtype", "tokens", "sequential, ms", "chunked, ms", "speed-up"]]
    for backward in (False, True):
        for dtype in dtypes.split(","):
            for tokens in (sum(side * side for side in scales) for scales in SCALES.values()):
                job = shared | {"tokens": tokens, "backward": backward, "dtype": dtype}
                slow, fast = (
                    _measure_apart("scan", job | {"method": method})["seconds"] for method in ("sequential", "chunked")
                )
                name = "forward and backward" if backward else "forward"
                lines.append(
                    [name, dtype, str(tokens), f"{slow * 1e3:.1f}", f"{fast * 1e3:.1f}", f"{slow / fast:.1f}x"]
                )
    _print_table(lines)


# ---- NFIG and VAR at 256 px with random weights


@app.command("nfig")
def compare_nfig(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed turns, after one to warm up.")] = 5,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 1,
    depths: Annotated[str, typer.Option(help="Depths of the transformer; width is 64 times that.")] = "16,20",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """NFIG against VAR at equal depth, turn by turn: the same transformer on 680 tokens, random weights.

    The paper's "1.25 times faster than VAR" compares NFIG of depth 16 with VAR of depth 20.
    """
    lines = [["depth", "parameters", "work", "dtype", "batch", "VAR, s", "NFIG, s", "NFIG / VAR"]]
    for depth in [int(item) for item in depths.split(",")]:
        job = {"depth": depth, "batch": batch, "dtype": dtype, "threads": threads, "device": device}
        row = _measure_apart("nfig", job | {"repeats": repeats})
        for kind, ratio in row["ratios"].items():
            cost = [f"{row['seconds'][name][kind]:.3f}" for name in ("VAR", "NFIG")]
            size = f"{row['parameters'] / 1e6:.0f} M"
            lines.append([str(depth), size, kind, dtype, str(batch), *cost, f"{ratio:.3f}"])
    _print_table(lines)


# ---- bundled models of the next-scale families


@app.command("zoo")
def compare_zoo(
    models: Annotated[
        str, typer.Option(help="Bundled models, separated by commas.")
    ] = "fashion-var,fashion-mvar,fashion-nfig",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed turns, after one to warm up.")] = 7,
) -> None:
    """Bundled models against one another, turn by turn: sampling with the default settings, and a training step."""
    job: dict[str, Any] = {"models": models.split(","), "threads": threads, "repeats": repeats}
    rows = _measure_apart("zoo", job)
    lines = [["model", "ms/image, batch 1", "ms/image, batch 16", "training images/s", "sampling, training vs first"]]
    first = rows[job["models"][0]]
    for name, row in rows.items():
        one, many, train = row["batch 1"], row["batch 16"], row["training"]
        ratios = f"{one / first['batch 1']:.2f}, {first['training'] / train:.2f}"
        lines.append([name, f"{one * 1e3:.1f}", f"{many * 1e3:.1f}", f"{1 / train:.0f}", ratios])
    _print_table(lines)


# ---- FAR-B with random weights


@app.command("far")
def compare_far(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed turns, after one to warm up.")] = 5,
    context: Annotated[int, typer.Option(help="Frames of context.")] = 16,
    frames: Annotated[int, typer.Option(help="Frames to make, end to end.")] = 3,
    steps: Annotated[int, typer.Option(help="Denoising steps of a frame.")] = 10,
    dtypes: Annotated[str, typer.Option(help="Which of float32,bfloat16.")] = "float32,bfloat16",
    lengths: Annotated[str, typer.Option(help="Frames of context for the plot.")] = "1,2,4,8,16,24,32,48,64",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The plot.")] = Path("docs/far-context.png"),
) -> None:
    """A denoising step of FAR-B and whole frames: our cache against the published loop and against none, turn by turn;
    then what a frame costs after more and more context, FAR and FAR-Long.

    "published" modulates token by token, builds rotations and a dense mask at every step, concatenates keys and values
    and rotates all keys again; its linear layers are ours. It gives the same velocities ("error").
    """
    from benchmark_far import WAYS, plot

    shared: dict[str, Any] = {"threads": threads, "device": device, "repeats": repeats}
    lines = [["way", "dtype", "step, ms", "against cached", f"{frames} frames, s", "against cached", "error"]]
    for dtype in dtypes.split(","):
        row = _measure_apart("far", shared | {"dtype": dtype, "context": context, "frames": frames, "steps": steps})
        for way in WAYS:
            step, whole = row["step"][way], row["frames"][way]
            lines.append([way, dtype, f"{step['seconds'] * 1e3:.0f}", f"{step['ratio']:.2f}"])
            lines[-1] += [f"{whole['seconds']:.2f}", f"{whole['ratio']:.2f}", f"{row['error']:.0e}"]
    _print_table(lines)
    rows = []
    lines = [["model", "dtype", "context", "opening step, ms", "later steps, ms", f"frame of {steps} steps, s"]]
    dtype = dtypes.split(",")[-1]
    for model in ("FAR", "FAR-Long"):
        for count in [int(item) for item in lengths.split(",")]:
            job = shared | {"model": model, "context": count, "dtype": dtype}
            rows.append(row := job | _measure_apart("far-context", job))
            print(f"measured {model} {count}", file=sys.stderr)
            cost = row["first"] + (steps - 1) * row["later"]
            lines.append([model, dtype, str(count), f"{row['first'] * 1e3:.0f}", f"{row['later'] * 1e3:.0f}"])
            lines[-1].append(f"{cost:.2f}")
    _print_table(lines)
    plot(rows, steps, out)


# ---- many images to files


@app.command("batch")
def compare_batch(
    model: Annotated[str, typer.Option(help="A bundled name or a folder.")] = "fashion-var",
    images: Annotated[str, typer.Option(help="How many, separated by commas: memory must not grow with them.")] = (
        "1000,10000"
    ),
    batch_size: Annotated[int, typer.Option(help="Images sampled at once.")] = 64,
    formats: Annotated[str, typer.Option(help="Ways to write them, separated by semicolons.")] = "png;npz;webdataset",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Many images to files against the same calls with nothing written: overhead, throughput and peak memory."""
    shared: dict[str, Any] = {"model": model, "batch_size": batch_size, "threads": threads, "device": device}
    lines = [["images", "files", "s", "images/s", "overhead", "CPU overhead", "peak MB"]]
    for count in [int(item) for item in images.split(",")]:
        bare: dict[str, Any] = {}
        for way in ("", *formats.split(";")):
            row = _measure_apart("batch", shared | {"images": count, "formats": way})
            bare = bare or row
            cells = [str(count), way or "none", f"{row['seconds']:.1f}", f"{row['images'] / row['seconds']:.1f}"]
            cells += [f"{100 * (row[name] / bare[name] - 1):.1f}%" for name in ("seconds", "cpu_seconds")]
            lines.append([*cells, f"{row['peak_mb']:.0f}"])
            print(f"measured {count} images, {way or 'nothing'} written", file=sys.stderr)
    _print_table(lines)


# ---- a recurrent-depth model


@app.command("parallel")
def compare_parallel(
    model: Annotated[str, typer.Option(help="A bundled name or a folder.")] = "fashion-recurrent",
    threads: Annotated[str, typer.Option(help="CPU threads, separated by commas.")] = "1,2",
    batches: Annotated[str, typer.Option(help="Images at a time, separated by commas.")] = "1,4,16",
    repeats: Annotated[int, typer.Option(help="Timed turns, after one to warm up.")] = 5,
    samples: Annotated[int, typer.Option(help="Images whose tokens are compared.")] = 100,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="All figures; the plot is drawn beside them.")] = Path(
        "docs/results/parallel.json"
    ),
) -> None:
    """Parallel samplers of a looped generator against one token after the other, with and without early exits: passes,
    agreement, and wall clock turn by turn."""
    from benchmark_parallel import plot

    from vgen.files import atomic_file

    shared: dict[str, Any] = {"model": model, "device": device}
    counts = _measure_apart("parallel-counts", shared | {"samples": samples, "threads": 1})
    lines = [["way", *next(iter(counts.values()))]]
    lines += [[name, *(f"{value:.3g}" for value in row.values())] for name, row in counts.items()]
    _print_table(lines)
    rows = []
    for count in [int(item) for item in threads.split(",")]:
        for batch in [int(item) for item in batches.split(",")]:
            job = shared | {"threads": count, "batch": batch, "repeats": repeats}
            ways = _measure_apart("parallel", job)
            rows.append({"threads": count, "batch": batch, "ways": ways})
            lines = [[f"threads {count}, batch {batch}", "ms/image", "times faster", "than early exit"]]
            for name, way in ways.items():
                lines.append([name, f"{way['seconds'] * 1e3:.1f}", f"{way['faster']:.2f}"])
                lines[-1].append(f"{way['faster than early exit']:.2f}")
            _print_table(lines)
    with atomic_file(out) as partial:
        partial.write_text(json.dumps({"model": model, "counts": counts, "times": rows}, indent=1) + "\n")
    plot(rows, out.with_suffix(".png"))


# ---- the studio's page


@app.command("studio")
def compare_studio(
    model: Annotated[str, typer.Option(help="A bundled name.")] = "fashion-var",
    masked: Annotated[str, typer.Option(help="One whose runs are long enough to be watched.")] = "fashion-maskgit",
    repeats: Annotated[int, typer.Option(help="Timed turns, after one to warm up.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """How long a visitor waits in Chromium, and what watching a run costs it."""
    shared: dict[str, Any] = {"repeats": repeats, "threads": threads, "device": device}
    page = _measure_apart("studio-page", shared | {"model": model})
    _print_table([["what", "ms"], *([name, f"{value:.0f}"] for name, value in page.items())])
    lines = [["run", "s", "s, watched", "times longer", "pictures"]]
    for name, images, settings in ((model, 16, {}), (masked, 16, {"steps": 12})):
        row = _measure_apart("studio-previews", shared | {"model": name, "images": images, "settings": settings})
        cells = [f"{row['seconds']:.3f}", f"{row['watched_seconds']:.3f}", f"{row['slower']:.3f}"]
        lines.append([f"{name}, {images} images", *cells, f"{row['pictures_a_run']:.1f}"])
    _print_table(lines)


# ---- masked generation at 256 px with random weights, and sampling work


@app.command("masked")
def compare_masked(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed runs per configuration, the first of which counts FLOPs.")] = 1,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    time_steps: Annotated[int, typer.Option(help="Steps of the ancestral samplers.")] = 1000,
) -> None:
    """ReCAP on the published U-ViT (256 tokens, width 768, 25 blocks) with random weights, against the same schedule
    without it and against fewer whole steps of equal FLOPs; then what masked diffusion's samplers spend on drawing.
    """
    from benchmark_masked import BASE_STEPS, plans

    shared = {"threads": threads, "device": device, "dtype": dtype, "repeats": repeats}
    lines = [["run", "dtype", "batch", "s/image", "GFLOP/image", "vs same T", "FLOPs", f"vs base T={BASE_STEPS}"]]
    for batch in [int(size) for size in batches.split(",")]:
        rows = {}
        for plan in plans():
            job = shared | plan | {"batch": batch}
            rows[plan["plan"]] = job | _measure_apart("masked", job)
            print(f"measured {plan['plan']} batch {batch}", file=sys.stderr)
        for name, row in rows.items():
            same, base = rows.get(f"base T={row['steps']}"), rows[f"base T={BASE_STEPS}"]
            twin = rows[row.get("same_as", name)]
            lines.append(
                [
                    name,
                    dtype,
                    str(batch),
                    f"{row['seconds'] / batch:.2f}",
                    f"{row['gflop'] / batch:.0f}",
                    f"{same['seconds'] / row['seconds']:.2f}x"
                    if same
                    else f"ReCAP/{row['seconds'] / twin['seconds']:.2f}",
                    f"{same['gflop'] / row['gflop']:.2f}x" if same else f"ReCAP/{row['gflop'] / twin['gflop']:.2f}",
                    f"{base['seconds'] / row['seconds']:.2f}x",
                ]
            )
    _print_table(lines)
    lines = [["sampler", "N", "T", "evaluations", "drawing, s", "against first-hitting"]]
    for tokens in (256, 1024):
        found = {}
        for sampler in ("first-hitting", "ancestral", "ancestral-categorical"):
            job = {"threads": threads, "tokens": tokens, "sampler": sampler, "steps": time_steps}
            found[sampler] = _measure_apart("categorical", job)
            cost = found[sampler]["seconds"]
            ratio = f"{cost / found['first-hitting']['seconds']:.1f}"
            steps = "-" if sampler == "first-hitting" else str(time_steps)
            lines.append([sampler, str(tokens), steps, str(found[sampler]["evaluations"]), f"{cost:.3f}", ratio])
    _print_table(lines)


# ---- feature extraction


@app.command("evaluate")
def compare_evaluate(
    threads: Annotated[int, typer.Option(help="CPU cores.")] = 1,
    images: Annotated[int, typer.Option(help="Images to extract features of.")] = 128,
    side: Annotated[int, typer.Option(help="Their side in pixels.")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """FID's features from a folder of PNG: torch-fidelity's extraction against ours, Inception with random weights.

    Each runs in a process of its own, bound to as many cores as it has threads. "torch-fidelity" runs at its default
    batch of 64 and at 16, which suits a CPU better.
    """
    import tempfile

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(images):
            smooth = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side))
            smooth.save(Path(folder) / f"{i:04}.png")
        for plan, batch, dtype in (
            ("torch-fidelity", 64, "float32"),
            ("torch-fidelity", 16, "float32"),
            ("vgen", 0, "float32"),
            ("vgen", 0, "bfloat16"),
        ):
            job = {"plan": plan, "batch": batch, "dtype": dtype, "threads": threads, "device": device}
            rows.append(job | _measure_apart("evaluate", job | {"folder": folder}))
            print(f"measured {plan} {dtype} {batch or ''}", file=sys.stderr)
    default, best = rows[0]["per_second"], max(rows[0]["per_second"], rows[1]["per_second"])
    lines = [
        ["extraction", "dtype", "batch", "images/s", "of torch-fidelity's default", "of its best", "memory", "error"]
    ]
    for row in rows:
        rate = row["per_second"]
        size = str(row["batch"] or "own")
        error = abs(row["mean"] - rows[0]["mean"]) / abs(rows[0]["mean"])
        lines.append([row["plan"], row["dtype"], size, f"{rate:.2f}", f"{rate / default:.2f}x", f"{rate / best:.2f}x"])
        lines[-1] += [f"{row['memory_gb']:.2f} GB", f"{error:.1e}"]
    _print_table(lines)


def _run_evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Time one way to extract features of all images in a folder."""
    import tempfile

    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "inception.pth"
        _random_inception(weights)
        if job["plan"] == "vgen":
            from vgen.evaluation.features import FeatureStore, extract
            from vgen.evaluation.images import open_images
            from vgen.evaluation.inception import Inception

            ours = Inception(weights, device=job["device"], dtype=getattr(torch, job["dtype"]))
            ours(torch.zeros(16, 3, 32, 32, dtype=torch.uint8))
            start = time.perf_counter()
            found = extract(open_images(job["folder"]), {"": (ours, ("features",))}, FeatureStore(Path(scratch) / "f"))
            features = found.all(ours, "features")
        else:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
            from torch_fidelity.utils import ImagesPathDataset, get_featuresdict_from_dataset

            cuda = job["device"] == "cuda"
            theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=weights)
            theirs = theirs.cuda() if cuda else theirs
            theirs(torch.zeros(16, 3, 32, 32, dtype=torch.uint8, device=job["device"]))
            start = time.perf_counter()
            files = sorted(str(path) for path in Path(job["folder"]).iterdir())
            dataset = ImagesPathDataset(files)
            features = get_featuresdict_from_dataset(dataset, theirs, job["batch"], cuda, False, False)["2048"]
        seconds = time.perf_counter() - start
    return {
        "per_second": len(features) / seconds,
        "mean": float(features.mean()),
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def _random_inception(path: Any) -> None:
    """Weights of the right shapes, small enough that nothing overflows, in torch-fidelity's layout."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Blank(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, *state: Any, **options: Any) -> Any:
            return None

    empty = path.with_suffix(".empty")
    torch.save({}, empty)
    torch.manual_seed(0)
    torch.save(Blank("x", ["2048"], feature_extractor_weights_path=empty).state_dict(), path)


# ---- measuring


def random_model(build: Callable[[], Any], dtype: Any, device: str) -> Any:
    """A model with small random weights, the same in every dtype up to rounding, made without a float32 copy."""
    import torch

    with torch.device("meta"):
        model = build()
    for name, module in model.named_children():
        model._modules[name] = module.to_empty(device=device).to(dtype)
    for name, parameter in model._parameters.items():
        if parameter is not None:
            model._parameters[name] = torch.nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1 and not name.endswith("bias"):
                parameter.fill_(1)
            elif parameter.ndim < 2:
                parameter.zero_()
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / fan_in**0.5)
        for buffer in model.buffers():
            buffer.zero_()
    return model.eval().requires_grad_(False)


def linear_flop(x: Any, weight: Any, *rest: Any, out_val: Any = None, **named: Any) -> int:
    """For torch's counter, which gives shapes: x (..., D_in), weight (D_out, D_in)."""
    rows = 1
    for side in x[:-1]:
        rows *= side
    return 2 * rows * weight[0] * weight[1]


def _matmul_peak(dtype: Any, device: str, size: int = 2048) -> float:
    """Best of several square matrix multiplications, GFLOP/s, by the faster of torch's two ways to do them."""
    import torch

    from vgen.layers import linear

    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    with torch.no_grad():
        ways: list[Callable[[], Any]] = [lambda: a @ b, lambda: linear(a, b, None)]
        best = min(seconds(way, device) for _ in range(8) for way in ways)
    return 2 * size**3 / best / 1e9


def seconds(work: Callable[[], Any], device: str) -> float:
    import torch

    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_turns(works: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each work in `repeats` turns, after one to warm up. Every turn does each once, neither always first:
    what slows the machine for a while slows all of a turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(1 + repeats):
        for name in sorted(works, reverse=bool(turn % 2)):
            taken = seconds(works[name], device)
            if turn:
                times[name].append(taken)
    return times


def _print_table(lines: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def _measure_apart(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a configuration in a fresh process of this script and return its figures."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    command = [sys.executable, __file__, "measure", name, json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the measurement {name} {job} failed")
    return json.loads(done.stdout.splitlines()[-1])


@app.command(hidden=True)
def measure(name: str, job: str) -> None:
    """One configuration, in this process."""
    from benchmark_batch import run_batch
    from benchmark_far import run_context, run_steps
    from benchmark_masked import run_categorical, run_sampling
    from benchmark_mvar import run_pass, run_scan
    from benchmark_nfig import run_pairs
    from benchmark_parallel import run_counts, run_times
    from benchmark_studio import run_page, run_previews
    from benchmark_zoo import run_zoo

    runs = {"var": _run_var, "evaluate": _run_evaluate, "masked": run_sampling, "categorical": run_categorical}
    runs |= {"mvar": run_pass, "scan": run_scan, "nfig": run_pairs, "zoo": run_zoo}
    runs |= {"far": run_steps, "far-context": run_context}
    runs |= {"batch": run_batch, "parallel": run_times, "parallel-counts": run_counts}
    runs |= {"studio-page": run_page, "studio-previews": run_previews}
    print(json.dumps(runs[name](json.loads(job))))


if __name__ == "__main__":
    app()
