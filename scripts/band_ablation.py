"""Does frequency order help? Masks on and off at equal everything else: `python scripts/band_ablation.py`.

For each variant, band schedules ("none" is VAR's quantiser) and losses, and each seed it trains a tokenizer and a VAR
on its tokens, from the presets of fashion-nfig with far shorter runs, all in float32, judges both, and prints one table
of all figures. What the file of figures or the folder of runs holds already is not trained again; give each of several
processes its own --only.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from vgen import hub
from vgen.data import ImageSource, open_source, spread, to_model_range, to_uint8, to_unit_range
from vgen.evaluation.extractors import Spectrum
from vgen.evaluation.quick import QuickJudge
from vgen.files import atomic_file
from vgen.spectrum import SCHEDULES, band_of_frequency, compare_spectra, keep_bands
from vgen.training.config import load_config
from vgen.training.run import build_task, start

VARIANTS: dict[str, dict[str, str]] = {name: {"band_schedule": name} for name in SCHEDULES}
VARIANTS["nyquist-full"] = {"band_schedule": "nyquist", "compare": "full"}  # losses against the whole latent, as VAR's
TEST_IMAGES = 2000  # of which tokenizers are judged
SAMPLES = 2000  # of generators


def main(
    only: Annotated[str, typer.Option(help="Variants, separated by commas.")] = ",".join(VARIANTS),
    seeds: Annotated[str, typer.Option(help="Seeds of training, separated by commas.")] = "0,1,2",
    tokenizer_steps: Annotated[int, typer.Option(help="Batches of 32 images.")] = 600,
    generator_steps: Annotated[int, typer.Option(help="Batches of 16 images.")] = 600,
    data_root: Annotated[str | None, typer.Option(help="Where Fashion-MNIST lies.")] = None,
    runs: Annotated[Path, typer.Option(help="Where models are trained.")] = Path("runs/bands"),
    out: Annotated[Path, typer.Option(help="All figures; the table is written beside them.")] = Path(
        "docs/results/bands.json"
    ),
) -> None:
    """Train and judge what is not there yet, then print the table of all."""
    torch.set_num_threads(1)
    test = open_source("fashion-mnist", "test", 28, 1, data_root)
    steps = {"tokenizer_steps": tokenizer_steps, "generator_steps": generator_steps}
    for seed in [int(item) for item in seeds.split(",")]:
        for variant in only.split(","):
            if (variant, seed) in _measured(out, runs, steps):
                continue
            folder = runs / f"{variant}-{seed}"
            shared = [f"seed={seed}", "precision=no"] + ([f"data_root={data_root}"] if data_root else [])
            short = [*shared, "batch_size=32", "warmup=100"]
            tokenizer = _train(folder / "tokenizer", "fashion-nfig-vq", tokenizer_steps, VARIANTS[variant], short)
            chosen = [*shared, "batch_size=16", "flip=false", f"tokenizer={tokenizer}", "classifier=null"]
            generator = _train(folder / "generator", "fashion-nfig", generator_steps, {}, chosen)
            figures = {"variant": variant, "seed": seed, **steps, **judge(generator, test, folder)}
            with atomic_file(folder / "figures.json") as partial:
                partial.write_text(json.dumps(figures, indent=1) + "\n")
    rows = [row for _, row in sorted(_measured(out, runs, steps).items())]
    with atomic_file(out) as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")
    with atomic_file(out.with_suffix(".md")) as partial:
        partial.write_text(table(rows))
    print(table(rows))


def _measured(out: Path, runs: Path, steps: dict[str, int]) -> dict[tuple[str, int], dict[str, Any]]:
    """Figures by variant and seed, of the file `out` and of finished runs; all of them of equally long training."""
    rows = json.loads(out.read_text()) if out.is_file() else []
    rows += [json.loads(path.read_text()) for path in sorted(runs.glob("*-*/figures.json"))]
    for row in rows:
        if any(row[name] != count for name, count in steps.items()):
            found = ", ".join(f"{name} {row[name]}" for name in steps)
            raise SystemExit(f"there are figures of {found}: train as long, or choose another --out and --runs")
    return {(row["variant"], row["seed"]): row for row in rows}


def _train(folder: Path, preset: str, steps: int, model: dict[str, str], settings: Sequence[str]) -> Path:
    """The finished model of a run, trained or continued where it is not finished yet."""
    if (folder / "model").is_dir():
        return folder / "model"
    changes = [f"steps={steps}", f"eval_every={steps}", f"sample_every={steps}", "save_every=250", *settings]
    changes += [f"model.{name}={value}" for name, value in model.items()]
    return start(load_config(preset, changes), folder, resume=any((folder / "checkpoints").glob("step-*")))


# ---- judging


def judge(folder: Path, test: ImageSource, run: Path) -> dict[str, Any]:
    """All figures of a trained pipeline and its tokenizer."""
    pipeline = hub.load(folder, device="cpu")
    images = to_model_range(test.images(spread(len(test.labels), TEST_IMAGES)))
    with torch.no_grad():
        figures = _judge_tokenizer(pipeline.tokenizer, images)
    figures |= _likelihood(run / "generator", pipeline)
    began = time.process_time()
    figures |= QuickJudge("fashion-classifier", test)(pipeline, SAMPLES, guidance_scale=2.0)
    figures["cpu_ms_per_sample"] = 1000 * (time.process_time() - began) / SAMPLES
    for part in ("tokenizer", "generator"):
        lines = [json.loads(line) for line in (run / part / "metrics.jsonl").read_text().splitlines()]
        figures[f"{part}_cpu_minutes"] = lines[-1]["cpu_seconds"] / 60
    return figures


def _judge_tokenizer(tokenizer: Any, images: Tensor) -> dict[str, Any]:
    """Per stage: PSNR of the decoded prefix, relative error against all of the latent, energy above the cut-off, energy
    kept by the bands; of the whole: codes in use and spectra."""
    source = tokenizer.encode_latent(images)
    tokens = tokenizer.encode(images)
    side, stages, schedule = tokenizer.scales[-1], len(tokenizer.scales), tokenizer.config["band_schedule"]
    band = band_of_frequency(side, side, tokenizer.scales, schedule)
    energy = source.square().sum()
    figures: dict[str, Any] = {"psnr": [], "residual": [], "leakage": [], "loss": []}
    for k in range(stages):
        latent = tokenizer.latent(tokens[: k + 1])
        rebuilt = tokenizer.decode_latent(latent)
        error = (rebuilt[:, :1] - images[:, :1]).square().mean((1, 2, 3))
        figures["psnr"].append(float((10 * torch.log10(4 / error)).mean()))
        figures["residual"].append(float((source - latent).square().sum() / energy))
        above = latent - keep_bands(latent, band <= k)
        figures["leakage"].append(float(above.square().sum() / latent.square().sum()))
        figures["loss"].append(float((tokenizer.aim(source, k) - latent).square().mean()))
    mean = source.mean((-2, -1), keepdim=True)
    for name, grid in (("latent", source - mean), ("pixel", images - images.mean((-2, -1), keepdim=True))):
        bands = band_of_frequency(grid.shape[-2], grid.shape[-1], tokenizer.scales, schedule)
        kept = [keep_bands(grid, bands <= k).square().sum() / grid.square().sum() for k in range(stages)]
        figures[f"{name}_energy"] = [float(share) for share in kept]
    spectra = [
        Spectrum()(to_uint8(to_unit_range(x.expand(-1, 3, -1, -1))), ("features",))["features"]
        for x in (rebuilt, images)
    ]
    figures["spectrum"] = compare_spectra(*(x.double().mean(0) for x in spectra))
    return figures | tokenizer.codebook.statistics() | {"tokens": sum(item.shape[1] for item in tokens)}


def _likelihood(run: Path, pipeline: Any) -> dict[str, Any]:
    """Cross-entropy of held-out tokens by stage, nats per token."""
    config = load_config(str(run / "config.yaml"))
    task: Any = build_task(config)
    task.model.load_state_dict(pipeline.generator.state_dict())
    task.model.eval()
    rows = spread(len(task.test_tokens), TEST_IMAGES)
    losses = []
    with torch.no_grad():
        for start_row in range(0, len(rows), 250):
            chosen = rows[start_row : start_row + 250]
            tokens = torch.from_numpy(task.test_tokens[chosen].astype("int64"))
            losses.append(task.token_losses(tokens, task.test_labels[chosen]))
    mean = torch.cat(losses).mean(0)
    return {"nll": float(mean.mean()), "stage_nll": [float(part.mean()) for part in mean.split(task.model.lengths)]}


# ---- the table


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, with the standard deviation of one seed where there are several."""
    columns = {
        "PSNR, dB": lambda row: row["psnr"][-1],
        "spread of stage losses": lambda row: _spread(row["loss"]),
        "codes used": lambda row: row["codes_used"],
        "spectrum kept": lambda row: row["spectrum"]["keep"],
        "nats/token": lambda row: row["nll"],
        "class accuracy": lambda row: row["class_accuracy"],
        "classifier Fréchet": lambda row: row["classifier_frechet"],
        "ms/sample": lambda row: row["cpu_ms_per_sample"],
    }
    stages = len(rows[0]["psnr"]) if rows else 0
    names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    head = ["bands", "seeds", *columns]
    lines = [head, ["---"] * len(head)]
    for name in names:
        chosen = [row for row in rows if row["variant"] == name]
        cells = [_mean([value(row) for row in chosen]) for value in columns.values()]
        lines.append([name, str(len(chosen)), *cells])
    text = _markdown(lines)
    for title, key, digits in (
        ("PSNR of the first k maps, dB", "psnr", 2),
        ("relative error of the latent after map k", "residual", 3),
        ("share of energy above the cut-off", "leakage", 4),
        ("energy of the latent in bands up to k, without the mean", "latent_energy", 3),
        ("energy of the pixels in bands up to k, without the mean", "pixel_energy", 3),
        ("nats per token of map k", "stage_nll", 3),
    ):
        lines = [[title, *(str(k + 1) for k in range(stages))], ["---"] * (stages + 1)]
        for name in names:
            chosen = [row for row in rows if row["variant"] == name]
            lines.append([name, *(_mean([row[key][k] for row in chosen], digits) for k in range(stages))])
        text += "\n" + _markdown(lines)
    return text


def _mean(values: list[float], digits: int = 3) -> str:
    found = torch.tensor(values, dtype=torch.float64)
    spread_of = f" ± {float(found.std()):.{digits}f}" if len(values) > 1 else ""
    return f"{float(found.mean()):.{digits}f}{spread_of}"


def _spread(losses: list[float]) -> float:
    """Coefficient of variation."""
    found = torch.tensor(losses, dtype=torch.float64)
    return float(found.std(correction=0) / found.mean())


def _markdown(lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    typer.run(main)
