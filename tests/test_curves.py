"""Curves: a grid of settings, a row for each point, files that are whole after every point."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import tiny
import torch
from accelerate import PartialState
from PIL import Image
from tiny_evaluation import evaluator_of, isolate, judge, pictures, tensor, write_npz

from vgen.batch import plan
from vgen.evaluation.curves import evaluate_grid, grid_points, parse_grid, plot
from vgen.evaluation.sampled import SampledImages
from vgen.types import Request, SettingError

ITEMS = plan([0, 1], 4, 10)
FILES = ["curve.csv", "curve.json", "curve.png"]


class Painter:
    """A pipeline that is quick: pictures by seed, faded by `strength`; every call is noted."""

    source, default_sampler, tokenizer = "painter", "brush", SimpleNamespace(image_size=8)

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def resolve_settings(self, settings: dict[str, Any], sampler: str | None = None) -> dict[str, Any]:
        chosen = {"strength": 1.0, "mode": "wet"} | settings
        if not 0 <= chosen["strength"] <= 1:
            raise SettingError(f"strength is {chosen['strength']}: it must lie in 0..1")
        return chosen

    def request(self, labels: Any, seeds: list[int], sampler: str | None, settings: dict[str, Any]) -> Request:
        chosen = self.resolve_settings(settings)
        return Request(
            model=self.source,
            class_labels=labels,
            seeds=seeds,
            sampler=sampler or self.default_sampler,
            settings=chosen,
        )

    def __call__(self, class_labels: Any, seeds: list[int], output_type: str, **settings: Any) -> SimpleNamespace:
        self.calls.append({"seeds": seeds, **settings})
        images = tensor(np.concatenate([pictures(1, seed) for seed in seeds])) / 255 * settings["strength"]
        evaluations = 5 if settings.get("sampler") == "roller" else 9
        return SimpleNamespace(images=images, seconds=len(seeds) * settings["strength"], evaluations=evaluations)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return write_npz(tmp_path / "reference.npz", pictures(12, seed=99))


def run_grid(pipeline: Any, items: Any, settings: Any, sampler: Any, grid: Any, *rest: Any) -> Iterator[Any]:
    """Evaluate a grid as the command does."""
    yield from evaluate_grid(grid_points(pipeline, items, settings, sampler, grid), *rest)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "curve.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- the grid


@pytest.mark.parametrize(
    ("texts", "grid"),
    [
        ([], {}),
        (["guidance_scale=1,1.5"], {"guidance_scale": [1, 1.5]}),
        (["guidance-scale=1", "top_k=0,100"], {"guidance_scale": [1], "top_k": [0, 100]}),
        ([" top-k = 1 , 2 ,"], {"top_k": [1, 2]}),
        (["more_smooth=true,false"], {"more_smooth": [True, False]}),
        (["guidance_schedule=linear,constant"], {"guidance_schedule": ["linear", "constant"]}),
        (["temperature=-1"], {"temperature": [-1]}),
    ],
)
def test_a_grid_is_settings_and_their_values(texts: list[str], grid: dict[str, list]) -> None:
    found = parse_grid(texts)
    assert found == grid
    assert [type(x) for values in found.values() for x in values] == [type(x) for v in grid.values() for x in v]


@pytest.mark.parametrize("text", ["top_k", "top_k=", "top_k= , ", ""])
def test_a_setting_without_values_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingError, match=r"has no values.*guidance_scale=1,2") as caught:
        parse_grid([text])
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("second", ["top_k=3", "top-k=3", " top_k =1"])
def test_a_setting_named_twice_is_refused(second: str) -> None:
    with pytest.raises(SettingError, match="top_k twice"):
        parse_grid(["top_k=1,2", second])


def test_a_grid_of_too_many_points_is_refused() -> None:
    ten = ",".join(map(str, range(10)))
    assert len(parse_grid([f"a={ten}", f"b={ten}", f"c={ten}"])) == 3
    with pytest.raises(SettingError, match="2000 points, over the limit of 1000"):
        parse_grid([f"a={ten}", f"b={ten}", f"c={ten}", "d=1,2"])


@pytest.mark.parametrize("text", ["top_k=[1", "top_k=1,:,2", "top_k={", "sampler=a=b", "top_k=1 2"])
def test_values_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="neither a number nor a name") as caught:
        parse_grid([text])
    assert repr(text) in str(caught.value)


def test_true_and_false_may_be_written_as_in_python() -> None:
    assert parse_grid(["more_smooth=True,False"]) == {"more_smooth": [True, False]}


def test_numbers_may_be_written_with_exponents() -> None:
    assert parse_grid(["temperature=1e-1,1e0"]) == {"temperature": [0.1, 1.0]}


# ---- evaluation


def test_every_point_is_evaluated_and_written(tmp_path: Path, reference: str) -> None:
    painter, out = Painter(), tmp_path / "new" / "curve"
    evaluator = evaluator_of("frechet@pixels,mmd@pixels", reference)
    grid = {"strength": [0.25, 1], "mode": ["wet", "dry"]}
    settings = {"size": 3}
    found = []
    for point, report in run_grid(painter, ITEMS, settings, None, grid, evaluator, out):
        assert report is not None
        found.append((point, report))
        assert sorted(path.name for path in out.iterdir()) == FILES  # whole after every point
        assert len(rows_of(out)) == len(found) == len(json.loads((out / "curve.json").read_text()))
    points = [{"strength": strength, "mode": mode} for strength in (0.25, 1) for mode in ("wet", "dry")]
    assert [point for point, _ in found] == points
    assert [call["seeds"] for call in painter.calls] == [list(range(10, 18))] * 4
    assert [{key: call[key] for key in ("strength", "mode", "size")} for call in painter.calls] == [
        point | {"size": 3} for point in points
    ]
    costs = ["seconds_per_image", "evaluations_per_image"]
    names = ["frechet@pixels", "mmd@pixels", "mmd_std@pixels", "mmd_se@pixels", *costs]
    for row, (point, report) in zip(rows_of(out), found, strict=True):
        assert list(row) == ["strength", "mode", *names]
        assert {"strength": float(row.pop("strength")), "mode": row.pop("mode")} == point
        assert {name: float(value) for name, value in row.items()} == report.metrics  # all digits
        assert report.metrics["seconds_per_image"] == point["strength"] and report.metrics["evaluations_per_image"] == 9
    for entry, (point, report) in zip(json.loads((out / "curve.json").read_text()), found, strict=True):
        assert entry.pop("point") == point
        assert entry == json.loads(report.to_json())
        assert entry["images"]["sampling"]["mode"] == point["mode"] and entry["images"]["n"] == 8
        assert all("N=8 (4/class)" in line for line in entry["lines"].values())


def test_a_points_figures_are_those_of_its_settings_alone(tmp_path: Path, reference: str) -> None:
    evaluator = evaluator_of("frechet@pixels", reference)
    grid: dict[str, list[Any]] = {"strength": [1, 0.5]}
    found = [report for _, report in run_grid(Painter(), ITEMS, {}, None, grid, evaluator, tmp_path / "c")]
    for strength, report in zip((1, 0.5), found, strict=True):
        alone = judge(SampledImages(Painter(), ITEMS, {"strength": strength}), "frechet@pixels", reference)
        assert report is not None and report.metrics == alone.metrics
    assert found[0] and found[1] and found[0].metrics["frechet@pixels"] != found[1].metrics["frechet@pixels"]


@pytest.mark.parametrize(("settings", "sampler"), [({"strength": 1}, None), ({}, "roller")])
def test_what_is_given_twice_is_refused(
    tmp_path: Path, reference: str, settings: dict[str, Any], sampler: str | None
) -> None:
    grid, evaluator = {"sampler": ["roller"], "strength": [0.5]}, evaluator_of("mmd@pixels", reference)
    with pytest.raises(SettingError, match=r"(strength|sampler) is given both by itself and in --grid"):
        next(run_grid(Painter(), ITEMS, settings, sampler, grid, evaluator, tmp_path / "c"))


def test_the_sampler_is_an_axis_like_any_other(tmp_path: Path, reference: str) -> None:
    painter, evaluator = Painter(), evaluator_of("mmd@pixels", reference)
    grid = {"sampler": ["roller", "brush"], "strength": [0.5]}
    found = list(run_grid(painter, ITEMS, {}, None, grid, evaluator, tmp_path / "c"))
    assert [call["sampler"] for call in painter.calls] == ["roller", "brush"]
    assert all(list(call) == ["seeds", "sampler", "strength", "mode"] for call in painter.calls)  # it is no setting
    for (point, report), sampler, evaluations in zip(found, ("roller", "brush"), (5, 9), strict=True):
        assert report is not None and report.images["sampling"]["sampler"] == sampler == point["sampler"]
        assert report.metrics["evaluations_per_image"] == evaluations
    assert [row["sampler"] for row in rows_of(tmp_path / "c")] == ["roller", "brush"]


def test_a_sampler_chosen_beside_the_grid_serves_all_points(tmp_path: Path, reference: str) -> None:
    painter, evaluator = Painter(), evaluator_of("mmd@pixels", reference)
    list(run_grid(painter, ITEMS, {}, "roller", {"strength": [0.5, 1]}, evaluator, tmp_path / "c"))
    assert [call["sampler"] for call in painter.calls] == ["roller"] * 2
    painter.calls.clear()
    list(run_grid(painter, ITEMS, {}, None, {"strength": [0.75]}, evaluator, tmp_path / "c"))
    assert "sampler" not in painter.calls[0]  # the pipeline's own


def test_a_setting_out_of_bounds_is_refused_before_anything_is_sampled(tmp_path: Path, reference: str) -> None:
    painter, evaluator = Painter(), evaluator_of("mmd@pixels", reference)
    with pytest.raises(SettingError, match=r"strength is 2: it must lie in 0\.\.1"):
        next(run_grid(painter, ITEMS, {}, None, {"strength": [0.5, 1, 2]}, evaluator, tmp_path / "c"))
    assert painter.calls == [] and not (tmp_path / "c").exists()


def test_an_unknown_sampler_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    reference = write_npz(tmp_path / "grey.npz", pictures(9, channels=1))
    grid = {"sampler": ["next-scale", "halton"]}
    points = run_grid(
        tiny.tiny_pipeline(), ITEMS, {}, None, grid, evaluator_of("mmd@pixels", reference), tmp_path / "c"
    )
    with pytest.raises(SettingError, match="halton"):
        next(points)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_was_finished_outlives_an_interruption(
    tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    evaluator, out = evaluator_of("mmd@pixels", reference), tmp_path / "c"
    run, count = evaluator.run, []

    def interrupted(images: Any) -> Any:
        count.append(images)
        if len(count) == 2:
            raise error("stop")
        return run(images)

    monkeypatch.setattr(evaluator, "run", interrupted)
    points = run_grid(Painter(), ITEMS, {}, None, {"strength": [0.25, 0.5, 1]}, evaluator, out)
    assert next(points)[0] == {"strength": 0.25}
    with pytest.raises(error):
        next(points)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [row["strength"] for row in rows_of(out)] == ["0.25"]
    assert [entry["point"] for entry in json.loads((out / "curve.json").read_text())] == [{"strength": 0.25}]
    again = Painter()
    list(run_grid(again, ITEMS, {}, None, {"strength": [0.25, 0.5, 1]}, evaluator, out))
    assert [call["strength"] for call in again.calls] == [0.5, 1]  # the first point comes from the cache
    assert [row["strength"] for row in rows_of(out)] == ["0.25", "0.5", "1"]


def test_other_processes_write_nothing(tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of("mmd@pixels", reference)
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    points = list(run_grid(Painter(), ITEMS, {}, None, {"strength": [0.5, 1]}, evaluator, tmp_path / "c"))
    assert points == [({"strength": 0.5}, None), ({"strength": 1}, None)] and not (tmp_path / "c").exists()


# ---- the plot


class Seen:
    """What was drawn: panels by (figure, cost), each a list of labelled lines."""

    def __init__(self, figure: matplotlib.figure.Figure) -> None:
        self.title = figure.get_suptitle()
        self.panels = {(axes.get_ylabel(), axes.get_xlabel()): axes for axes in figure.axes}

    def lines(self, y: str, x: str) -> dict[str, list[tuple[float, float]]]:
        axes = self.panels[y, x]
        return {str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def draw(rows: list[dict[str, Any]], axes: list[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    figures = []
    savefig = matplotlib.figure.Figure.savefig

    def save(self: matplotlib.figure.Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        savefig(self, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    plot(rows, axes, {"name": "painter", "n": 8}, path)
    (figure,) = figures
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and np.array(image.convert("L")).std() > 1
        columns = len({x for _, x in Seen(figure).panels})
        assert 300 * columns < image.width < 600 * columns
        assert 200 < image.height < 600 * len(figure.axes) // columns
    return Seen(figure)


def point(fid: float, cost: float, **settings: Any) -> dict[str, Any]:
    figures = {"fid": fid, "kid": fid / 10, "kid_std": 0.1, "kid_se": 0.2}
    return settings | figures | {"seconds_per_image": cost, "evaluations_per_image": 10 * cost}


def test_each_figure_is_drawn_against_the_setting_and_the_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [point(fid, cost, scale=scale) for fid, cost, scale in ((9.0, 1.0, 1), (7.0, 2.0, 2), (8.0, 4.0, 4))]
    seen = draw(rows, ["scale"], tmp_path / "p.png", monkeypatch)
    costs = ["scale", "evaluations per image", "seconds per image"]
    assert list(seen.panels) == [(y, x) for y in ("fid", "kid") for x in costs]  # neither deviation nor error
    assert list(seen.lines("fid", "scale").values()) == [[(1, 9), (2, 7), (4, 8)]]
    assert list(seen.lines("kid", "seconds per image").values()) == [[(1, 0.9), (2, 0.7), (4, 0.8)]]
    assert list(seen.lines("fid", "evaluations per image").values()) == [[(10, 9), (20, 7), (40, 8)]]
    assert seen.panels["fid", "seconds per image"].get_xlim()[0] == 0
    assert seen.panels["fid", "scale"].get_legend() is None
    assert seen.title == "painter, 8 images a point"


def test_a_line_for_each_value_of_the_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        point(10 * k + scale, 1.0, top_k=k, mode=mode, scale=scale)
        for k, mode, scale in ((1, "a", 1), (1, "a", 2), (1, "b", 1), (1, "b", 2))
    ]
    seen = draw(rows, ["top_k", "mode", "scale"], tmp_path / "p.png", monkeypatch)
    assert seen.lines("fid", "scale") == {
        "top_k=1, mode=a": [(1, 11), (2, 12)],
        "top_k=1, mode=b": [(1, 11), (2, 12)],
    }
    legend = seen.panels["fid", "scale"].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == list(seen.lines("fid", "scale"))


def test_without_a_varied_number_costs_are_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [point(fid, cost, sampler=name) for fid, cost, name in ((3.0, 1.0, "a"), (2.0, 5.0, "b"))]
    seen = draw(rows, ["sampler"], tmp_path / "p.png", monkeypatch)
    assert {x for _, x in seen.panels} == {"evaluations per image", "seconds per image"}
    assert seen.lines("fid", "seconds per image") == {"sampler=a": [(1, 3)], "sampler=b": [(5, 2)]}


def test_one_point_and_missing_values_are_drawn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = draw([point(float("nan"), 1.0, scale=1)], ["scale"], tmp_path / "p.png", monkeypatch)
    assert {x for _, x in seen.panels} == {"evaluations per image", "seconds per image"}  # one value is no axis


def test_deviations_of_any_network_are_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"scale": 1, "mmd@pixels": 1.0, "mmd_std@pixels": 1.0, "mmd_se@pixels": 1.0, "seconds_per_image": 1.0}
    seen = draw([row], ["scale"], tmp_path / "p.png", monkeypatch)
    assert {y for y, _ in seen.panels} == {"mmd@pixels"}


def test_a_real_pipelines_curve(tmp_path: Path) -> None:
    """All parts together: the tiny model, its costs, its checkpoint in every protocol."""
    pipeline = tiny.tiny_pipeline()
    evaluator = evaluator_of("frechet@pixels", write_npz(tmp_path / "grey.npz", pictures(9, channels=1)))
    grid = parse_grid(["guidance-scale=1,3"])
    found = list(run_grid(pipeline, ITEMS, {"top_k": 4}, None, grid, evaluator, tmp_path / "c"))
    reports = [report for _, report in found if report]
    assert len({report.metrics["frechet@pixels"] for report in reports}) == 2
    for report, scale in zip(reports, (1, 3), strict=True):
        sampling = report.images["sampling"]
        assert (sampling["guidance_scale"], sampling["top_k"]) == (scale, 4)
        images = pipeline(
            class_labels=[0] * 4 + [1] * 4, seeds=range(10, 18), guidance_scale=scale, top_k=4, output_type="pt"
        ).images
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()[..., :1]
        alone = judge(write_npz(tmp_path / "x.npz", pixels), "frechet@pixels", str(tmp_path / "grey.npz"))
        assert report.metrics["frechet@pixels"] == pytest.approx(alone.metrics["frechet@pixels"], rel=1e-9)
    with Image.open(tmp_path / "c" / "curve.png") as image:
        assert image.format == "PNG" and image.width > 800
