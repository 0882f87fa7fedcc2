"""Training next-frame generators: the law of noise, losses by their definition, phases, runs from clips to video."""

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_moving import levels, shown, write_videos
from test_training import (  # noqa: F401
    checkpoint,
    fresh_accelerate,
    metrics,
    micro_batches,
    run_until,
    same,
    weights,
)
from tiny import WEIGHTS, randomize, tokenizer_config, write_mnist
from tiny_masked import tiny_tokenizer
from torch import Tensor

import vgen
from vgen import cli
from vgen.data import spread, to_model_range
from vgen.generators.far import FAR
from vgen.moving import EPOCH, MovingDigits
from vgen.tokenizers.frames import PatchPCA, PixelPatches
from vgen.training import next_frame
from vgen.training.card import cpu_minutes
from vgen.training.config import TrainingConfig, load_config
from vgen.training.next_frame import NextFrameTask, draw_levels, mean_of_counted, video_training
from vgen.training.run import build_task, start
from vgen.training.trainer import StepBatches
from vgen.types import CheckpointError, SettingError

MODEL = {"width": 16, "depth": 2, "heads": 2, "patch_size": 2, "rope_axes": [2, 2, 4], "init_gate": 0.5}
LONG = MODEL | {"context_patch_size": 4, "window": 2}
VIDEO = {"size": 64, "frames": 4, "context_frames": 2, "codec": {"patch_size": 16, "components": 4}}
SAMPLING = {"frames": 4, "context_frames": 2, "steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"), "MNIST")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of 32 x 32 pixels in three classes; see test_moving.levels."""
    root = tmp_path_factory.mktemp("videos")
    for name, number in (("jump", 1), ("run", 2), ("walk", 2)):
        write_videos(root, ".gif", number, name)
    return root


@pytest.fixture(autouse=True)
def few_clips() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_frame, "FITTED_ON", 20)
        patch.setattr(next_frame, "HELD_OUT", 6)
        yield


def far_config(root: Path | str, video: dict[str, Any] | None = None, **changes: Any) -> TrainingConfig:
    """A run of a few seconds on moving digits; `video` changes its settings of that name."""
    values: dict[str, Any] = {
        "kind": "generator",
        "name": "tiny-far",
        "data": "moving-mnist",
        "family": "far",
        "model": MODEL,
        "flip": False,
        "batch_size": 4,
        "sample_settings": SAMPLING,
        "video": VIDEO | (video or {}),
    }
    return tokenizer_config(Path(root), **values | changes)


def task_of(root: Path | str, video: dict[str, Any] | None = None, **changes: Any) -> NextFrameTask:
    task: Any = build_task(far_config(root, video, **{"steps": 100} | changes))
    assert isinstance(task, NextFrameTask)
    return task


def on_folder(folder: Path, **changes: Any) -> dict[str, Any]:
    """What a run on the folder of videos needs."""
    return {"data": str(folder), "video": {"size": 32, "codec": {"patch_size": 8, "components": 4}} | changes}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the law of noise


def test_levels_are_those_of_the_published_timesteps() -> None:
    u = torch.sigmoid(torch.randn(3000, 5, generator=seeded(1)))
    published = 1000 - (1000 * u).floor()
    assert torch.equal((1000 * draw_levels(torch.zeros(3000), 5, seeded(1))).round(), published)
    assert published.min() < 60 and published.max() > 940


@pytest.mark.parametrize("mean", [-1.0, 0.0, 2.2])
def test_the_logit_of_a_level_is_normal_about_its_mean(mean: float) -> None:
    found = draw_levels(torch.full((20_000,), mean), 2, seeded()).flatten()
    edges = torch.arange(1, 1000) / 1000
    wanted = torch.special.ndtr(torch.logit(edges) - mean)
    share = torch.searchsorted(found.sort().values, edges + 1e-5) / len(found)  # of levels up to each edge
    assert (share - wanted).abs().max() < 0.01  # Kolmogorov and Smirnov: p below 1e-3


def test_levels_stay_above_nothing_and_follow_the_mean_of_their_clip() -> None:
    found = draw_levels(torch.tensor([-60.0, 60.0]), 50, seeded())
    assert (found[0] == 0.001).all() and (found[1] == 1).all()


# ---- the loss


class Reader:
    """A network that says 0 and keeps what it reads; frames that it is told are clean make it say nonsense."""

    def __init__(self) -> None:
        self.labels: Tensor | None = None

    def __call__(self, noisy: Tensor, times: Tensor, labels: Tensor | None, clean: Tensor | None = None) -> Tensor:
        self.noisy, self.times, self.labels, self.clean = noisy, times, labels, clean
        return torch.zeros_like(noisy) + 1e6 * (times < 0)[..., None, None, None]


def clips_of(task: NextFrameTask, number: int) -> tuple[Tensor, Tensor, Tensor]:
    return task.batch(np.arange(number), seed=0)


def latents_of(task: NextFrameTask, clips: Tensor) -> Tensor:
    return task.codec.encode(to_model_range(clips).expand(-1, -1, 3, -1, -1))


@pytest.mark.parametrize("scheme", ["two-copies", "clean-context"])
@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_a_network_that_says_nothing_has_the_loss_of_its_target(data: Path, scheme: str, prediction: str) -> None:
    task = task_of(data, {"scheme": scheme, "clean_ratio": 0.0}, model=MODEL | {"prediction": prediction})
    batch = clips_of(task, 48)
    loss, figures = task.loss(task.model, batch, seeded())
    power = latents_of(task, batch[0]).square().mean()
    assert figures == {} and 0.5 < power < 2
    if prediction == "sample":  # of the clean latents
        torch.testing.assert_close(loss, power, rtol=1e-4, atol=1e-4)
    else:  # n - x0, of which n has variance 1
        assert abs((loss - power).item() - 1) < 0.06
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.model.parameters())


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_frames_left_clean_are_read_as_clean_and_count_nothing(data: Path, prediction: str) -> None:
    model = MODEL | {"prediction": prediction}
    task = task_of(data, {"scheme": "clean-context", "clean_ratio": 0.5}, model=model)
    batch, network = clips_of(task, 64), Reader()
    loss, _ = task.loss(network, batch, seeded(3))  # type: ignore[arg-type]
    x0, counted = latents_of(task, batch[0]), network.times >= 0
    assert network.clean is None and abs(counted.float().mean() - 0.5) < 0.13  # 256 frames: 4 standard deviations
    assert (network.times[~counted] == -1).all() and torch.equal(network.noisy[~counted], x0[~counted])
    level = (network.times / 1000)[..., None, None, None]
    noise = (network.noisy - (1 - level) * x0) / level  # z = (1 - sigma) x0 + sigma n
    clear = counted & (network.times > 100)
    assert abs(noise[clear].mean()) < 0.05 and abs(noise[clear].std() - 1) < 0.05
    error = ((noise - x0) * (level if prediction == "sample" else 1)).square().mean((2, 3, 4))
    means = [float(row[keep].mean()) if keep.any() else 0.0 for row, keep in zip(error, counted, strict=True)]
    assert loss.item() == pytest.approx(np.mean(means), rel=1e-3)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_a_batch_of_clean_frames_alone_has_no_loss_and_no_gradient(data: Path, prediction: str) -> None:
    video = {"scheme": "clean-context", "clean_ratio": 1 - 1e-9}
    task = task_of(data, video, model=MODEL | {"prediction": prediction})
    randomize(task.model, 0)
    loss, _ = task.loss(task.model, clips_of(task, 2), seeded())
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in task.model.parameters())  # NaN is not 0 either


def test_the_mean_is_over_each_samples_counted_frames() -> None:
    losses = torch.tensor([[1.0, 2.0, 6.0], [5.0, 7.0, 9.0], [4.0, 8.0, 3.0]])
    counted = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    assert float(mean_of_counted(losses, counted)) == pytest.approx((3.5 + 7 + 0) / 3)


def test_two_copies_show_every_noisy_frame_clean_ones(data: Path) -> None:
    task, network = task_of(data, {"clean_ratio": 0.5}), Reader()  # of no effect here
    batch = clips_of(task, 16)
    loss, _ = task.loss(network, batch, seeded(4))  # type: ignore[arg-type]
    x0, level = latents_of(task, batch[0]), (network.times / 1000)[..., None, None, None]
    assert (level > 0).all() and network.clean is not None and torch.equal(network.clean, x0)
    noise = (network.noisy - (1 - level) * x0) / level
    assert loss.item() == pytest.approx(float((noise - x0).square().mean()), rel=1e-3)


def test_clean_copies_get_noise_up_to_the_level_asked_for(data: Path) -> None:
    task = task_of(data, {"context_noise": 0.2})
    found = task._context(torch.zeros(200, 4, 4, 16, 16), seeded()).flatten(2).std(2)
    assert found.min() < 0.01 and 0.19 < found.max() < 0.22 and abs(found.mean() - 0.1) < 0.01
    assert found.std(1).mean() > 0.03  # each frame's level is its own
    moved = task._context(torch.ones(200, 4, 4, 16, 16), seeded()).flatten(2).mean(2)
    torch.testing.assert_close(moved, 1 - found, rtol=0, atol=0.05)


class Foreseer(Reader):
    """A network to which every frame is a tenth of all that it sees before it, and 1; it keeps what it saw."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, noisy: Tensor, times: Tensor, labels: Tensor | None, clean: Tensor | None = None) -> Tensor:
        assert clean is not None
        self.calls.append((noisy, times, clean))
        found = 1 + 0.1 * (clean.cumsum(1) - clean)
        return (noisy - found) / (times / 1000)[..., None, None, None]


