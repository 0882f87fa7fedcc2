"""How well a model continues moving digits: `python scripts/video_prediction.py predict | extrapolate MODEL`.

Clips are made from MNIST test digits, by the law that `moving-far` learned (whole pixels a frame, in eight
directions) and by OpenSTL (2306.11249), and are no part of training; errors are by OpenSTL's definitions.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from skimage.metrics import structural_similarity
from torch import Tensor

import vgen
from vgen.evaluation.classifier import ImageClassifier
from vgen.files import atomic_file
from vgen.moving import DIGIT, MovingDigits
from vgen.progress import progress

matplotlib.use("Agg")
from matplotlib import pyplot as plt

app = typer.Typer(add_completion=False)
SIZE = 64
SEED = 1_000_000  # of test clips
BATCH = 50
BASELINES = ("last frame repeated", "mean of the given frames", "black frames")
Model = Annotated[str, typer.Argument(help="A bundled name or a folder.")]
DataRoot = Annotated[str | None, typer.Option(help="Where MNIST lies.")]
Clips = Annotated[int, typer.Option(help="Test clips of each kind.")]


@dataclass(frozen=True)
class Kind:
    """A kind of test clips: what moves how, and how many frames are given and predicted."""

    name: str
    digits: int
    given: int
    made: int
    speed: float | tuple[float, float] | None = None  # pixels per frame; None: OpenSTL's 3.6
    directions: int | None = None  # None: any, OpenSTL's

    def clips(self, root: str | None, number: int) -> tuple[Tensor, Tensor]:
        """(N, F, S, S) float32 in [0, 1], and the digits (N, n)."""
        source = MovingDigits(
            root,
            "test",
            SIZE,
            digits=self.digits,
            frames=self.given + self.made,
            speed=self.speed,
            directions=self.directions,
            seed=SEED,
        )
        clips, labels = source.clips(range(number))
        return clips[:, :, 0].float() / 255, labels


LEARNED = (2, 5)  # pixels per frame, at least and at most
KINDS = (
    Kind("one digit, 5 to 10", 1, 5, 10, LEARNED, 8),
    Kind("one digit, 5 to 15, 4 pixels a frame", 1, 5, 15, 4, 8),  # divides the patch of 8
    Kind("one digit, 5 to 15, 3 pixels a frame", 1, 5, 15, 3, 8),
    Kind("one digit, 5 to 15, 5 pixels a frame", 1, 5, 15, 5, 8),
    Kind("two digits, 5 to 15", 2, 5, 15, LEARNED, 8),
    Kind("OpenSTL's law, one digit, 5 to 10", 1, 5, 10),
    Kind("OpenSTL's law, two digits, 10 to 10", 2, 10, 10),
)
MANY = (KINDS[0], KINDS[-1])  # of which several samples are drawn
PICTURED = KINDS[1:5]


# ---- rollouts and their errors


def rollouts(pipe: Any, clips: Tensor, kind: Kind, samples: int = 1, **settings: Any) -> Tensor:
    """Predicted frames (K, N, made, S, S) in [0, 1]; sample k of clip i has the seed K i + k, so each is another."""
    found = []
    with progress(samples * len(clips), kind.name, "clips") as shown:
        for k in range(samples):
            parts = []
            for rows in torch.arange(len(clips)).split(BATCH):
                context = clips[rows, : kind.given, ..., None].expand(-1, -1, -1, -1, 3)
                frames = pipe(
                    context=(context * 255).round().to(torch.uint8).numpy(),
                    context_frames=kind.given,
                    frames=kind.given + kind.made,
                    seeds=[samples * int(row) + k for row in rows],
                    output_type="pt",
                    **settings,
                ).frames
                parts.append(frames[:, kind.given :].mean(2).cpu())
                shown.advance(len(rows))
            found.append(torch.cat(parts))
    return torch.stack(found)


def baselines(clips: Tensor, given: int) -> dict[str, Tensor]:
    """Predictions (N, made, S, S) that anybody could make."""
    shape = clips[:, given:].shape
    parts = (clips[:, given - 1 : given], clips[:, :given].mean(1, keepdim=True), torch.zeros_like(clips[:, :1]))
    return {name: part.expand(shape) for name, part in zip(BASELINES, parts, strict=True)}


def errors(found: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """By OpenSTL's definitions, of each frame, means over clips: MSE and MAE summed over pixels in [0, 1], PSNR in
    dB, and SSIM by scikit-image with the data range 2 that it took floats to have when OpenSTL's table was made."""
    difference = found - truth
    mse = difference.square().mean((2, 3))
    pairs = list(zip(found.flatten(0, 1).numpy(), truth.flatten(0, 1).numpy(), strict=True))
    ssim = torch.tensor([structural_similarity(a, b, data_range=2.0) for a, b in pairs]).view(mse.shape)
    figures = {
        "mse": mse * truth[0, 0].numel(),
        "mae": difference.abs().sum((2, 3)),
        "ssim": ssim,
        "psnr": -10 * mse.clamp_min(1e-10).log10(),
    }
    return {name: values.mean(0).tolist() for name, values in figures.items()}


