"""All families on equal terms: `python scripts/compare_families.py measure`, then `times`, then `table`.

`measure` samples each bundled model with each of its samplers under several seeds and judges the samples; `times` takes
seconds per image of all of them in one run, and of the training steps behind them; `table` writes the table, also into
the README, and the plot, from the two JSON files. Figures that a file holds already, for the same weights, are not
measured again.
"""

import json
import re
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Any

import torch
import typer
from benchmark import by_turns
from benchmark_training import presets_of, seconds_per_step

from vgen import cli, hub
from vgen.files import atomic_file
from vgen.training.config import load_config

ROOT = Path(__file__).parents[1]
METRICS = "fid,kid,prc,accuracy,frechet,memorization"
INCEPTION_DTYPE = "float32"  # half as fast as bfloat16 where there is that, but the same on every machine
BATCHES = (1, 16)
BEGIN, END = "<!-- compare_families: begin -->", "<!-- compare_families: end -->"
app = typer.Typer(add_completion=False, help=__doc__)
Results = Annotated[Path, typer.Option(help="Folder of the figures.")]
Only = Annotated[str, typer.Option(help="Models, separated by commas; default: all.")]


@dataclass(frozen=True)
class Entry:
    """A model with a sampler: a row of the table."""

    model: str
    sampler: str
    settings: dict[str, Any] = field(default_factory=dict)
    tokens_of: str = ""  # another sampler of the model, whose samples these are, token for token

    @property
    def name(self) -> str:
        return " ".join([self.model, self.sampler, *(f"{key}={value}" for key, value in self.settings.items())])


ENTRIES = [
    Entry("fashion-var", "next-scale"),
    Entry("fashion-mvar", "next-scale"),
    Entry("fashion-nfig", "next-scale"),
    Entry("fashion-maskgit", "maskgit"),
    Entry("fashion-maskgit", "maskgit", {"full_steps": 6, "partial_steps": 1}),
    Entry("fashion-maskgit", "halton", {"steps": 8}),
    Entry("fashion-maskgit", "first-hitting"),
    Entry("fashion-recurrent", "raster"),
    Entry("fashion-recurrent", "wave-exact", tokens_of="raster"),
    Entry("fashion-recurrent", "wave-df"),
]


def chosen(only: str) -> list[Entry]:
    wanted = only.split(",") if only else hub.list_models()
    return [entry for entry in ENTRIES if entry.model in wanted]


@app.command()
def measure(
    only: Only = "",
    per_class: Annotated[int, typer.Option(help="Images of each class and seed.")] = 500,
    seeds: Annotated[int, typer.Option(help="How many sets of other seeds.")] = 3,
    data_root: Annotated[str | None, typer.Option(help="Where Fashion-MNIST lies.")] = None,
    results: Results = ROOT / "docs" / "results",
) -> None:
    """Judge what has not been judged yet."""
    path = results / "families.json"
    for entry in chosen(only):
        pipeline, known = loaded(entry.model), as_bundled(entry) | {"per_class": per_class}
        for number in range(seeds):
            rows = _read(path)
            row = known | {"seed": number * per_class * pipeline.null_class}  # no image of one set is in another
            if any(row.items() <= found.items() for found in rows):
                continue
            judged = _of_its_twin(entry, row, rows) or _evaluate(entry, row, data_root)
            one = pipeline([0], seeds=[0], sampler=entry.sampler, output_type="latent", **entry.settings)
            row |= {"evaluations": one.evaluations} | judged
            rows = _read(path)  # judging takes minutes, in which another process may have written its own
            kept = [old for old in rows if not _is_of(old, entry) or known.items() <= old.items()]  # no other weights
            _write(path, [*kept, row])
            print(entry.name, row["seed"], {name: round(value, 4) for name, value in row["metrics"].items()})


@cache
def loaded(model: str) -> Any:
    return hub.load(model, device="cpu")


def as_bundled(entry: Entry) -> dict[str, Any]:
    """What its figures depend on: itself, the model's weights and own settings, and in what Inception computes."""
    pipeline = loaded(entry.model)
    found = {"checkpoint": pipeline.checkpoint(), "own_settings": dict(pipeline.config["settings"])}
    return asdict(entry) | found | {"inception": INCEPTION_DTYPE}