def test_rolled_out_frames_rest_on_the_models_own(data: Path) -> None:
    task = task_of(data, {"frames": 5, "context_frames": 2})
    clean = latents_of(task, clips_of(task, 3)[0])
    wanted = [clean]
    for _ in range(3):  # by hand, a frame at a time
        seen = wanted[-1]
        later = [1 + 0.1 * seen[:, :frame].sum(1) for frame in range(2, 5)]
        wanted.append(torch.cat([clean[:, :2], torch.stack(later, 1)], 1))
    for passes, frames in enumerate(wanted):
        network = Foreseer()
        found = task._rolled_out(network, clean, None, passes, seeded(passes))  # type: ignore[arg-type]
        torch.testing.assert_close(found, frames, rtol=1e-4, atol=1e-4)
        assert all((times == 1000).all() for _, times, _ in network.calls) and len(network.calls) == passes
    settled = task._rolled_out(Foreseer(), clean, None, 9, seeded())  # type: ignore[arg-type]
    again = task._rolled_out(Foreseer(), clean, None, 3, seeded(5))  # type: ignore[arg-type]
    torch.testing.assert_close(settled, again)  # three frames to predict: after three passes all rest on predictions


def test_a_phase_rolls_out_and_has_clips_of_its_own_length(data: Path) -> None:
    phases = [{"until": 0.5}, {"frames": 6, "rollout": 2}]
    task = task_of(data, {"phases": phases}, steps=10)
    early, late = (task.batch(np.arange(first, first + 2), seed=0) for first in (0, 20))
    assert (early[0].shape[1], late[0].shape[1]) == (4, 6) and task.held_out.clips([0])[0].shape[1] == 4
    evaluations: dict[int, int] = {}
    for seed in range(60):
        network = Foreseer()
        loss, _ = task.loss(network, late, seeded(seed))  # type: ignore[arg-type]
        evaluations[len(network.calls)] = evaluations.get(len(network.calls), 0) + 1
        seen, clean = network.calls[-1][2], latents_of(task, late[0])
        own = (seen != clean).flatten(2).any(2)
        assert not own[:, :2].any() and own[:, 2:].all() == (len(network.calls) > 1)
        prediction = 1 + 0.1 * (seen.cumsum(1) - seen)  # compared with the true frames, whatever was seen
        level = (network.calls[-1][1] / 1000)[..., None, None, None]
        assert loss.item() == pytest.approx(float(((clean - prediction) / level).square().mean()), rel=1e-3)
    assert set(evaluations) == {1, 2, 3} and min(evaluations.values()) > 9  # 20 each, 3 standard deviations
    network = Foreseer()
    task.loss(network, early, seeded())  # type: ignore[arg-type]
    assert len(network.calls) == 1


