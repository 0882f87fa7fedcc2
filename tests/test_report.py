"""Reports: every figure with all that decides it, for people, for programs and as JSON."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import vgen
from vgen.evaluation.report import Report
from vgen.evaluation.run import _show

HASHES = {role: f"{i:x}" * 64 for i, role in enumerate(("images", "reference", "train", "extractor"), start=10)}
IMAGES: dict[str, Any] = {
    "name": "samples",
    "n": 500,
    "sha256": HASHES["images"],
    "files": "png",
    "size": "28x28",
    "grey": "as RGB",
    "per_class": {"0": 50, "1": 50},
    "sampling": {"model": "fashion-var", "sampler": "next-scale", "guidance_scale": 1.5},
    "vgen": vgen.__version__,
}
BY_INCEPTION = {
    "extractor": "inception-2015-12-05",
    "extractor_sha256": HASHES["extractor"],
    "resize": "legacy",
    "dtype": "float32",
    "reference": {"name": "fashion-mnist:test", "n": 10000, "sha256": HASHES["reference"]},
}


def full_report() -> Report:
    """Two figures of one protocol, one of another, one of none."""
    report = Report(images=dict(IMAGES), warnings=["few images"])
    report.add("fid", 3.25, dict(BY_INCEPTION))
    report.add("kid", 1 / 3, BY_INCEPTION | {"subsets": "100x1000"})
    report.add("kid_se", 0.25, BY_INCEPTION | {"subsets": "100x1000"})
    report.add("seconds_per_image", 0.5, {})
    report.details["nearest"] = [{"image": 0, "train": 4, "distance": 0.0}]
    return report


# ---- the protocol


def test_the_protocol_line_holds_all_that_decides_a_figure() -> None:
    assert full_report().protocol_line("kid").split("  ") == [
        "N=500 (50/class)",
        "images=samples sha256:aaaaaaaaaaaa",
        "reference=fashion-mnist:test N=10000 sha256:bbbbbbbbbbbb",
        "extractor=inception-2015-12-05 sha256:dddddddddddd",
        "resize=legacy",
        "dtype=float32",
        "subsets=100x1000",
        "files=png",
        "size=28x28",
        "grey=as RGB",
        "sampled with model=fashion-var sampler=next-scale guidance_scale=1.5",
        f"vgen={vgen.__version__}",
    ]


def test_the_training_images_and_the_seeds_are_part_of_it() -> None:
    report = Report(images=IMAGES | {"seeds": "0..499"})
    report.add("nearest_train", 1.0, {"train": {"name": "mine", "n": 7, "sha256": HASHES["train"]}})
    parts = report.protocol_line("nearest_train").split("  ")
    assert "train=mine N=7 sha256:cccccccccccc" in parts and "seeds=0..499" in parts


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        (None, "N=500"),
        ({}, "N=500"),
        ({"3": 500}, "N=500 (500/class)"),
        ({"0": 3, "7": 9, "8": 5}, "N=500 (3-9/class)"),
    ],
)
def test_the_number_of_a_class_is_said_where_classes_are_known(counts: dict | None, shown: str) -> None:
    report = Report(images=IMAGES | {"per_class": counts})
    report.add("is", 1.0, {})
    assert report.protocol_line("is").split("  ")[0] == shown


def test_a_reference_of_unknown_size_says_so() -> None:
    """pytorch-fid's files do not tell how many images they are of."""
    report = Report(images=IMAGES)
    report.add("fid", 1.0, BY_INCEPTION | {"reference": {"name": "s.npz", "n": None, "sha256": HASHES["reference"]}})
    assert "reference=s.npz N=unknown sha256:bbbbbbbbbbbb" in report.protocol_line("fid").split("  ")


def test_a_line_takes_nothing_from_the_protocol() -> None:
    """It is written more than once: on the terminal, then to the file."""
    report = full_report()
    before = json.dumps(report.protocols)
    first = [report.protocol_line(name) for name in report.metrics]
    assert [report.protocol_line(name) for name in report.metrics] == first and json.dumps(report.protocols) == before


# ---- for people and programs


