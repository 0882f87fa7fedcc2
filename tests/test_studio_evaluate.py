"""The Evaluate tab: its figures are the evaluator's, each point is kept, and nothing is fetched or believed unasked."""

import csv
import errno
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import tiny
import torch
from studio_helpers import OWNER, REQUEST, VISITOR, drain, finish, make_studio
from tiny_evaluation import isolate, judge

from vgen import batch
from vgen.app import evaluate_tab as shown
from vgen.app.charts import ticks
from vgen.app.core import Studio
from vgen.app.evaluate_tab import EvaluateTab
from vgen.app.evaluating import Curve, Evaluations, Point, Sweep, best, cheapest, plan
from vgen.app.jobs import Job
from vgen.app.judging import Judge
from vgen.data import FASHION, open_source
from vgen.evaluation.sampled import SampledImages
from vgen.types import SettingError

STRANGER = "another browser's token"


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    """Two models: "tiny", whose classes nobody knows, and "clothes", random pictures of Fashion-MNIST's classes."""
    isolate(tmp_path, monkeypatch)
    monkeypatch.setenv("VGEN_DATA", str(tmp_path / "data"))
    with monkeypatch.context() as patched:
        patched.setattr(tiny, "NAMES", dict(enumerate(FASHION)))
        clothes = tiny.tiny_pipeline(scales=[1, 2, 7], channel_multipliers=[1, 2, 2])
    clothes.save_pretrained(tmp_path / "models" / "clothes")
    found = make_studio(tmp_path)
    yield found
    found.close()


def make_tab(studio: Studio) -> EvaluateTab:
    with gr.Blocks(analytics_enabled=False):
        return EvaluateTab(studio, gr.BrowserState(None), gr.BrowserState(None))


def evaluate(studio: Studio, model: str = "tiny", **changes: Any) -> Curve:
    """A finished curve of two values of guidance, ten images each."""
    asked: dict[str, Any] = {"setting": "guidance_scale", "values": [1.0, 2.0], "number": 10}
    job = finish(Evaluations(studio).submit(OWNER, Sweep(model=model, **asked | changes)))
    assert job.state == "done", job.error
    return job.view


def test_figures_are_those_of_the_evaluator(studio: Studio, tmp_path: Path) -> None:
    tiny.write_mnist(tmp_path / "data", test=40)
    curve = evaluate(studio, "clothes", number=20, seed=3)
    pipeline = studio.models.get("clothes")
    items = [batch.Item(i, i % 10, 3 + i) for i in range(20)]
    metrics = "accuracy,frechet,spectrum,prc@fashion-classifier"
    names = {
        "class_accuracy": "accuracy",
        "classifier_frechet": "frechet",
        "spectrum_error": "spectrum_psd_error",
        "precision": "precision@fashion-classifier",
        "recall": "recall@fashion-classifier",
    }
    for point in curve.points:
        images = SampledImages(pipeline, items, {"guidance_scale": point.value})
        report = judge(images, metrics, "fashion-mnist:test").metrics
        for ours, theirs in names.items():
            assert point.figures[ours] == pytest.approx(report[theirs], rel=1e-4, abs=1e-6), ours
        assert point.evaluations == report["evaluations_per_image"]
    assert curve.points[0].figures != curve.points[1].figures
    assert curve.protocol["reference"]["n"] == 40