def test_far_long_counts_the_frames_of_its_window_alone(data: Path) -> None:
    long = {"scheme": "clean-context", "clean_ratio": 0.0, "frames": 5}
    task, network = task_of(data, long, model=LONG), Reader()
    batch = clips_of(task, 8)
    loss, _ = task.loss(network, batch, seeded())  # type: ignore[arg-type]
    assert (network.times[:, :3] == -1).all() and (network.times[:, 3:] > 0).all()
    x0, level = latents_of(task, batch[0]), (network.times / 1000)[..., None, None, None]
    error = ((network.noisy - x0) / level)[:, 3:].square().mean()  # n - x0
    assert loss.item() == pytest.approx(float(error), rel=1e-3)
    task.loss(task.model, batch, seeded())[0].backward()
    assert task.model.head.weight.grad.abs().sum() > 0
    short = task_of(data, long | {"frames": 3}, model=LONG | {"window": 4})
    short.loss(network, clips_of(short, 8), seeded())  # type: ignore[arg-type]
    assert (network.times > 0).all()  # all frames are inside the window


def test_labels_are_dropped_at_their_rate(folder: Path) -> None:
    task = task_of("none", **on_folder(folder, conditional=True), label_dropout=0.25)
    assert task.class_names == ["jump", "run", "walk"] and task.model.config["num_classes"] == 3
    labels = torch.arange(2000) % 3
    found = task._labels(labels, seeded())
    assert found is not None and abs((found == 3).float().mean() - 0.25) < 0.04  # 4 standard deviations
    assert torch.equal(found[found < 3], labels[found < 3]) and torch.equal(task._labels(labels, None), labels)
    network, batch = Reader(), clips_of(task, 5)
    task.loss(network, batch, seeded())  # type: ignore[arg-type]
    assert network.labels is not None and set(network.labels.tolist()) <= {0, 1, 2, 3}
    plain = task_of("none", **on_folder(folder))
    plain.loss(network, clips_of(plain, 5), seeded())  # type: ignore[arg-type]
    assert network.labels is None and plain.model.config["num_classes"] == 0