def test_a_line_for_programs_is_name_value_protocol() -> None:
    report = full_report()
    lines = [line.split("\t") for line in report.lines()]
    assert [line[:2] for line in lines] == [
        ["fid", "3.25"],
        ["kid", "0.333333"],
        ["kid_se", "0.25"],
        ["seconds_per_image", "0.5"],
    ]
    assert [line[2] for line in lines] == [report.protocol_line(name) for name in report.metrics]
    assert {len(line) for line in lines} == {3}


def test_the_table_shows_each_protocol_once_with_its_figures() -> None:
    report = full_report()
    lines = "\n".join(report.table()).splitlines()
    assert lines[:4] == [
        "fid                3.25",
        "kid                0.333333",
        "kid_se             0.25",
        "seconds_per_image  0.5",
    ]
    heads = [i for i, line in enumerate(lines) if line.endswith(":")]
    assert [lines[i] for i in heads] == ["fid:", "kid, kid_se:", "seconds_per_image:"]
    for start, stop, name in zip(heads, [*heads[1:], None], ("fid", "kid", "seconds_per_image"), strict=True):
        shown = [line.strip() for line in lines[start + 1 : stop] if line]
        assert shown == report.protocol_line(name).split("  ")
    assert all(line.startswith("  ") for i, line in enumerate(lines[4:], 4) if line and i not in heads)


def test_an_empty_report_has_no_lines() -> None:
    report = Report(images=IMAGES)
    assert list(report.lines()) == list(report.table()) == []


class Terminal:
    """A stdout that says whether it is a terminal."""

    def __init__(self, answer: bool) -> None:
        self.answer, self.text = answer, ""

    def isatty(self) -> bool:
        return self.answer

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("point", ["", "guidance_scale=2"])
def test_a_terminal_gets_the_table_and_a_pipe_the_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], point: str
) -> None:
    report = full_report()
    for answer in (True, False):
        screen = Terminal(answer)
        monkeypatch.setattr(sys, "stdout", screen)
        _show(report, point)
        start = f"{point}\t" if point else ""
        table, lines = "\n".join(report.table()) + "\n", "".join(f"{start}{line}\n" for line in report.lines())
        assert screen.text == ((f"\n{point}\n" if point else "") + table if answer else lines)
        assert capsys.readouterr().err == "vgen: few images\n"  # never among the figures


def test_another_process_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _show(None, "guidance_scale=2")
    assert capsys.readouterr() == ("", "")


# ---- JSON


def test_json_holds_everything() -> None:
    report = full_report()
    found = json.loads(report.to_json())
    assert found == {
        "metrics": {"fid": 3.25, "kid": 1 / 3, "kid_se": 0.25, "seconds_per_image": 0.5},
        "images": IMAGES,
        "protocol": report.protocols,
        "lines": {name: report.protocol_line(name) for name in report.metrics},
        "details": {"nearest": [{"image": 0, "train": 4, "distance": 0.0}]},
        "warnings": ["few images"],
        "vgen": vgen.__version__,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_without_a_value_are_null(value: float) -> None:
    """Strict readers refuse NaN and Infinity, which JSON does not have."""
    report = Report(images=IMAGES)
    report.add("fid", value, {})
    text = report.to_json()
    assert json.loads(text)["metrics"] == {"fid": None} and not re.search("NaN|Infinity", text)
    assert [line.split("\t")[1] for line in report.lines()] == [f"{value:.6g}"]


def test_figures_keep_all_their_digits() -> None:
    report = Report(images=IMAGES)
    report.add("fid", 0.1 + 0.2, {})
    assert json.loads(report.to_json())["metrics"]["fid"] == 0.1 + 0.2


def test_the_file_is_whole_or_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.json"
    full_report().save(path)
    before = path.read_text()
    assert before == full_report().to_json() and before.endswith("}\n")
    write_text = Path.write_text

    def full_disk(self: Path, text: str) -> int:
        write_text(self, text[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        full_report().save(path)
    assert [file.name for file in path.parent.iterdir()] == ["report.json"] and path.read_text() == before


def test_names_of_any_script_are_written(tmp_path: Path) -> None:
    report = Report(images=IMAGES | {"name": "本/é 🐙"})
    report.add("fid", 1.0, {})
    report.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_bytes())["images"]["name"] == "本/é 🐙"
    assert "images=本/é 🐙 sha256" in report.protocol_line("fid")