def _of_its_twin(entry: Entry, row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What was found of the same samples, where another sampler has drawn them."""
    twin = row | {"sampler": entry.tokens_of, "tokens_of": ""}
    found = [old for old in rows if twin.items() <= old.items()]
    return {key: found[0][key] for key in ("metrics", "protocol")} if found else None


def _evaluate(entry: Entry, row: dict[str, Any], data_root: str | None) -> dict[str, Any]:
    """What `vgen evaluate` finds, and its protocol."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = ["evaluate", entry.model, "--per-class", str(row["per_class"]), "--seed", str(row["seed"])]
        command += ["--sampler", entry.sampler, "--device", "cpu", "--json", str(path), "--metrics", METRICS]
        command += ["--reference", "fashion-mnist:test", "--train", "fashion-mnist:train"]
        command += ["--extractor-dtype", INCEPTION_DTYPE]
        command += [word for key, value in entry.settings.items() for word in ("--set", f"{key}={value}")]
        if code := cli.main(command + (["--data-root", data_root] if data_root else [])):
            raise SystemExit(code)
        report = json.loads(path.read_text())
    return {"metrics": report["metrics"], "protocol": report["lines"]["fid"]}


@app.command()
def times(
    only: Only = "",
    repeats: Annotated[int, typer.Option(help="Timed turns, after one to warm up.")] = 7,
    data_root: Annotated[str | None, typer.Option(help="Where Fashion-MNIST lies.")] = None,
    results: Results = ROOT / "docs" / "results",
) -> None:
    """Seconds per image of all entries and of a step of their training, turn by turn in one run of one thread."""
    torch.set_num_threads(1)
    entries = {entry.name: entry for entry in chosen(only)}
    found: dict[str, dict[str, float]] = {name: {} for name in entries}
    for batch in BATCHES:

        def work(entry: Entry, size: int = batch) -> Any:
            labels, seeds = [i % 10 for i in range(size)], list(range(size))
            return lambda: loaded(entry.model)(labels, seeds=seeds, sampler=entry.sampler, **entry.settings)

        taken = by_turns({name: work(entry) for name, entry in entries.items()}, repeats, "cpu")
        for name, seconds in taken.items():
            found[name][str(batch)] = median(seconds) / batch
    training = seconds_per_step(list(dict.fromkeys(entry.model for entry in entries.values())), repeats, data_root)
    facts = {"repeats": repeats, "torch": torch.__version__}
    _write(results / "families-times.json", facts | {"seconds": found, "training": training})


@app.command()
def table(
    results: Results = ROOT / "docs" / "results",
    readme: Annotated[Path, typer.Option(help="The table goes between its two marks.")] = ROOT / "README.md",
) -> None:
    """Write the table and the plot of what has been measured of the models as they are bundled now."""
    rows, taken = _read(results / "families.json"), _read(results / "families-times.json")
    seconds, training = (taken[key] if taken else {} for key in ("seconds", "training"))
    present = [(entry, as_bundled(entry).items()) for entry in ENTRIES]
    groups = {entry.name: (entry, [row for row in rows if known <= row.items()]) for entry, known in present}
    groups = {name: group for name, group in groups.items() if group[1]}
    text = markdown(groups, seconds, training)
    with atomic_file(results / "families.md") as partial:
        partial.write_text(text)
    old = readme.read_text()
    if not re.search(f"{BEGIN}.*{END}", old, re.DOTALL):
        raise typer.BadParameter(f"{readme} lacks the lines {BEGIN} and {END}")
    with atomic_file(readme) as partial:
        partial.write_text(old[: old.index(BEGIN)] + f"{BEGIN}\n{text}" + old[old.index(END) :])
    plot(groups, seconds, results / "families.png")


def markdown(
    groups: dict[str, tuple[Entry, list[dict[str, Any]]]],
    seconds: dict[str, dict[str, float]],
    training: dict[str, float],
) -> str:
    """The table, and what its figures rest on; `seconds` are of an image by entry and batch, `training` of a step by
    preset."""
    head = ["", "parameters", "tokens", "evaluations", "training, minutes", "ms/image, batch 1", "batch 16"]
    head += ["FID", "KID x 1000", "precision", "recall", "class accuracy", "nearer than 1% of test images"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    spreads: dict[str, list[float]] = {}
    for name, (entry, rows) in groups.items():
        facts = model_facts(entry.model)
        times_of = [f"{seconds[name][str(size)] * 1e3:.1f}" if name in seconds else "" for size in BATCHES]
        cells = [f"`{entry.model}`, {name.removeprefix(entry.model + ' ')}", facts["parameters"], facts["tokens"]]
        cells += [f"{rows[0]['evaluations']}", minutes(entry.model, training), *times_of]
        for metric, scale, digits in (
            ("fid", 1, 2),
            ("kid", 1000, 1),
            ("precision", 1, 3),
            ("recall", 1, 3),
            ("accuracy", 100, 1),
            ("nearer_than_reference", 100, 1),
        ):
            middle, spread = summary(rows, metric, scale)
            unit = "%" if scale == 100 else ""
            cells.append(f"{middle:.{digits}f}{unit}" + (f" ± {spread:.{digits}f}" if rows[1:] else ""))
            if rows[1:]:
                spreads.setdefault(metric, []).append(spread)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", footnote(groups, spreads)]) + "\n"


def summary(rows: list[dict[str, Any]], metric: str, scale: float) -> tuple[float, float]:
    """Mean and standard deviation over sets of seeds; of a single set 0."""
    values = [scale * row["metrics"][metric] for row in rows]
    return mean(values), stdev(values) if values[1:] else 0.0


def footnote(groups: dict[str, tuple[Entry, list[dict[str, Any]]]], spreads: dict[str, list[float]]) -> str:
    """Protocol and noise in words."""
    rows = next(iter(groups.values()))[1]
    number, sets = rows[0]["per_class"] * 10, max(len(found) for _, found in groups.values())
    text = (
        f"{number:,} samples a set, at each model's own settings, against the 10,000 test images: true FID Inception, "
        f"legacy resize, {INCEPTION_DTYPE}. "
        + (f"Mean ± standard deviation over up to {sets} sets of sampling seeds; " if sets > 1 else "One set; ")
        + "one seed of training, so what training anew would change is not in it. Parameters and training with the "
        "tokenizer's; the latter is the steps of all presets behind a model, at the pace of the machine that the times "
        "are of; all times of one core."
    )
    if "fid" in spreads:
        noise = 2 * max(spreads["fid"]) * 2**0.5
        text += f" Of sampling noise alone two FIDs differ by {noise:.2f} at most (two standard deviations)."
    return text


@cache
def model_facts(model: str) -> dict[str, str]:
    """Parameters and tokens, as the model says."""
    pipeline = loaded(model)
    parts = (pipeline.generator, pipeline.tokenizer)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) / 1e6 for part in parts]
    first = next(pipeline.stream([0], seeds=[0]))
    return {
        "parameters": " + ".join(f"{size:.2f}" for size in sizes) + " M",
        "tokens": str(first.known.shape[1]),
    }