# ---- which clips


PHASES = [
    {"until": 0.25, "noise_mean": 2, "speed": 0},
    {"until": 0.5, "noise_mean": 1.5, "speed": [3, 4]},
    {"noise_mean": 0, "digits": [2], "directions": 8, "speed": 2},
]


def test_phases_change_at_their_share_of_the_run_and_no_clip_repeats(data: Path) -> None:
    config = far_config(data, {"phases": PHASES}, steps=10, accumulation=2, seed=3)
    task: Any = build_task(config)
    batches: Any = StepBatches(task, config, 0, 1)
    parts = [batches[i] for i in range(len(batches))]
    clips, phases = torch.cat([part[0] for part in parts]), [int(part[2]) for part in parts for _ in part[0]]
    assert phases == [0] * 12 + [1] * 8 + [2] * 20  # of ten steps of four clips: whole steps, up to 0.25 and 0.5
    assert len({clip.numpy().tobytes() for clip in clips}) == 40
    still = (clips == clips[:, :1]).flatten(1).all(1)
    assert still[:12].all() and not still[12:].any()
    laws: list[dict[str, Any]] = [{"speed": 0}, {"speed": (3, 4)}, {"digits": 2, "directions": 8, "speed": 2}]
    for law, index in zip(laws, (11, 12, 20), strict=True):
        source = MovingDigits(data, "train", 64, frames=4, seed=3, **law)
        assert torch.equal(clips[index], source.clips([index])[0][0])
    assert task.held_out.counts == (2,) and task.held_out.split == "test"  # of the last phase


def test_an_endless_task_numbers_its_examples_through_the_run() -> None:
    (alone,) = micro_batches(0, batch_size=6, accumulation=2, steps=5)
    assert [index for indices, _ in alone for index in indices] == list(range(30))
    two = micro_batches(0, world=3, batch_size=6, accumulation=2, steps=5)
    for i, (indices, _) in enumerate(alone):
        assert sorted(index for process in two for index in process[i][0]) == indices


