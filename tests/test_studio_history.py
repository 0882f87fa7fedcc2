"""The History tab: everything made is found again, by its maker alone; and what files say is never believed."""

import dataclasses
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import tiny
from PIL import Image, PngImagePlugin
from studio_helpers import OWNER, REQUEST, VISITOR, finish, make_studio, sample

from vgen import media
from vgen.app import history_tab as shown
from vgen.app.core import Studio, owner_name
from vgen.app.forms import copy_as, to_request
from vgen.app.generate import GenerateTab
from vgen.app.history_tab import HistoryTab
from vgen.types import Request

STRANGER = "another browser's token"
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    found = make_studio(tmp_path, "tiny", "masked")
    yield found
    found.close()


@pytest.fixture
def tab(studio: Studio) -> HistoryTab:
    with gr.Blocks(analytics_enabled=False):
        return HistoryTab(studio, gr.BrowserState(None), gr.BrowserState(None))


def click(tab: HistoryTab, action: Any, items: Any, opened: int = 0, visitor: str = VISITOR) -> list[Any]:
    event: Any = SimpleNamespace(action=action, items=items)
    return tab.act(visitor, REQUEST, "", False, shown.PAGE, opened, event)


def tiles(
    tab: HistoryTab, text: str = "", starred: bool = False, limit: Any = shown.PAGE, visitor: str = VISITOR
) -> str:
    return tab.search(visitor, text, starred, limit, REQUEST)[0]


def count(html: str) -> int:
    return html.count('<figure class="vgen-tile">')


def ids(studio: Studio, owner: str = OWNER) -> list[int]:
    """The newest first."""
    return [entry.id for entry in studio.library.search(owner)]


def test_search_finds_by_class_model_seed_and_sampler(studio: Studio, tab: HistoryTab) -> None:
    sample(studio, classes=["bee"], seed=50, per_class=2)
    sample(studio, classes=["cat"], seed=70, per_class=1)
    sample(studio, "masked", classes=[0], seed=90, per_class=1, sampler="halton")
    assert count(tiles(tab)) == 4
    assert count(tiles(tab, "bee")) == 2 and count(tiles(tab, "tiny")) == 3
    assert count(tiles(tab, "51")) == 1 and count(tiles(tab, "HALTON masked")) == 1
    assert count(tiles(tab, "bee cat")) == 0 and "has all of these words" in tiles(tab, "bee cat")
    assert count(tiles(tab, "%")) == 0
    assert "bee, seed 51" in tiles(tab, "51")


def test_stars_are_kept_and_filtered_by(studio: Studio, tab: HistoryTab) -> None:
    sample(studio)
    first, other = ids(studio)
    html, *_ = click(tab, "star", [first])
    assert html.count('aria-pressed="true"') == 1
    assert f'data-do="open" data-id="{first}"' in tiles(tab, starred=True) and count(tiles(tab, starred=True)) == 1
    click(tab, "star", [first])
    assert count(tiles(tab, starred=True)) == 0 and count(tiles(tab)) == 2
    assert other in ids(studio)


def test_an_opened_file_tells_its_request_and_how_to_repeat_it(studio: Studio, tab: HistoryTab) -> None:
    job = sample(studio, classes=["bee"], seed=5, per_class=1, settings={"top_k": 7})
    found = dict(zip(map(id, tab.detail), click(tab, "open", ids(studio))[len(tab.listed) :], strict=True))
    asked = job.view.request
    assert json.loads(found[id(tab.request)]) == json.loads(asked.to_json())
    copies = [found[id(box)] for box in tab.copies]
    assert copies == list(copy_as(studio.models.get("tiny"), asked).values()) and "--top-k 7" in copies[0]
    assert "bee, seed 5" in found[id(tab.facts)] and 'alt="tiny: bee, seed 5"' in found[id(tab.picture)]
    assert Path(found[id(tab.download)].value["path"]).read_bytes() == job.view.files[0].read_bytes()


def test_commands_of_a_model_that_is_not_in_memory_wait_to_be_asked_for(studio: Studio, tab: HistoryTab) -> None:
    sample(studio)
    studio.models.unload("tiny")
    (item, *_) = ids(studio)
    assert click(tab, "open", [item])[-3:] == ["", "", ""] and studio.models.loaded() == []
    assert "vgen sample tiny" in tab.commands(VISITOR, item, REQUEST)[0]


def test_a_restored_form_asks_for_the_same_again(studio: Studio, tab: HistoryTab) -> None:
    job = sample(studio, classes=["cat"], seed=11, per_class=1, settings={"guidance_scale": 2.5, "top_k": 3})
    with gr.Blocks(analytics_enabled=False):
        generate = GenerateTab(studio, gr.BrowserState(None), gr.BrowserState(None))
    selected, part, *filled = tab._fill(generate, OWNER, ids(studio)[0])
    assert selected.selected == "generate" and part.open and len(filled) == len(generate.filling)
    values = {id(part): getattr(new, "value", new) for part, new in zip(generate.filling, filled, strict=True)}
    form = [values.get(id(part)) for part in generate.form]
    ask, _ = generate.ask(*form)
    assert to_request(studio.models.get("tiny"), ask) == job.view.request