def minutes(model: str, training: dict[str, float]) -> str:
    """Minutes that a model and its tokenizer train for, where every preset's `training` step was timed."""
    parts = presets_of(model).values()
    if not all(preset in training for presets in parts for preset in presets):
        return ""
    spent = [sum(load_config(preset).steps * training[preset] / 60 for preset in presets) for presets in parts]
    return " + ".join(f"{each:.0f}" for each in spent)


def plot(
    groups: dict[str, tuple[Entry, list[dict[str, Any]]]], seconds: dict[str, dict[str, float]], path: Path
) -> None:
    """FID and class accuracy against seconds of one image, each with its spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    models = list(dict.fromkeys(entry.model for entry, _ in groups.values()))
    colours = dict(zip(models, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for axes, metric, label, scale in ((panels[0], "fid", "FID", 1), (panels[1], "accuracy", "class accuracy, %", 100)):
        for name, (entry, rows) in groups.items():
            if name not in seconds:
                continue
            middle, spread = summary(rows, metric, scale)
            place = (1e3 * seconds[name]["16"], middle)
            axes.errorbar(*place, yerr=spread, fmt="o", capsize=3, color=colours[entry.model])
            words = name.removeprefix("fashion-").replace(" next-scale", "")
            axes.annotate(words, place, xytext=(6, 4), textcoords="offset points", fontsize=7.5)
        axes.set(xscale="log", xlabel="ms per image of a batch of 16, one core", ylabel=label)
        axes.grid(alpha=0.3, which="both")
        axes.margins(x=0.25)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    pyplot.close(figure)


def _is_of(row: dict[str, Any], entry: Entry) -> bool:
    """Whether it is an entry's, of whichever weights and seeds."""
    return asdict(entry).items() <= row.items()


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else []


def _write(path: Path, content: Any) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    app()
