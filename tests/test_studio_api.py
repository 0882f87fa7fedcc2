"""The studio over HTTP, as `gradio_client` and curl use it: named endpoints, cancelling, and what nobody may reach."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image
from studio_helpers import WAIT, make_studio

from vgen.app.core import Studio
from vgen.app.studio import build, launch
from vgen.media import read_request

LANCZOS = Image.Resampling.LANCZOS


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Studio, str]]:
    studio = make_studio(tmp_path_factory.mktemp("studio"), "tiny", "masked")
    page = build(studio)
    _, url, _ = launch(studio, page, prevent_thread_lock=True)
    yield studio, url
    page.close(verbose=False)
    studio.close()


def connect(url: str, downloads: Path) -> Client:
    return Client(url, verbose=False, download_files=downloads, httpx_kwargs={"timeout": WAIT})


@pytest.fixture
def client(served: tuple[Studio, str], tmp_path: Path) -> Client:
    return connect(served[1], tmp_path)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_only_named_endpoints_are_public(client: Client) -> None:
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/generate", "/edit", "/models"}
    assert client.view_api(return_format="dict")["unnamed_endpoints"] == {}


def test_generating(client: Client, served: tuple[Studio, str]) -> None:
    files, request, status = client.predict("tiny", ["bee"], 2, 5, None, {"guidance_scale": 3}, api_name="/generate")
    assert [read_request(Path(path)).seeds for path in files] == [[5], [6]]
    told = json.loads(request)
    assert told["class_labels"] == [1, 1] and told["settings"]["guidance_scale"] == 3 and "Done" in status
    pipeline = served[0].models.get("tiny")
    wanted = pipeline(["bee", "bee"], seeds=[5, 6], guidance_scale=3.0).images
    assert [Image.open(path).tobytes() for path in files] == [image.tobytes() for image in wanted]


def picture_file(path: Path, size: tuple[int, int], white: tuple[int, int, int, int] | None = None) -> Any:
    """A black picture with a white box, to be handed in."""
    image = Image.new("L", size)
    if white:
        image.paste(255, white)
    image.save(path)
    return handle_file(path)


def test_editing(client: Client, served: tuple[Studio, str], tmp_path: Path) -> None:
    pipeline = served[0].models.get("tiny")
    before = pipeline(["ant"], seeds=[1]).images[0]
    before.resize((24, 24), Image.Resampling.NEAREST).save(tmp_path / "image.png")
    mask = picture_file(tmp_path / "mask.png", (24, 24), (12, 0, 24, 24))  # the right half
    arguments = ("tiny", handle_file(tmp_path / "image.png"), mask, "bee", 2, 7, None, {"guidance_scale": 2})
    files, request, status = client.predict(*arguments, api_name="/edit")
    told = json.loads(request)
    assert told["class_labels"] == [1, 1] and told["seeds"] == [7, 8] and told["settings"]["guidance_scale"] == 2
    assert "50% of the pixels" in told["origin"] and "Done" in status
    right = torch.zeros(8, 8, dtype=torch.bool)
    right[:, 4:] = True
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "image.png").convert("RGB").resize((8, 8), LANCZOS)))
    wanted = pipeline.edit(pixels.permute(2, 0, 1), right, [1, 1], seeds=[7, 8], guidance_scale=2.0).images
    assert [Image.open(path).tobytes() for path in files] == [image.tobytes() for image in wanted]
    assert wanted[0].tobytes() != wanted[1].tobytes() != before.tobytes()


def test_bad_edits_are_one_line(client: Client, tmp_path: Path) -> None:
    image = picture_file(tmp_path / "image.png", (8, 8))
    whole = picture_file(tmp_path / "whole.png", (8, 8), (0, 0, 8, 8))
    small = picture_file(tmp_path / "small.png", (4, 8), (0, 0, 4, 8))
    (tmp_path / "text.png").write_text("no picture")
    for arguments, says in (
        (("nonsense", image, whole, 0, 1, 0, None, {}), "there is no model"),
        (("tiny", image, None, 0, 1, 0, None, {}), "needs an image and a mask"),
        (("tiny", image, small, 0, 1, 0, None, {}), "mask is 4x8 pixels, the picture 8x8"),
        (("tiny", image, image, 0, 1, 0, None, {}), "nothing is marked"),
        (("tiny", handle_file(tmp_path / "text.png"), whole, 0, 1, 0, None, {}), "no picture that can be read"),
        (("tiny", image, whole, "dog", 1, 0, None, {}), "unknown class"),
        (("tiny", image, whole, 0, 99, 0, None, {}), "whole number in 1..16"),
        (("tiny", image, whole, 0, 1, 0, None, [1]), "settings must be an object"),
    ):
        with pytest.raises(Exception, match=says) as error:
            client.predict(*arguments, api_name="/edit")
        assert "Traceback" not in str(error.value)


def test_models_are_listed(client: Client) -> None:
    found = {item["name"]: item for item in client.predict(api_name="/models")}
    assert found["tiny"]["classes"] == ["ant", "bee", "cat"] and "halton" in found["masked"]["samplers"]
    assert found["fashion-var"]["parameters"] > 1e6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nonsense", None, 1, 0, None, {}), "there is no model"),
        (("tiny", ["dog"], 1, 0, None, {}), "unknown class"),
        (("tiny", None, 1e9, 0, None, {}), "whole number in 1..64"),
        (("tiny", None, 1, -5, None, {}), "seed is"),
        (("tiny", [0], 1, 0, "<img src=x onerror=alert(1)>", {}), "unknown sampler"),
        (("tiny", [0], 1, 0, None, {"top_k": 1e99}), "top_k is"),
        (("tiny", [0], 1, 0, None, {"dictation": 1}), "unknown setting"),
    ],
)
def test_bad_input_is_one_line_and_the_server_goes_on(client: Client, arguments: Any, says: str) -> None:
    with pytest.raises(Exception, match=says) as error:
        client.predict(*arguments, api_name="/generate")
    assert "<img" not in str(error.value) and "Traceback" not in str(error.value)
    assert client.predict("tiny", [0], 1, 0, None, {}, api_name="/generate")[0]


def test_cancelling_closes_the_sampler_and_forgets_the_run(
    client: Client, served: tuple[Studio, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = served[0]
    pipeline = studio.models.get("masked")
    original, begun, closed, go = pipeline.stream, threading.Event(), threading.Event(), threading.Event()

    def slow(*args: Any, **named: Any) -> Iterator[Any]:
        steps = original(*args, **named)
        try:
            for step in steps:
                yield step
                begun.set()
                go.wait(WAIT)
        finally:
            steps.close()
            closed.set()

    monkeypatch.setattr(pipeline, "stream", slow)
    before = len(studio.jobs._known)
    job = client.submit("masked", [0], 1, 0, None, {"steps": 8}, api_name="/generate")
    assert begun.wait(WAIT)
    job.cancel()
    wait_for(lambda: len(studio.jobs._known) == before)  # the watcher has ended, and with it the run
    go.set()
    assert closed.wait(WAIT)
    monkeypatch.undo()
    assert client.predict("masked", [0], 1, 0, None, {"steps": 2}, api_name="/generate")[0]


def test_two_clients_do_not_see_each_others_results(served: tuple[Studio, str], tmp_path: Path) -> None:
    clients = [connect(served[1], tmp_path / str(i)) for i in range(2)]
    jobs = [
        client.submit("tiny", ["ant"], 1, 100 + i, None, {}, api_name="/generate") for i, client in enumerate(clients)
    ]
    for i, job in enumerate(jobs):
        files, _, _ = job.result(timeout=WAIT)
        assert [read_request(Path(path)).seeds for path in files] == [[100 + i]]
    found = {path.parent.parent.name for path in served[0].folder.rglob("*_s10[01].png")}
    assert len(found) == 2  # a folder each


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=WAIT) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_files_that_nobody_may_read(served: tuple[Studio, str]) -> None:
    studio, url = served
    files = f"{url.rstrip('/')}/gradio_api/file="
    assert status_of(f"{files}{studio.folder}/index.sqlite") == 403
    assert status_of(f"{files}{studio.folder}/.secret") in (403, 404)
    assert status_of(f"{files}/etc/passwd") == 403
    assert status_of(f"{files}{studio.folder}/../models/tiny/model_index.json") in (403, 404)
    assert (studio.folder / ".secret").stat().st_mode & 0o077 == 0


def call(url: str, name: str, data: list[Any]) -> str:
    """What an endpoint answers to a request by hand, as a stream of events."""
    address = f"{url.rstrip('/')}/gradio_api/call/{name}"
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(address, json.dumps({"data": data}).encode(), headers)
    with urllib.request.urlopen(asked, timeout=WAIT) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}", timeout=WAIT) as answer:
        return answer.read().decode()


def test_an_edit_reads_only_files_that_were_handed_in(
    served: tuple[Studio, str], client: Client, tmp_path: Path
) -> None:
    whole = picture_file(tmp_path / "whole.png", (8, 8), (0, 0, 8, 8))
    before = set(served[0].folder.rglob("*.png"))
    here = {"path": str(tmp_path / "whole.png"), "meta": {"_type": "gradio.FileData"}}
    answer = call(served[1], "edit", ["tiny", here, here, None, 1, 0, None, {}])
    assert "event: error" in answer and "event: complete" not in answer
    assert set(served[0].folder.rglob("*.png")) == before
    assert client.predict("tiny", whole, whole, None, 1, 0, None, {}, api_name="/edit")[0]  # the same file, handed in


def test_many_requests_and_cancellations_leave_nothing_behind(served: tuple[Studio, str], tmp_path: Path) -> None:
    """50 requests in the queue, 20 of them cancelled."""
    studio, url = served
    clients = [connect(url, tmp_path / str(i)) for i in range(5)]
    before = len(list(studio.folder.rglob("*.png")))
    jobs = [clients[i % 5].submit("tiny", [0], 1, i, None, {}, api_name="/generate") for i in range(50)]
    cancelled = [job for i, job in enumerate(jobs) if i % 5 in (1, 3)]
    for job in cancelled:
        job.cancel()
    for i, job in enumerate(jobs):
        if i % 5 not in (1, 3):
            files, _, _ = job.result(timeout=WAIT)
            assert read_request(Path(files[0])).seeds == [i]
    wait_for(lambda: not studio.jobs._known and not studio.jobs._waiting)
    made = len(list(studio.folder.rglob("*.png"))) - before
    assert 30 <= made <= 50  # what had ended before it was cancelled stays
    assert not list(studio.folder.rglob("*.tmp"))