def test_every_epoch_of_a_folder_shows_every_video_once(folder: Path) -> None:
    task = task_of("none", **on_folder(folder), seed=2)
    clips, labels, _ = task.batch(np.arange(15), seed=0)
    assert clips.shape == (15, 4, 3, 32, 32) and clips.dtype == torch.uint8
    epochs = labels.view(3, 5).tolist()
    assert all(sorted(epoch) == [0, 1, 1, 2, 2] for epoch in epochs) and len({str(epoch) for epoch in epochs}) > 1
    starts = {tuple(shown(clip)) for clip, label in zip(clips, labels, strict=True) if label == 0}
    assert len(starts) > 1  # another piece of the same video
    apart = task.batch(np.array([11, 4]), seed=9)
    assert torch.equal(apart[0], clips[[11, 4]]) and torch.equal(apart[1], labels[[11, 4]])
    other = task_of("none", **on_folder(folder), seed=3).batch(np.arange(15), seed=0)
    assert not torch.equal(other[0], clips)


def test_flips_mirror_whole_clips(data: Path) -> None:
    straight, _, _ = task_of(data).batch(np.arange(40), seed=5)
    flipped, _, _ = task_of(data, flip=True).batch(np.arange(40), seed=5)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(straight, flipped, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(straight, flipped, strict=True)]
    assert all(a or b for a, b in zip(mirrored, kept, strict=True)) and 8 < sum(kept) < 32


def test_a_codec_is_fitted_in_the_colours_and_on_all_classes_of_a_folder(
    data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_frame, "FITTED_ON", 2)
    assert task_of(data).codec.config["image_channels"] == 1
    codec = task_of("none", **on_folder(folder)).codec
    assert codec.config["image_channels"] == 3
    fitted = np.stack([levels(0)[:4], levels(1)[:4]])  # the first of the first class and the last of the last
    assert float(codec.mean.mean()) == pytest.approx(fitted.mean() / 127.5 - 1, abs=0.01)
    grey = task_of("none", **on_folder(folder, codec={"patch_size": 8, "components": 4, "image_channels": 1})).codec
    assert grey.config["image_channels"] == 1


# ---- held-out figures


def test_figures_are_those_worked_out_by_hand(data: Path) -> None:
    phases = [{"noise_mean": 1.0}]
    task = task_of(data, {"phases": phases, "context_noise": 0.0})
    randomize(task.model, 1)
    with torch.no_grad():
        found = task.evaluate()
        assert task.evaluate() == found
        source = MovingDigits(data, "test", 64, frames=4, seed=task.config.seed)
        clips, _ = source.clips(spread(EPOCH, 6), seed=0)
        context = clips.movedim(2, -1).numpy()
        given = task.pipeline()(context=context, seeds=range(6), output_type="pil", **SAMPLING).frames
        x0, rng = latents_of(task, clips), seeded()
        sigma = draw_levels(torch.ones(6), 4, rng)
        noise, level = torch.randn(x0.shape, generator=rng), sigma[..., None, None, None]
        velocity = task.model((1 - level) * x0 + level * noise, 1000 * sigma, clean=x0)
    predicted = np.array([[np.asarray(frame)[..., 0] for frame in video] for video in given]) / 255
    truth = clips[:, :, 0].numpy() / 255
    wanted = {
        "test_loss": float((velocity - noise + x0).square().mean()),
        "test_mse_first": ((predicted[:, 2] - truth[:, 2]) ** 2).mean(),
        "test_mse": ((predicted[:, 2:] - truth[:, 2:]) ** 2).mean(),
        "test_mse_copy": ((truth[:, 1:2] - truth[:, 2:]) ** 2).mean(),
    }
    assert found == pytest.approx(wanted, rel=1e-3)
    assert len(set(found.values())) == 4


