"""The Models tab: what models say of themselves, memory, and checkpoints that visitors bring."""

import errno
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import tiny
import torch
from safetensors.torch import save_file
from studio_helpers import OWNER, REQUEST, VISITOR, drain, finish, make_studio

import vgen
from vgen.app import models_tab as shown
from vgen.app import uploads
from vgen.app.core import Studio, explain
from vgen.app.models_tab import ModelsTab
from vgen.app.uploads import inspect_checkpoint, slug
from vgen.pipelines.base import Pipeline
from vgen.types import CheckpointError, SettingError

EVIL = "<img src=x onerror=alert(1)>"
STRANGER = "another browser's token"


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    found = make_studio(tmp_path, allow_upload=True)
    yield found
    found.close()


def make_tab(studio: Studio) -> ModelsTab:
    with gr.Blocks(analytics_enabled=False):
        return ModelsTab(studio, gr.BrowserState(None), gr.BrowserState(None))


def published_safetensors(folder: Path) -> tuple[Path, Path]:
    """Published checkpoints of VAR's names, as safetensors."""
    folder.mkdir()
    wide = {"base_channels": 32, "channel_multipliers": [1, 1], "norm_groups": 32, "image_channels": 3}
    paths = folder / "var_d16.safetensors", folder / "vae.safetensors"
    for path, state in zip(paths, tiny.published(tiny.tiny_pipeline(**wide)), strict=True):
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return paths


def row_of(html: str, name: str) -> str:
    return next(row for row in html.split("<tr>") if f'<th scope="row">{name}<' in row)


def message_of(call: Any, *arguments: Any) -> str:
    """The one line of a handler that refuses."""
    with pytest.raises(gr.Error) as caught:
        call(*arguments)
    text = str(caught.value.message)
    assert "\n" not in text and "inside vgen" not in text, text
    return text


# ---- what there is


def test_every_model_is_listed_with_what_it_is(studio: Studio) -> None:
    html, chosen = make_tab(studio).show_all()
    pipeline = studio.models.get("tiny")
    parts = (pipeline.tokenizer, pipeline.generator)
    number = sum(tensor.numel() for part in parts for tensor in part.state_dict().values())
    assert shown.number_words(number) in row_of(html, "tiny") and "local" in row_of(html, "tiny")
    assert pipeline.checkpoint()[:12] in row_of(html, "tiny")
    assert "bundled" in row_of(html, "fashion-var") and "apache-2.0" in row_of(html, "fashion-var")
    assert [name for name, _ in chosen.choices] == studio.models.names()


def test_looking_loads_nothing_and_tells_configuration_and_card(studio: Studio) -> None:
    facts, config, card = make_tab(studio).look("fashion-var")
    assert studio.models.loaded() == []
    assert json.loads(config) == studio.models.describe("fashion-var")["components"]
    assert studio.models.describe("fashion-var")["checkpoint"] in facts and "ankle boot" in facts
    assert "fashion-var" in card


def test_loading_and_unloading(studio: Studio) -> None:
    tab = make_tab(studio)
    html, status = tab.take_in("tiny")
    assert studio.models.loaded() == ["tiny"] and "in memory" in status
    assert "yes" in row_of(html, "tiny") and "yes" not in row_of(html, "fashion-var") and "1 of 3 places" in html
    html, status = tab.let_go("tiny")
    assert studio.models.loaded() == [] and "yes" not in row_of(html, "tiny") and "0 of 3 places" in html
    assert "was not loaded" in tab.let_go("tiny")[1]


def test_a_broken_model_has_a_line_and_the_others_stay(studio: Studio, tmp_path: Path) -> None:
    broken = {
        "no-json": "{",
        "a-list": "[]",
        "odd-names": json.dumps({"_class_name": "NextScalePipeline", "id2label": [1]}),
    }
    for name, text in broken.items():
        (tmp_path / "models" / name).mkdir()
        (tmp_path / "models" / name / "model_index.json").write_text(text)
    tab = make_tab(studio)
    html, _ = tab.show_all()
    for name in broken:
        assert "Cannot be read" in row_of(html, name)
        assert "failed" in tab.look(name)[0]
    assert "Cannot be read" not in row_of(html, "tiny") and str(tmp_path) not in html
    assert str(tmp_path) not in message_of(tab.take_in, "no-json")