def test_no_update_of_the_curve_leaves_out_what_is_around_it(studio: Studio) -> None:
    """Gradio forgets the properties of an HTML component that an update does not have."""
    link = SimpleNamespace(query_params={"run": "broken"})
    with gr.Blocks(analytics_enabled=False):
        generate = GenerateTab(studio, gr.BrowserState(None), gr.BrowserState(None))
    curve = generate.guidance_schedule
    updates = [
        generate.restore_link("tiny", SimpleNamespace(query_params={}))[generate.filling.index(curve)],
        generate.restore_link("tiny", link)[generate.filling.index(curve)],
        generate._around_curve("tiny", 3.5),
        generate.choose_sampler("tiny", "next-scale")[generate.settings.index(curve)],
    ]
    found = [update._constructor_args[0] for update in updates]
    scales = len(studio.models.get("tiny").tokenizer.scales)
    assert [(made["points"], made["what"]) for made in found] == [(scales, "scale")] * 4
    assert [made["guidance"] for made in found] == [2.0, 2.0, 3.5, 2.0]
    assert ["value" in made for made in found] == [False, False, False, True]


def test_deleted_files_vanish_at_once_and_come_back(studio: Studio, tab: HistoryTab) -> None:
    sample(studio, per_class=3)
    first, second, third = ids(studio)
    html, _, status, *detail = click(tab, "delete", [first, second], opened=second)
    assert count(html) == 1 and "Deleted 2 files" in status
    assert detail[0] == 0 and "Choose a picture" in detail[1]  # what was open is closed
    for action in ("open", "star"):
        with pytest.raises(gr.Error, match="not there any more"):
            shown.friendly(click)(tab, action, [first])
    html, _, status = tab.bring_back(VISITOR, "", False, shown.PAGE, REQUEST)
    assert count(html) == 3 and "Brought back 2 files" in status
    assert sorted(ids(studio)) == sorted([first, second, third])
    assert "Nothing to undo" in tab.bring_back(VISITOR, "", False, shown.PAGE, REQUEST)[2]


def test_a_file_that_is_not_deleted_stays_open(studio: Studio, tab: HistoryTab) -> None:
    sample(studio)
    first, second = ids(studio)
    assert click(tab, "delete", [first], opened=second)[len(tab.listed) :] == [gr.skip()] * len(tab.detail)


def test_nothing_of_anybody_else_is_reachable(studio: Studio, tab: HistoryTab) -> None:
    sample(studio)
    everything = ids(studio)
    assert count(tiles(tab, visitor=STRANGER)) == 0
    for action in ("open", "star"):
        with pytest.raises(gr.Error, match="somebody else"):
            shown.friendly(click)(tab, action, everything, visitor=STRANGER)
    assert "Nothing is ticked" in click(tab, "delete", everything, visitor=STRANGER)[2]
    with pytest.raises(gr.Error, match="somebody else"):
        tab.commands(STRANGER, everything[0], REQUEST)
    click(tab, "delete", everything)
    assert "Nothing to undo" in tab.bring_back(STRANGER, "", False, shown.PAGE, REQUEST)[2]
    assert ids(studio) == [] and ids(studio, owner_name(None, STRANGER)) == []


BAD: list[tuple[Any, Any]] = [
    ("open", "all"),
    ("open", None),
    ("open", [1e99]),
    ("open", [True]),
    ("open", [-1]),
    ("open", [1 << 70]),
    ("open", ["1; DROP TABLE items"]),
    ("delete", list(range(1, 300))),
    ("open", []),
    ("drop", [1]),
    (None, [1]),
    (["open"], [1]),
]


def test_what_the_browser_says_may_be_anything(studio: Studio, tab: HistoryTab) -> None:
    sample(studio, per_class=1)
    for action, items in BAD:
        with pytest.raises(gr.Error) as caught:
            shown.friendly(click)(tab, action, items)
        assert "\n" not in caught.value.message and "inside vgen" not in caught.value.message, (action, items)
    for limit in (0, -1, 10**9, "x", None, float("nan")):
        with pytest.raises(gr.Error, match="number of files"):
            tiles(tab, limit=limit)
    assert len(ids(studio)) == 1


def test_more_are_shown_when_asked_for(studio: Studio, tab: HistoryTab) -> None:
    sample(studio, per_class=5)
    html, more, status = tab.search(VISITOR, "", False, 3, REQUEST)
    assert count(html) == 3 and more.visible and "3 newest files" in status
    html, more, status = tab.search(VISITOR, "", False, 5, REQUEST)
    assert count(html) == 5 and not more.visible and "5 files" in status