def best(samples: Tensor, truth: Tensor) -> Tensor:
    """Of K samples (K, N, F, S, S) of each clip the one with the least squared error."""
    chosen = (samples - truth).square().mean((2, 3, 4)).argmin(0)
    return samples[chosen, torch.arange(len(chosen))]


# ---- does the digit stay itself?


def around_the_mass(frames: Tensor) -> Tensor:
    """28 x 28 cuts of frames (B, S, S) about the centre of their brightness, where MNIST has its digits."""
    bright = frames.where(frames > 0.1, 0)
    places = torch.arange(frames.shape[-1], dtype=frames.dtype)
    total = bright.sum((1, 2)).clamp_min(1e-6)
    rows, columns = ((bright.sum(axis) * places).sum(1) / total for axis in (2, 1))
    half = DIGIT // 2
    padded = torch.nn.functional.pad(frames, (half,) * 4)
    starts = [(position + 0.5).round().long().tolist() for position in (rows, columns)]
    cuts = [frame[y : y + DIGIT, x : x + DIGIT] for frame, y, x in zip(padded, *starts, strict=True)]
    return torch.stack(cuts)


@torch.no_grad()
def agreement(classifier: ImageClassifier, frames: Tensor, labels: Tensor) -> list[float]:
    """Share of clips whose digit (N,) the classifier sees, in each frame of (N, F, S, S)."""
    shares = []
    for frame in frames.unbind(1):
        images = around_the_mass(frame)[:, None] * 2 - 1
        shares.append(float((classifier(images).argmax(1) == labels).float().mean()))
    return shares


# ---- pictures


def sheet(path: Path, clips: Sequence[tuple[str, np.ndarray]], given: int, columns: Sequence[int]) -> None:
    """A picture of named clips (F, S, S) in [0, 1], one below the other; frames that were given have a blue border."""
    height = 0.66 * len(clips) + 0.3
    figure, axes = plt.subplots(len(clips), len(columns), figsize=(0.62 * len(columns) + 1.7, height), squeeze=False)
    for row, (name, clip) in zip(axes, clips, strict=True):
        for axis, number in zip(row, columns, strict=True):
            axis.imshow(clip[number], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color="#2a7de1" if number < given else "#bbbbbb", linewidth=2 if number < given else 0.5)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for axis, number in zip(axes[0], columns, strict=True):
        axis.set_title(str(number + 1), fontsize=7, pad=2)
    figure.subplots_adjust(0.16, 0.01, 0.995, 1 - 0.25 / height, 0.04, 0.06)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path: Path, figures: Any) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(figures, indent=1) + "\n")


# ---- commands