def test_a_name_that_is_not_on_the_list_is_refused(studio: Studio) -> None:
    tab = make_tab(studio)
    for name in ("../../etc/passwd", "", None, ["tiny"], 7):
        for call in (tab.look, tab.take_in, tab.let_go):
            assert "there is no model" in message_of(call, name)


def test_html_in_a_model_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "evil"
    with monkeypatch.context() as patched:
        patched.setattr(tiny, "NAMES", {0: EVIL, 1: "b", 2: "c"})
        tiny.tiny_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlicense: {EVIL}\n---\n{EVIL} <script>alert(1)</script> ![x](http://x/y)")
    studio = make_studio(tmp_path)
    tab = make_tab(studio)
    facts, _, card = tab.look("evil")
    for html in (facts, card, tab.show_all()[0]):
        assert EVIL not in html and "<script" not in html
    assert "&lt;img src=x" in facts and "<img" not in card
    studio.close()


# ---- checkpoints that visitors bring


def test_a_checkpoint_is_looked_into_without_being_read(studio: Studio, tmp_path: Path) -> None:
    path = tmp_path / "any.name"  # the content decides
    save_file({"a.weight": torch.zeros(3, 4), EVIL: torch.zeros(5)}, path, metadata={"made": EVIL})
    html = make_tab(studio).look_inside(str(path))
    assert "17 in 2 tensors" in html and "3x4" in html and EVIL not in html
    assert inspect_checkpoint(path, "a")["sha256"] in html


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def strange_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that call themselves safetensors, and a word of what is said of each."""
    good = folder / "good.safetensors"
    save_file({"weight": torch.ones(64)}, good)
    content = good.read_bytes()
    header = b'{"weight":{"dtype":"F32","shape":[9223372036854775807,3],"data_offsets":[0,8]}}'
    made = {
        "pickle": (pickle.dumps(Bomb(folder / "ran")), "pickle"),
        "html": (b"<!DOCTYPE html><html><b>404</b></html>", "web page"),
        "cut-header": (content[:20], "cut short"),
        "cut-data": (content[:-8], "cut short"),
        "longer": (content + b"x" * 8, "cut short"),
        "huge-shape": (len(header).to_bytes(8, "little") + header + b"x" * 8, "cut short"),
        "random": (bytes(range(256)), "no safetensors"),
        "empty": (b"", "no safetensors"),
        "list": ((2).to_bytes(8, "little") + b"[]", "no safetensors"),
    }
    found = {}
    for name, (data, words) in made.items():
        (folder / f"{name}.safetensors").write_bytes(data)
        found[name] = (folder / f"{name}.safetensors", words)
    zipped = folder / "zip.safetensors"
    torch.save({"weight": Bomb(folder / "ran")}, zipped)
    return found | {"zip": (zipped, "pickle")}


def test_what_only_calls_itself_safetensors_gives_one_line_and_never_runs(studio: Studio, tmp_path: Path) -> None:
    tab = make_tab(studio)
    for name, (path, words) in strange_files(tmp_path).items():
        for call, arguments in (
            (tab.look_inside, (str(path),)),
            (tab.start, (VISITOR, REQUEST, "var", "mine", str(path), None, "")),
        ):
            text = message_of(call, *arguments)
            assert words in text and path.name in text and str(tmp_path) not in text, (name, text)
    assert not (tmp_path / "ran").exists() and studio.jobs.unfinished(OWNER) == []


def test_a_large_checkpoint_is_refused(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.safetensors"
    save_file({"weight": torch.zeros(100)}, path)
    monkeypatch.setattr(uploads, "MAX_BYTES", 100)
    assert "the limit is" in message_of(make_tab(studio).look_inside, str(path))


def test_uploads_are_off_unless_allowed(tmp_path: Path) -> None:
    studio = make_studio(tmp_path)
    tab, (path, _) = make_tab(studio), published_safetensors(tmp_path / "given")
    assert "--allow-upload" in message_of(tab.look_inside, str(path))
    assert "--allow-upload" in message_of(tab.start, VISITOR, REQUEST, "var", "mine", str(path), None, "")
    studio.close()


def convert(tab: ModelsTab, name: Any, transformer: Any, tokenizer: Any, family: Any = "var", text: str = "") -> str:
    """The last line that the page shows of a conversion."""
    job_id, _ = tab.start(VISITOR, REQUEST, family, name, str(transformer), str(tokenizer), text)
    return drain(tab.follow(VISITOR, job_id, REQUEST))[-1]


def test_a_converted_checkpoint_is_a_model_that_samples_the_same(studio: Studio, tmp_path: Path) -> None:
    transformer, tokenizer = published_safetensors(tmp_path / "given")
    tab = make_tab(studio)
    assert "is among the models now" in convert(tab, "My VAR!", transformer, tokenizer)
    (name,) = [name for name in studio.models.names() if name.startswith("my-var-")]
    theirs = vgen.convert("var", transformer=transformer, tokenizer=tokenizer)
    for ours, published in zip(
        studio.models.get(name)([0, 2], seeds=[4, 5]).tokens, theirs([0, 2], seeds=[4, 5]).tokens, strict=True
    ):
        assert torch.equal(ours, published)
    assert "there already" in convert(tab, "my var", transformer, tokenizer)
    assert (name, name) in tab.show_all()[1].choices


def test_a_name_is_never_a_path(studio: Studio, tmp_path: Path) -> None:
    transformer, tokenizer = published_safetensors(tmp_path / "given")
    before = {path for path in tmp_path.rglob("*") if "models" not in path.relative_to(tmp_path).parts}
    convert(make_tab(studio), "../../out/evil", transformer, tokenizer)
    assert {path for path in tmp_path.rglob("*") if "models" not in path.relative_to(tmp_path).parts} == before
    assert any(name.startswith("out-evil-") for name in studio.models.names())
    assert slug("..\\C:\\" + "x" * 99) == ("c-" + "x" * 99)[:40]
    for nothing in ("", "///", "..", None, "ÄÖ"):
        with pytest.raises(SettingError, match="no letters"):
            slug(nothing)


def test_conversions_that_cannot_be_say_why(studio: Studio, tmp_path: Path) -> None:
    transformer, tokenizer = published_safetensors(tmp_path / "given")
    tab = make_tab(studio)
    wrong = convert(tab, "swapped", tokenizer, tokenizer)
    assert "Not converted" in wrong and str(tmp_path) not in wrong
    start = (tab.start, VISITOR, REQUEST)
    assert "no family" in message_of(*start, "gan", "x", str(transformer), None, "")
    assert "depth is no number" in message_of(*start, "var", "x", str(transformer), None, "depth=3")
    assert "class_names is no number" in message_of(*start, "var", "x", str(transformer), None, "class_names=etc")
    assert "scales is no number" in message_of(*start, "var", "x", str(transformer), None, "scales=3")
    assert "heads is no number" in message_of(*start, "var", "x", str(transformer), None, "heads=eight")
    assert "hand one in" in message_of(*start, "var", "x", None, None, "")
    studio.models.folder = None
    assert "--models" in message_of(*start, "var", "x", str(transformer), None, "")


def test_a_full_disk_leaves_no_half_a_model(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, tokenizer = published_safetensors(tmp_path / "given")
    tab, names = make_tab(studio), sorted(path.name for path in (tmp_path / "models").iterdir())

    def full(self: Pipeline, folder: Path, *options: Any) -> None:
        (Path(folder) / "model_index.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "save_pretrained", full)
        assert "the disk is full" in convert(tab, "mine", transformer, tokenizer)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == names
    assert "among the models" in convert(tab, "mine", transformer, tokenizer)


def test_libraries_own_errors_of_a_full_disk_are_known(tmp_path: Path) -> None:
    import sqlite3

    from safetensors import SafetensorError

    full = "the disk is full"
    assert full in str(explain(sqlite3.OperationalError("database or disk is full")))
    text = f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})"
    assert full in str(explain(SafetensorError(text)))
    assert explain(sqlite3.OperationalError("no such table: items")) is None
    assert explain(SafetensorError("invalid header")) is None


def test_nobody_follows_anybody_elses_conversion(studio: Studio, tmp_path: Path) -> None:
    transformer, tokenizer = published_safetensors(tmp_path / "given")
    tab = make_tab(studio)
    job_id, _ = tab.start(VISITOR, REQUEST, "var", "mine", str(transformer), str(tokenizer), "")
    finish(studio.jobs.get(OWNER, job_id))  # type: ignore[arg-type]
    assert drain(tab.follow(STRANGER, job_id, REQUEST)) == [gr.skip()]


def test_errors_of_checkpoints_name_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(path, path.name)
    assert str(tmp_path) not in str(caught.value)