def test_precision_and_recall_tell_samples_from_real_images(studio: Studio, tmp_path: Path) -> None:
    tiny.write_mnist(tmp_path / "data", test=40)
    judge_of = Judge(FASHION, 28)
    list(judge_of.prepare())
    source = open_source("fashion-mnist", "test", 28, 1, download=False)
    noise = torch.randint(256, (30, 3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = judge_of.gather()
    found.add(torch.cat([source.images(range(10)).expand(-1, 3, -1, -1), noise]), [i % 10 for i in range(40)])
    figures = judge_of.figures(found)
    assert figures["precision"] == 0.25  # ten of forty are real images
    real = judge_of.gather()
    real.add(source.images(range(40)).expand(-1, 3, -1, -1), source.labels.tolist())
    same = judge_of.figures(real)
    assert same["precision"] == same["recall"] == 1 and same["classifier_frechet"] == same["spectrum_error"] == 0
    for name, value in judge_of.of_reference().items():
        assert same[name] == pytest.approx(value)


def test_n_and_reference_are_always_shown(studio: Studio, tmp_path: Path) -> None:
    without = shown.protocol_html(evaluate(studio, "clothes"))
    assert "N = 10 a point" in without and "<dt>Reference</dt><dd>none</dd>" in without
    tiny.write_mnist(tmp_path / "data", test=16)
    assert "fashion-mnist:test, N = 16" in shown.protocol_html(evaluate(studio, "clothes"))


def test_without_data_what_needs_none_is_measured_and_a_line_says_where_it_was_looked_for(
    studio: Studio, tmp_path: Path
) -> None:
    curve = evaluate(studio, "clothes")
    assert curve.figures == ["class_accuracy", "classifier_score", "diversity"]
    assert str(tmp_path / "data") in curve.missing and "vgen evaluate" in curve.missing and "\n" not in curve.missing
    assert not (tmp_path / "data").exists()


def test_diversity_of_unknown_classes_is_the_distance_of_pixels_within_a_class(studio: Studio) -> None:
    curve = evaluate(studio, "tiny", number=12)
    assert curve.figures == ["diversity"] and "fashion" not in json.dumps(curve.protocol["judge"])
    pipeline = studio.models.get("tiny")
    *_, last = pipeline.stream([i % 3 for i in range(12)], seeds=list(range(12)), guidance_scale=2.0)
    rows = pipeline.decode(last).flatten(1).double() / 255
    pairs = [(a, b) for a, b in itertools.combinations(range(12), 2) if a % 3 == b % 3]
    squares = torch.stack([(rows[a] - rows[b]).square().sum() for a, b in pairs])
    assert curve.points[1].figures["diversity"] == pytest.approx(float(squares.mean().sqrt()), rel=1e-6)


def test_stop_ends_within_one_evaluation_and_keeps_the_points(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = Evaluations(studio)
    pipeline, closed, made = studio.models.get("tiny"), [], []
    whole = pipeline.stream

    def watched(*arguments: Any, **settings: Any) -> Iterator[Any]:
        try:
            for step in whole(*arguments, **settings):
                made.append(step)
                yield step
        finally:
            closed.append(len(made))

    monkeypatch.setattr(pipeline, "stream", watched)
    sweep = Sweep(model="tiny", setting="guidance_scale", values=[1.0, 2.0, 3.0], number=10)
    job = finish(studio.jobs.submit(OWNER, "nothing", "", lambda job: iter(())))
    curve = Curve(sweep, plan(pipeline, sweep))
    steps = evaluations._carry_out(job, curve)
    while len(curve.points) < 1 or not made or made[-1].index:
        before = len(made)
        next(steps)
        assert len(made) - before <= 1  # Stop is looked at after every evaluation
    before = len(made)
    steps.close()
    assert len(made) == before == closed[-1]
    assert [point.value for point in curve.points] == [1.0]
    assert [row["guidance_scale"] for row in csv.DictReader(curve.files[0].open())] == ["1.0"]


def test_files_hold_the_points_and_their_protocol(studio: Studio) -> None:
    curve = evaluate(studio, values=[1, 2.5, 4])
    table, whole = curve.files
    rows = list(csv.DictReader(table.open()))
    assert [float(row["guidance_scale"]) for row in rows] == [1, 2.5, 4]
    assert [float(row["diversity"]) for row in rows] == [point.figures["diversity"] for point in curve.points]
    told = json.loads(whole.read_text())
    assert told["protocol"]["n"] == 10 and told["protocol"]["seeds"] == [0, 9]
    assert told["protocol"]["checkpoint"] == studio.models.get("tiny").checkpoint()
    assert all(path.is_relative_to(studio.owner_folder(OWNER)) for path in curve.files)


def test_samplers_can_be_compared_too(studio: Studio, tmp_path: Path) -> None:
    make_studio(tmp_path, "masked").close()
    samplers = list(studio.models.get("masked").samplers[:2])
    curve = evaluate(studio, "masked", setting="sampler", values=samplers)
    assert [request.sampler for request in curve.requests] == samplers
    html = shown.plots_html(curve, "diversity")
    assert all(name[:16] in html for name in samplers)


# ---- choosing


def point(value: Any, accuracy: float, seconds: float, distance: float = 1.0) -> Point:
    figures = {"class_accuracy": accuracy, "classifier_frechet": distance, "diversity": accuracy}
    return Point(value=value, figures=figures, seconds=seconds, evaluations=1)


def test_the_cheapest_within_five_per_cent_of_the_best() -> None:
    points = [point(1, 0.94, 0.1), point(2, 0.96, 0.2), point(3, 1.0, 0.9), point(4, 0.99, 0.8)]
    assert best(points, "class_accuracy") is points[2]
    assert cheapest(points, "class_accuracy") is points[1]  # 0.94 is 6% below the best
    near = [point(1, 0, 0.1, 10.6), point(2, 0, 0.3, 10.0), point(3, 0, 0.2, 10.4)]
    assert best(near, "classifier_frechet") is near[1] and cheapest(near, "classifier_frechet") is near[2]
    assert best(points, "diversity") is None and cheapest(points, "diversity") is None
    assert best([], "class_accuracy") is None


def test_marks_are_words_and_shapes_not_colours() -> None:
    points = [point(1, 0.98, 0.1), point(2, 1.0, 0.2)]
    curve = Curve(Sweep(model="m", setting="steps", values=[1, 2]), points=points)
    table, plots = shown.table_html(curve, "class_accuracy"), shown.plots_html(curve, "class_accuracy")
    rows = re.findall(r"<th scope=\"row\">(.*?)</th>", table)
    assert ["cheapest within 5%" in row for row in rows] == [True, False]
    assert [">best<" in row for row in rows] == [False, True]
    assert plots.count("<polygon") == 3 and plots.count("<rect") == 3  # one in each chart, and in the legend


def test_ticks_are_round_and_span_the_values() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in ((0.913, 0.921), (-3, 1200), (5, 5), (0, 0), (1e-7, 2e-7)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9


# ---- the tab


def test_the_page_shows_points_as_they_come_and_another_figure_without_a_new_run(studio: Studio) -> None:
    tab = make_tab(studio)
    job_id, *_ = tab.start(VISITOR, REQUEST, "clothes", "guidance_scale", "1, 2", 10, 0, None, "top_k=3")
    views = drain(tab.follow(VISITOR, job_id, "class_accuracy", REQUEST))
    curve = studio.jobs.get(OWNER, job_id).view  # type: ignore[union-attr]
    status, plots, table, *_ = views[-1]
    assert "Done: 2 points of 10 images" in status and "Class accuracy against guidance scale" in plots
    for found in curve.points:
        assert f"{100 * found.figures['class_accuracy']:.1f}%" in table
    assert all(request.settings["top_k"] == 3 for request in curve.requests)
    assert [len(view) for view in views] == [len(tab.shown)] * len(views)
    other, _ = tab.draw(VISITOR, job_id, "classifier_score", REQUEST)
    assert "Classifier score against" in other
    assert tab.attach(VISITOR, REQUEST) == job_id  # a page that was loaded anew


def test_nobody_sees_or_stops_anybody_elses_evaluation(studio: Studio) -> None:
    tab = make_tab(studio)
    job_id, *_ = tab.start(VISITOR, REQUEST, "tiny", "guidance_scale", "1", 10, 0, None, "")
    assert drain(tab.follow(STRANGER, job_id, "diversity", REQUEST)) == [[gr.skip()] * len(tab.shown)]
    assert tab.draw(STRANGER, job_id, "diversity", REQUEST) == [gr.skip()] * 2
    assert tab.end(STRANGER, job_id, REQUEST) == gr.skip()
    assert tab.attach(STRANGER, REQUEST) == gr.skip()
    assert finish(studio.jobs.get(OWNER, job_id)).state == "done"  # type: ignore[arg-type]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"number": 9}, "10..2000"),
    ({"number": 10**9}, "10..2000"),
    ({"number": float("nan")}, "10..2000"),
    ({"number": "many"}, "10..2000"),
    ({"number": 2000, "values": "1,2,3,4,5,6"}, "12000 images"),
    ({"values": ",".join(map(str, range(13)))}, "limit is 12"),
    ({"values": "1," * 2000}, "limit is"),
    ({"values": ""}, "no values"),
    ({"values": "<b>"}, "neither a number nor a name"),
    ({"values": "-5"}, "guidance_scale is -5"),
    ({"values": "1e400"}, "guidance_scale is inf"),
    ({"setting": "colour"}, "no setting"),
    ({"setting": None}, "no setting"),
    ({"setting": ["top_k"]}, "no setting"),
    ({"others": "guidance_scale=2"}, "take it out"),
    ({"others": "speed=2"}, "unknown setting"),
    ({"seed": -1}, "seed is"),
    ({"seed": 1 << 64}, "seed is"),
    ({"sampler": "euler"}, "unknown sampler"),
    ({"model": "../../etc"}, "no model"),
    ({"model": None}, "no model"),
    ({"model": "video", "setting": "temperature"}, ""),
]


def test_bad_input_gives_one_line_and_no_job(studio: Studio, tmp_path: Path) -> None:
    make_studio(tmp_path, "video").close()
    tab = make_tab(studio)
    form = {"model": "tiny", "setting": "guidance_scale", "values": "1, 2", "number": 10, "seed": 0}
    for change, words in BAD:
        with pytest.raises(gr.Error) as caught:
            tab.start(VISITOR, REQUEST, *(form | {"sampler": None, "others": ""} | change).values())
        message = str(caught.value.message)
        assert words in message and "\n" not in message and "inside vgen" not in message, (change, message)
    assert studio.jobs.unfinished(OWNER) == []


def test_videos_are_not_judged_here(studio: Studio, tmp_path: Path) -> None:
    make_studio(tmp_path, "video").close()
    with pytest.raises(SettingError, match="makes videos"):
        Evaluations(studio).submit(OWNER, Sweep(model="video", setting="steps", values=[1]))


def test_html_in_names_is_text(studio: Studio) -> None:
    evil = "<img src=x onerror=alert(1)>"
    curve = evaluate(studio)
    curve.sweep = Sweep(model=evil, setting=evil, values=[evil])
    curve.protocol |= {"model": evil, "settings": {evil: evil}, "sampler": evil}
    curve.missing = evil
    curve.points = [Point(value=evil, figures={"diversity": 1.0}, seconds=1, evaluations=1)]
    for html in (*shown.results_html(curve, evil), shown.protocol_html(curve)):
        assert "<img src=x" not in html


def test_a_full_disk_ends_this_evaluation_alone(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sweep = Sweep(model="tiny", setting="guidance_scale", values=[1.0], number=10)
    with monkeypatch.context() as patched:
        patched.setattr("vgen.app.evaluating.write_table", full)
        job: Job = finish(Evaluations(studio).submit(OWNER, sweep))
    assert job.state == "failed" and "disk is full" in str(job.error)
    text, kind = shown.describe(studio, job, job.view)
    assert kind == "failed" and "1 of 1 points stay" in text
    assert evaluate(studio).files
