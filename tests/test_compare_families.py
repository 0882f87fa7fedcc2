"""The comparison of all families: what is measured once, and what its table says."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from vgen.training.config import load_config


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("compare_families")


def metrics(fid: float) -> dict[str, float]:
    names = ("kid", "precision", "recall", "accuracy", "nearer_than_reference")
    return {"fid": fid, **dict.fromkeys(names, fid / 100)}


@pytest.fixture
def judged(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was judged, by a judge whose FID is 20 and the number of the set."""
    asked: list[tuple[str, int]] = []

    def judge(entry: Any, row: dict[str, Any], data_root: str | None) -> dict[str, Any]:
        asked.append((entry.name, row["seed"]))
        return {"metrics": metrics(20 + row["seed"] / 20), "protocol": "as ever"}

    monkeypatch.setattr(script, "_evaluate", judge)
    return asked


def test_nothing_is_judged_twice_but_for_other_weights(
    script: ModuleType, judged: list[tuple[str, int]], tmp_path: Path
) -> None:
    def measure(seeds: int) -> list[dict[str, Any]]:
        script.measure(only="fashion-var", per_class=2, seeds=seeds, data_root=None, results=tmp_path)
        return json.loads((tmp_path / "families.json").read_text())

    measure(1)
    rows = measure(3)
    assert judged == [("fashion-var next-scale", seed) for seed in (0, 20, 40)]
    assert [row["metrics"]["fid"] for row in rows] == [20, 21, 22] and {row["evaluations"] for row in rows} == {5}
    old = [row | {"checkpoint": "of an earlier training"} for row in rows]
    other = [rows[0] | {"model": "somebody-else"}]
    (tmp_path / "families.json").write_text(json.dumps(old + other))
    again = measure(1)
    assert len(judged) == 4
    assert [row["model"] for row in again] == ["somebody-else", "fashion-var"]  # the stale ones are gone
    assert again[1]["checkpoint"] == rows[0]["checkpoint"]


def test_the_table_gives_means_and_spreads_and_replaces_the_old_one(
    script: ModuleType, judged: list[tuple[str, int]], tmp_path: Path
) -> None:
    script.measure(only="fashion-var", per_class=2, seeds=3, data_root=None, results=tmp_path)
    seconds = {"fashion-var next-scale": {"1": 0.0321, "16": 0.0105}}
    training = {"fashion-vq": 0.03, "fashion-var": 0.6, "fashion-var-decoder": 0.6}  # seconds of a step
    (tmp_path / "families-times.json").write_text(json.dumps({"seconds": seconds, "training": training}))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{script.BEGIN}\nan old table\n{script.END}\nafter\n")
    rows = json.loads((tmp_path / "families.json").read_text())
    stale = [rows[0] | {"checkpoint": "another"}, rows[0] | {"own_settings": {"top_k": 7}}]  # of the model as it was
    (tmp_path / "families.json").write_text(json.dumps(rows + stale))
    for _ in range(2):
        script.table(results=tmp_path, readme=readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{script.BEGIN}\n|") and text.endswith(f"{script.END}\nafter\n")
    assert "an old table" not in text and text.count("class accuracy") == 1
    (row,) = [line for line in text.splitlines() if line.startswith("| `fashion-var`")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == "`fashion-var`, next-scale" and cells[2:4] == ["88", "5"]
    steps = {preset: load_config(preset).steps for preset in training}
    tokenizer = (0.03 * steps["fashion-vq"] + 0.6 * steps["fashion-var-decoder"]) / 60
    assert cells[4] == f"{steps['fashion-var'] / 100:.0f} + {tokenizer:.0f}" and cells[5:7] == ["32.1", "10.5"]
    assert cells[7] == "21.00 ± 1.00" and cells[8] == "210.0 ± 10.0" and cells[11] == "21.0% ± 1.0"
    assert "20 samples a set" in text and "differ by 2.83 at most" in text
    assert (tmp_path / "families.md").read_text() in text and (tmp_path / "families.png").stat().st_size > 1000
    readme.write_text("no marks")
    with pytest.raises(typer.BadParameter, match="lacks the lines"):
        script.table(results=tmp_path, readme=readme)
    assert readme.read_text() == "no marks"


def test_samples_that_two_samplers_share_are_judged_once(
    script: ModuleType, judged: list[tuple[str, int]], tmp_path: Path
) -> None:
    import vgen

    script.measure(only="fashion-recurrent", per_class=1, seeds=2, data_root=None, results=tmp_path)
    assert judged == [(f"fashion-recurrent {sampler}", seed) for sampler in ("raster", "wave-df") for seed in (0, 10)]
    rows = {(row["sampler"], row["seed"]): row for row in json.loads((tmp_path / "families.json").read_text())}
    raster, waves = rows["raster", 10], rows["wave-exact", 10]
    assert waves["metrics"] == raster["metrics"] and waves["evaluations"] != raster["evaluations"]
    pipeline = vgen.load("fashion-recurrent")
    found = [pipeline([4], seeds=[14], sampler=name).tokens for name in ("raster", "wave-exact")]
    assert (found[0] == found[1]).all()


def test_every_entry_is_a_model_and_a_sampler_of_it(script: ModuleType) -> None:
    import vgen

    for entry in script.chosen(""):
        pipeline = vgen.load(entry.model)
        assert entry.sampler in pipeline.samplers
        assert entry.settings.items() <= pipeline.resolve_settings(dict(entry.settings), entry.sampler).items()