@app.command()
def predict(
    model: Model = "moving-far",
    classifier: Annotated[str | None, typer.Option(help="Folder of a classifier of MNIST's 28 x 28 digits.")] = None,
    clips: Clips = 200,
    samples: Annotated[int, typer.Option(help="Drawn of each clip, for the best and the mean.")] = 10,
    data_root: DataRoot = None,
    out: Annotated[Path, typer.Option()] = Path("docs/results/moving-far.json"),
    pictures: Annotated[Path, typer.Option()] = Path("docs"),
) -> None:
    """Errors of predictions beside simple baselines, and how often the digit stays itself."""
    pipe = vgen.load(model, device="cpu")
    judge = ImageClassifier.from_pretrained(classifier).eval() if classifier else None
    report: dict[str, Any] = {"model": model, "clips": clips, "settings": pipe.config["settings"], "kinds": []}
    shown: list[tuple[str, np.ndarray]] = []
    for kind in KINDS:
        truth, labels = kind.clips(data_root, clips)
        found = rollouts(pipe, truth, kind, samples if kind in MANY else 1)
        report["kinds"].append(asdict(kind) | {"predictions": compare(pipe, truth, found, kind)})
        if judge is not None and kind.digits == 1:
            frames = torch.cat([truth[:, : kind.given], found[0]], 1)
            named = {"predicted": frames, "true": truth}
            report["kinds"][-1]["agreement"] = {name: agreement(judge, x, labels[:, 0]) for name, x in named.items()}
        if kind in PICTURED:
            words = "two digits" if kind.digits > 1 else f"{kind.speed} pixels a frame"
            for i in range(2):
                shown += [(f"{words}, true", truth[i].numpy())]
                shown += [("predicted", torch.cat([truth[i, : kind.given], found[0, i]]).numpy())]
    write(out, report)
    with atomic_file(out.with_suffix(".md")) as partial:
        partial.write_text(prediction_table(report))
    print(prediction_table(report))
    sheet(pictures / "far-prediction.png", shown, 5, range(20))
    sheet(pictures / "far-strip.png", shown[:4], 5, range(20))


def compare(pipe: Any, truth: Tensor, found: Tensor, kind: Kind) -> dict[str, dict[str, list[float]]]:
    """Errors of the first sample, the best and the mean of several, and of baselines; the last is the codec's own."""
    wanted = truth[:, kind.given :]
    rows = {"one sample": found[0]}
    if len(found) > 1:
        rows |= {f"best of {len(found)}": best(found, wanted), f"mean of {len(found)}": found.mean(0)}
    rows |= baselines(truth, kind.given)
    pixels = wanted[:, :, None].expand(-1, -1, 3, -1, -1) * 2 - 1
    with torch.no_grad():
        rebuilt = pipe.tokenizer.decode(pipe.tokenizer.encode(pixels))
    rows["true frames through the codec"] = (rebuilt.mean(2).clamp(-1, 1) + 1) / 2
    return {name: errors(values, wanted) for name, values in rows.items()}


def prediction_table(report: dict[str, Any]) -> str:
    """Markdown of all kinds: means over the predicted frames, and of the first and the last one."""
    text = ""
    for kind in report["kinds"]:
        copied = np.array(kind["predictions"][BASELINES[0]]["mse"])
        text += f"\n{kind['name'].capitalize()} ({report['clips']} clips)\n\n"
        text += "| | MSE | MAE | SSIM | PSNR, dB | MSE of the first | of the last | first / copied | mean / copied |\n"
        text += "|---" * 9 + "|\n"
        for name, figures in kind["predictions"].items():
            mse = np.array(figures["mse"])
            cells = [f"{mse.mean():.1f}", f"{np.mean(figures['mae']):.1f}", f"{np.mean(figures['ssim']):.4f}"]
            cells += [f"{np.mean(figures['psnr']):.2f}", f"{mse[0]:.1f}", f"{mse[-1]:.1f}"]
            cells += [f"{mse[0] / copied[0]:.3f}", f"{mse.mean() / copied.mean():.3f}"]
            text += f"| {name} | " + " | ".join(cells) + " |\n"
        if shares := kind.get("agreement"):
            last = kind["given"] + kind["made"]
            chosen = [n for n in (kind["given"] + 1, kind["given"] + 5, kind["given"] + 10, last) if n <= last]
            text += "\n| frame | " + " | ".join(str(n) for n in dict.fromkeys(chosen)) + " |\n"
            text += "|---" * (1 + len(dict.fromkeys(chosen))) + "|\n"
            for name, values in shares.items():
                cells = [f"{100 * values[n - 1]:.1f}%" for n in dict.fromkeys(chosen)]
                text += f"| the digit is seen in {name} frames | " + " | ".join(cells) + " |\n"
    return text.lstrip()