def test_the_picture_has_the_truth_above_what_was_predicted(data: Path) -> None:
    task = task_of(data)
    with torch.no_grad():
        sheet = np.array(task.picture())
    assert sheet.shape == (8 * 66 + 2, 4 * 66 + 2, 3)
    clips, _ = task.held_out.clips(spread(EPOCH, 4), seed=0)
    for row in range(4):
        top = 2 + 2 * row * 66
        assert np.array_equal(sheet[top : top + 64, 2 + 3 * 66 :][:, :64, 0], clips[row, 3, 0].numpy())


# ---- runs


@pytest.fixture(scope="module")
def config(data: Path) -> TrainingConfig:
    phases = [{"until": 0.5, "noise_mean": 2.0, "speed": 3}, {"noise_mean": 0.5, "digits": [1, 2]}]
    video = {"phases": phases, "context_noise": 0.1}
    changes = {"steps": 6, "eval_every": 6, "accumulation": 2, "optimizer": "muon", "notes": "Digits that move."}
    return far_config(data, video, **changes)


@pytest.fixture(scope="module")
def trained(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_frame, "FITTED_ON", 20)
        patch.setattr(next_frame, "HELD_OUT", 6)
        start(config, out, command="vgen train generator --preset tiny")
    return out


def test_a_resumed_run_equals_an_unbroken_one(config: TrainingConfig, trained: Path, tmp_path: Path) -> None:
    run_until(config, tmp_path / "broken", 2)
    start(config, tmp_path / "broken", resume=True)
    assert same(checkpoint(trained, 6), checkpoint(tmp_path / "broken", 6))
    assert metrics(trained) == metrics(tmp_path / "broken")
    assert same(weights(trained / "model"), weights(tmp_path / "broken" / "model"))
    losses = [line["loss"] for line in metrics(trained) if "loss" in line]
    assert len(set(losses)) == 6 and all(map(math.isfinite, losses))