def test_videos_are_shown_by_their_gif(studio: Studio, tab: HistoryTab) -> None:
    folder, request = studio.owner_folder(OWNER), Request(model="video", seeds=[0])
    folder.mkdir(parents=True)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:])
    (folder / "clip.mp4").write_bytes(b"no video that Pillow could read")
    for suffix in ("gif", "mp4"):
        studio.library.add(OWNER, folder / f"clip.{suffix}", "video", request, [suffix])
    assert count(tiles(tab)) == 2 and tiles(tab).count("data:image/png") == 2
    for item in ids(studio):
        assert "data:image/gif" in click(tab, "open", [item])[len(tab.listed) + 1]
    (folder / "alone.mp4").write_bytes(b"no video that Pillow could read")
    studio.library.add(OWNER, folder / "alone.mp4", "video", request)
    assert count(tiles(tab)) == 3 and tiles(tab).count("vgen-nothumb") == 1
    assert "cannot be shown here" in click(tab, "open", ids(studio))[len(tab.listed) + 1]


# ---- what files and models say


def test_html_as_a_class_name_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tiny, "NAMES", {0: EVIL, 1: '"><script>alert(1)</script>', 2: "c"})
        tiny.tiny_pipeline().save_pretrained(tmp_path / "models" / "evil")
    studio = make_studio(tmp_path)
    sample(studio, "evil", classes=[0, 1], per_class=1)
    with gr.Blocks(analytics_enabled=False):
        tab = HistoryTab(studio, gr.BrowserState(None), gr.BrowserState(None))
    opened = click(tab, "open", ids(studio)[:1])
    for html in (tiles(tab), *opened[len(tab.listed) + 1 : len(tab.listed) + 3]):
        assert EVIL not in html and "<script" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in tiles(tab)
    studio.close()


def test_html_in_a_request_is_text(studio: Studio, tab: HistoryTab) -> None:
    job = sample(studio, per_class=1)
    asked = dataclasses.replace(job.view.request, model=EVIL, sampler=EVIL, checkpoint=EVIL)
    studio.library.add(OWNER, job.view.files[0].with_name("copy.png"), "image", asked)
    job.view.files[0].with_name("copy.png").write_bytes(job.view.files[0].read_bytes())
    opened = click(tab, "open", ids(studio)[:1])
    for html in (tiles(tab), *opened[len(tab.listed) + 1 : len(tab.listed) + 3]):
        assert EVIL not in html
    with pytest.raises(gr.Error) as caught:  # its model is not there
        tab.commands(VISITOR, ids(studio)[0], REQUEST)
    assert EVIL not in caught.value.message and "there is no model" in caught.value.message


def foreign(folder: Path, kind: str) -> Path:
    """A picture that no run of ours has made."""
    path, image, info = folder / f"{kind}.png", Image.new("RGB", (8, 8)), PngImagePlugin.PngInfo()
    good = Request(model="tiny", seeds=[0], class_labels=[0])
    texts = {
        "garbage": "{not json",
        "list": "[1, 2]",
        "strange": json.dumps({"model": "tiny", "seeds": "all"}),
        "unknown model": dataclasses.replace(good, model=EVIL).to_json(),
        "bounds": dataclasses.replace(good, settings={"temperature": "hot"}).to_json(),
        "label": dataclasses.replace(good, class_labels=[99]).to_json(),
        "sampler": dataclasses.replace(good, sampler="../x").to_json(),
        "long": " " * 2_000_000,
    }
    if kind == "html":
        path.write_text("<html><script>alert(1)</script></html>")
    elif kind == "jpeg":
        image.save(path, format="JPEG")
    elif kind == "cut":
        media.save_png(Image.effect_noise((64, 64), 50).convert("RGB"), path, good)
        path.write_bytes(path.read_bytes()[:900])
    else:
        if kind in texts:
            info.add_itxt(media.KEY, texts[kind])
        image.save(path, pnginfo=info)
    return path


KINDS = [
    "plain",
    "garbage",
    "list",
    "strange",
    "unknown model",
    "bounds",
    "label",
    "sampler",
    "long",
    "html",
    "jpeg",
    "cut",
]


def test_metadata_that_is_not_ours_gives_one_line(studio: Studio, tmp_path: Path) -> None:
    with gr.Blocks(analytics_enabled=False):
        generate = GenerateTab(studio, gr.BrowserState(None), gr.BrowserState(None))
    for kind in [*KINDS, "html", "jpeg", "cut"]:
        with pytest.raises(gr.Error) as caught:
            generate.restore(str(foreign(tmp_path, kind)))
        message = caught.value.message
        assert "\n" not in message and "<" not in message and "inside vgen" not in message, (kind, message)


def media_files(studio: Studio) -> list[Path]:
    return sorted(path for path in studio.owner_folder(OWNER).rglob("*") if path.is_file())


def test_a_full_disk_gives_one_line_and_the_studio_goes_on(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, written = Image.Image.save, []

    def full(self: Image.Image, file: Any, *options: Any, **named: Any) -> None:
        if isinstance(file, Path) and written:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        whole(self, file, *options, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        job = sample(studio, per_class=3)
    assert job.state == "failed" and "the disk is full" in str(job.error) and "\n" not in str(job.error)
    (entry,) = studio.library.search(OWNER)  # what was whole before stays
    assert entry.path == media_files(studio)[0] and len(media_files(studio)) == 1
    assert finish(sample(studio)).state == "done"