@app.command()
def extrapolate(
    model: Model = "moving-far",
    clips: Clips = 100,
    data_root: DataRoot = None,
    out: Annotated[Path, typer.Option()] = Path("docs/results/moving-far-long.json"),
    pictures: Annotated[Path, typer.Option()] = Path("docs"),
) -> None:
    """Four times the frames of training, with and without FlexRoPE and a window; and the schedules at equal work."""
    pipe = vgen.load(model, device="cpu")
    long = Kind("one digit, 5 to 59", 1, 5, 59, LEARNED, 8)
    truth, _ = long.clips(data_root, clips)
    windows: dict[str, dict[str, Any]] = {"all frames seen": {"context_window": None}}
    windows |= {f"all frames, slope {s}": {"context_window": None, "slope": s} for s in (0.05, 0.2, 0.8)}
    windows |= {"the last 15 frames": {"context_window": 15}}
    windows |= {f"the last 15, slope {s}": {"context_window": 15, "slope": s} for s in (0.2, 0.8)}
    short = KINDS[0]
    schedules: dict[str, dict[str, Any]] = {"autoregressive": {"schedule": "autoregressive"}}
    schedules |= {f"pyramid, {u} apart": {"schedule": "pyramid", "uncertainty": u} for u in (2.0, 1.0)}
    schedules["full sequence"] = {"schedule": "full-sequence"}
    report: dict[str, Any] = {"model": model, "clips": clips}
    report["length"] = _measured(pipe, truth, long, windows, pictures / "far-long.png", range(0, 64, 4))
    equal = {name: setting | {"context_window": 15, "steps": 8} for name, setting in schedules.items()}
    report["schedules"] = _measured(pipe, truth[:, :15], short, equal, pictures / "far-schedules.png", range(15))
    write(out, report)
    text = long_table(report)
    with atomic_file(out.with_suffix(".md")) as partial:
        partial.write_text(text)
    print(text)


def _measured(
    pipe: Any, truth: Tensor, kind: Kind, variants: dict[str, dict[str, Any]], picture: Path, columns: Sequence[int]
) -> dict[str, Any]:
    """Errors of each variant of the settings, of baselines too, and a picture of one clip under all of them."""
    wanted = truth[:, kind.given :]
    rows: dict[str, Any] = {}
    shown = [("true", truth[0].numpy())]
    for name, settings in variants.items():
        began = time.process_time()
        found = rollouts(pipe, truth, kind, **settings)[0]
        spent = (time.process_time() - began) / len(truth)
        rows[name] = errors(found, wanted) | {"settings": settings, "cpu_seconds_per_clip": spent}
        shown.append((name, torch.cat([truth[0, : kind.given], found[0]]).numpy()))
    for name, found in baselines(truth, kind.given).items():
        rows[name] = errors(found, wanted)
    sheet(picture, shown, kind.given, columns)
    return rows


def long_table(report: dict[str, Any]) -> str:
    """Markdown of both comparisons: errors of parts of the rollout."""
    text = ""
    for key, parts in (("length", (5, 15, 30, 59)), ("schedules", (1, 5, 10))):
        text += "\n| | MSE of all | " + " | ".join(f"of frame {n}" for n in parts) + " | SSIM | CPU s per clip |\n"
        text += "|---" * (4 + len(parts)) + "|\n"
        for name, figures in report[key].items():
            cells = [f"{np.mean(figures['mse']):.1f}", *(f"{figures['mse'][n - 1]:.1f}" for n in parts)]
            seconds = figures.get("cpu_seconds_per_clip")
            cells += [f"{np.mean(figures['ssim']):.4f}", f"{seconds:.2f}" if seconds else ""]
            text += f"| {name} | " + " | ".join(cells) + " |\n"
    return text.lstrip()


if __name__ == "__main__":
    app()