def test_a_run_begins_with_a_trained_model(config: TrainingConfig, trained: Path, tmp_path: Path) -> None:
    first = shutil.copytree(trained / "model", tmp_path / "first")
    model = config.model | {"init_gate": 0.2}  # of no effect
    changes: dict[str, Any] = {"init_from": str(first), "tokenizer": str(first), "lr": 1e-9, "seed": 8}
    further = dataclasses.replace(config, model=model, **changes)
    found = start(further, tmp_path / "whole")
    before, after = weights(trained / "model"), weights(found)
    assert same(before, after) and before.keys() == after.keys()  # at this rate, in half precision
    cards = [(folder / "README.md").read_text() for folder in (first, found)]
    assert f"| begun with | `{first}` ({cpu_minutes(cards[0])} CPU-minutes) |" in cards[1]
    slow = cards[1].replace("| time | 0 CPU", "| time | 7 CPU").replace("(0 CPU-minutes)", "(30 CPU-minutes)")
    assert cpu_minutes(slow) == 37 and cpu_minutes("no table") is None
    run_until(further, tmp_path / "broken", 2)
    shutil.rmtree(first / "generator")  # a run that goes on no longer needs it
    start(further, tmp_path / "broken", resume=True)
    assert same(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "broken", 6))
    with pytest.raises(CheckpointError, match=r"cannot load .*generator"):
        start(further, tmp_path / "anew")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": MODEL | {"width": 32, "rope_axes": [4, 4, 8]}}, r"whose width is 16, here 32: make them equal"),
        ({"model": MODEL | {"prediction": "sample"}}, r"whose prediction is velocity, here sample"),
        ({"init_from": "fashion-var"}, r"init_from is 'fashion-var', a VAR: it must be a FAR"),
        ({"init_from": "nowhere"}, r"unknown model 'nowhere'"),
    ],
)
def test_what_a_run_cannot_begin_with_is_one_line(
    config: TrainingConfig, trained: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    wrong = dataclasses.replace(config, **{"init_from": str(trained / "model")} | changes)
    with pytest.raises(SettingError, match=says) as caught:
        start(wrong, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_finished_model_loads_and_continues_its_own_clips(trained: Path, data: Path) -> None:
    pipeline = vgen.load(trained / "model")
    assert type(pipeline.generator) is FAR and type(pipeline.tokenizer) is PatchPCA
    with np.load(trained / "model" / "context.npz") as arrays:
        bundled = arrays["arr_0"]
    assert bundled.shape == (16, 4, 64, 64, 1) and bundled.dtype == np.uint8
    source = MovingDigits(data, "test", 64, digits=[1, 2], frames=4)
    assert np.array_equal(bundled, source.clips(spread(EPOCH, 16), seed=0)[0].movedim(2, -1).numpy())
    own = pipeline(seeds=[19], output_type="pt").frames
    assert own.shape == (1, 4, 3, 64, 64)
    torch.testing.assert_close(own, pipeline(seeds=[19], output_type="pt", context=bundled[3], context_frames=2).frames)
    assert pipeline.config["settings"] == SAMPLING


def test_a_finished_model_is_stored_in_half_precision_but_for_its_codec(trained: Path) -> None:
    halves, codec = (load_file(trained / "model" / part / WEIGHTS) for part in ("generator", "tokenizer"))
    assert {tensor.dtype for tensor in halves.values()} == {torch.float16}
    assert {tensor.dtype for tensor in codec.values()} == {torch.float32}
    assert any(tensor.any() for tensor in halves.values())
    card = (trained / "model" / "README.md").read_text()
    for words in ("license: apache-2.0", "Digits that move.", "moving-mnist", "--preset tiny", "| test_mse |"):
        assert words in card


def test_a_run_on_a_folder_of_classes_samples_by_name(folder: Path, tmp_path: Path) -> None:
    settings = {"frames": 3, "steps": 1}  # from nothing: no clips come with it
    changes = on_folder(folder, conditional=True, frames=3)
    path = start(far_config("none", **changes, steps=1, sample_settings=settings), tmp_path / "run")
    assert not (path / "context.npz").exists()
    pipeline = vgen.load(path)
    assert pipeline.class_names == ["jump", "run", "walk"]
    assert pipeline("walk", seeds=[0], output_type="np").frames.shape == (1, 3, 32, 32, 3)


def test_export_leaves_the_model_in_single_precision(data: Path, tmp_path: Path) -> None:
    task = task_of(data)
    before = task.codec.basis.clone()
    task.export(tmp_path, "card")
    assert task.model.dtype == task.codec.dtype == torch.float32 and torch.equal(task.codec.basis, before)


# ---- mistakes


def test_settings_are_taken_in_their_own_types() -> None:
    found = video_training({"context_noise": "1e-1", "phases": [{"speed": 4, "digits": 2.0, "noise_mean": "2"}]})
    assert found.context_noise == 0.1
    phase = found.phases[0]
    assert (phase.speed, phase.digits, phase.noise_mean, phase.until) == (4.0, 2, 2.0, 1.0)
    assert video_training({}).phases == [next_frame.Phase()]


@pytest.mark.parametrize(
    ("video", "says"),
    [
        ({"sise": 3}, r"unknown setting 'video.sise': did you mean 'size'\?"),
        ({"phases": [{"untill": 1}]}, r"unknown setting 'video.phases\[0\].untill': did you mean 'until'\?"),
        ({"phases": 5}, r"video.phases is 5: give a list"),
        ({"phases": ["all"]}, r"video.phases is \['all'\]: give a list"),
        ({"phases": []}, r"the phases end at \[\]: give rising shares of the run, the last being 1"),
        ({"phases": [{"until": 0.5}]}, r"the phases end at \[0.5\]"),
        ({"phases": [{"until": 0.5}, {"until": 0.5}, {}]}, r"the phases end at \[0.5, 0.5, 1.0\]"),
        ({"phases": [{}, {"until": 0.5}]}, r"the phases end at \[1.0, 0.5\]"),
        ({"phases": [{"until": 0}]}, r"until is 0.0: a phase ends at a share of the run above 0, at most 1"),
        ({"phases": [{"until": 1.5}]}, r"until is 1.5"),
        ({"phases": [{"until": "soon"}]}, r"video.phases\[0\].until is 'soon': expected a value of type float"),
        ({"phases": [{"noise_mean": float("nan")}]}, r"noise_mean is nan: it must be finite"),
        ({"phases": [{"speed": [1, 2, 3]}]}, r"speed is \[1.0, 2.0, 3.0\]: give pixels per frame, or two bounds"),
        ({"phases": [{"digits": "two"}]}, r"video.phases\[0\].digits is 'two': expected a value of type int"),
        ({"scheme": "both"}, r"video.scheme is 'both': use one of two-copies, clean-context"),
        ({"frames": "ten"}, r"video.frames is 'ten': expected a value of type int"),
        ({"context_frames": 4, "frames": 4}, r"video.context_frames is 4 of 4 frames"),
        ({"context_frames": 0}, r"video.context_frames is 0 of 10 frames"),
        ({"phases": [{"frames": 5}]}, r"video.context_frames is 5 of 5 frames"),
        ({"phases": [{"rollout": -1}]}, r"rollout is -1: it must be at least 0"),
        ({"scheme": "clean-context", "phases": [{"rollout": 1}]}, r"a phase's rollout needs two-copies"),
        ({"clean_ratio": 1}, r"video.clean_ratio is 1.0: it must be from 0 to below 1"),
        ({"context_noise": -0.1}, r"video.context_noise is -0.1"),
    ],
)
def test_wrong_video_settings_are_one_line(video: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says) as caught:
        video_training(video)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("video", "changes", "says"),
    [
        ({}, {"model": LONG}, "FAR-Long trains with --set video.scheme=clean-context"),
        ({"codec": {"patches": 8}}, {}, "video.codec: .*'patches'"),
        ({"codec": {"components": 0}}, {}, "components is 0"),
        ({}, {"sample_settings": {"frames": 3, "context_frames": 3}}, "frames is 3, of which 3 are given"),
        ({}, {"sample_settings": {"heat": 1}}, "unknown setting 'heat'"),
        ({}, {"sample_settings": {"steps": 0}}, "steps is 0: it must lie in 1"),
        ({}, {"sample_settings": {"frames": 9, "context_frames": 5}}, "context_frames is 5, but the clips .* 4 frames"),
        (
            {"scheme": "clean-context", "frames": 7},
            {"model": LONG, "sample_settings": {"frames": 2, "schedule": "full-sequence"}},
            "schedule 'full-sequence' works on 5 frames at a time",
        ),
        ({}, {"data": "none"}, "there is no folder 'none'"),
        ({"phases": [{"digits": 0}]}, {}, r"digits is \(0,\)"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    data: Path, video: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingError, match=says) as caught:
        task_of(data, video, **changes)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_must_be_a_codec_of_frames_of_this_size(data: Path, tmp_path: Path) -> None:
    tiny_tokenizer(image_channels=1).save_pretrained(tmp_path / "vqgan")
    with pytest.raises(SettingError, match=r"vqgan is a VQGAN, no codec of frames"):
        task_of(data, tokenizer=str(tmp_path / "vqgan"))
    PixelPatches(image_size=32, patch_size=8, image_channels=1).save_pretrained(tmp_path / "patches")
    says = r"video.size is 64, but .*patches takes frames of 32 pixels: --set video.size=32"
    with pytest.raises(SettingError, match=says):
        task_of(data, tokenizer=str(tmp_path / "patches"))
    task = task_of(data, {"size": 32}, tokenizer=str(tmp_path / "patches"))
    assert type(task.codec) is PixelPatches and task.model.config["in_channels"] == 64


def test_the_preset_is_possible_and_its_mistakes_are_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, preset = load_config("moving-far-base"), load_config("moving-far")
    assert [phase.until for phase in video_training(base.video).phases] == [0.2, 0.65, 0.85, 1.0]
    video = video_training(preset.video)
    assert preset.sample_settings["context_frames"] <= video.frames
    assert preset.init_from == preset.tokenizer == f"runs/{base.name}/model" and preset.model == base.model
    monkeypatch.chdir(tmp_path)
    command = ["train", "generator", "--preset", "moving-far-base", "--data-root", str(data), "--set", "video.sise=3"]
    assert cli.main(command) == 2
    found = capsys.readouterr()
    assert found.out == "" and len(found.err.splitlines()) == 1 and "'video.sise'" in found.err
    assert not list(tmp_path.iterdir())
