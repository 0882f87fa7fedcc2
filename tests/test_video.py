"""Videos: errors of every frame against closed forms, FVD by a network of the right interface, three kinds of files."""

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from tiny_evaluation import Result, command, isolate, refused, write_npz
from torch import Tensor, nn

import vgen
from vgen.evaluation.metrics import frechet_distance
from vgen.evaluation.video import I3D, MAX_FRAMES, evaluate_videos, open_videos
from vgen.files import sha256
from vgen.types import CheckpointError, SettingError

ERRORS = ("video_psnr", "video_ssim", "video_mse")
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `vgen evaluate` in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda *arguments: command(capsys, *arguments)


def videos(number: int, frames: int, seed: int = 0, side: int = 16, channels: int = 3) -> np.ndarray:
    """(N, F, side, side, channels) uint8, each of its own brightness, no two frames alike."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 100, (number, frames, side, side, channels))
    return (noise + rng.integers(0, 156, (number, 1, 1, 1, channels))).astype(np.uint8)


def write_frames(folder: Path, pixels: np.ndarray) -> str:
    """A folder of pictures for each video."""
    for i, video in enumerate(pixels):
        (folder / f"{i:03}").mkdir(parents=True)
        for j, frame in enumerate(video):
            Image.fromarray(frame.squeeze()).save(folder / f"{i:03}" / f"{j:03}.png")
    return str(folder)


def write_animations(folder: Path, pixels: np.ndarray, suffix: str) -> str:
    """A file for each video, without loss."""
    folder.mkdir(parents=True)
    options = {"webp": {"lossless": True, "exact": True}}.get(suffix, {})
    for i, video in enumerate(pixels):
        first, *rest = [Image.fromarray(frame.squeeze()) for frame in video]
        first.save(folder / f"{i:03}.{suffix}", save_all=True, append_images=rest, **options)
    return str(folder)


def judge(fake: str, real: str, metrics: Sequence[str] = ERRORS, **options: Any) -> Any:
    return evaluate_videos(open_videos(fake), open_videos(real), metrics, **options)


# ---- errors of frames


def test_a_constant_shift_has_a_known_error(tmp_path: Path) -> None:
    """Frame f of all videos is brighter by its own number of levels: flat pictures make SSIM a closed form too."""
    level, shifts = 100, np.array([0, 1, 5, 40])
    real = np.full((3, 4, 16, 16, 3), level, dtype=np.uint8)
    fake = (real + shifts[None, :, None, None, None]).astype(np.uint8)
    report = judge(write_npz(tmp_path / "fake.npz", fake), write_npz(tmp_path / "real.npz", real))
    mse = (shifts / 255) ** 2
    psnr = [100.0, *(-20 * math.log10(shift / 255) for shift in shifts[1:])]  # 100 dB stands for infinity
    x, y = level / 255, (level + shifts) / 255
    ssim = (2 * x * y + 1e-4) / (x**2 + y**2 + 1e-4)
    for name, expected in (("mse", mse), ("psnr", psnr), ("ssim", ssim)):
        assert report.details[f"video_{name}_per_frame"] == pytest.approx(list(expected), rel=1e-9, abs=1e-12), name
        assert report.metrics[f"video_{name}"] == pytest.approx(float(np.mean(expected)), rel=1e-9)


def test_frames_are_averaged_over_videos(tmp_path: Path) -> None:
    real = np.full((2, 3, 16, 16, 3), 50, dtype=np.uint8)
    shifts = np.array([[2, 4, 6], [10, 0, 20]])
    fake = (real + shifts[:, :, None, None, None]).astype(np.uint8)
    report = judge(write_npz(tmp_path / "fake.npz", fake), write_npz(tmp_path / "real.npz", real), ["video_mse"])
    assert report.details["video_mse_per_frame"] == pytest.approx(((shifts / 255) ** 2).mean(0).tolist())
    assert list(report.metrics) == ["video_mse"] and list(report.details) == ["video_mse_per_frame"]


def test_equal_videos_have_no_error(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "v.npz", videos(2, 3))
    report = judge(name, name)
    assert report.metrics == {"video_psnr": pytest.approx(100), "video_ssim": pytest.approx(1), "video_mse": 0}
    assert report.warnings == []


def test_videos_are_compared_pair_by_pair_in_order(tmp_path: Path) -> None:
    pixels = videos(3, 2)
    swapped = write_npz(tmp_path / "swapped.npz", pixels[[1, 0, 2]])
    report = judge(swapped, write_npz(tmp_path / "v.npz", pixels), ["video_mse"])
    x = pixels.astype(float) / 255
    expected = 2 * ((x[0] - x[1]) ** 2).mean((1, 2, 3)) / 3
    assert report.details["video_mse_per_frame"] == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (videos(4, 5), ["has 3 and .*real.npz 4", "give as many"]),
        (videos(3, 6), ["video 0 of .*real.npz has 6 frames of 16x16", "5 frames of 16x16", "one size and length"]),
        (videos(3, 5, side=12), ["5 frames of 12x12", "5 frames of 16x16"]),
        (np.concatenate([videos(3, 5), videos(3, 5)], 3), ["5 frames of 32x16", "5 frames of 16x16"]),
    ],
    ids=["count", "length", "size", "width"],
)
def test_pairs_that_do_not_fit_are_refused(tmp_path: Path, other: np.ndarray, says: list[str]) -> None:
    fake, real = write_npz(tmp_path / "fake.npz", videos(3, 5)), write_npz(tmp_path / "real.npz", other)
    for part in says:
        with pytest.raises(SettingError, match=part):
            judge(fake, real)


def test_pairs_of_different_lengths_among_themselves_are_refused(tmp_path: Path) -> None:
    pixels = [videos(1, 5), videos(1, 4, seed=1)]
    for i, video in enumerate(pixels):
        write_frames(tmp_path / "parts", video)
        (tmp_path / "parts" / "000").rename(tmp_path / "parts" / f"video{i}")
    with pytest.raises(SettingError, match=r"video 1 of .*parts has 4 frames, others 5"):
        judge(str(tmp_path / "parts"), str(tmp_path / "parts"))


def test_small_videos_have_an_mse(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "v.npz", videos(2, 3, side=8))
    assert judge(name, name, ["video_mse"]).metrics == {"video_mse": 0}


def test_unknown_metrics_are_refused(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "v.npz", videos(2, 3))
    with pytest.raises(SettingError, match=r"video_lpips is no metric of videos: use video_psnr.*fvd"):
        judge(name, name, ["video_mse", "video_lpips"])


# ---- files


@pytest.mark.parametrize("form", ["gif", "webp", "png", "frames", "one channel"])
def test_the_same_frames_give_the_same_figures_from_any_file(tmp_path: Path, form: str) -> None:
    grey = videos(3, 5, channels=1)
    arrays = write_npz(tmp_path / "grey.npz", np.repeat(grey, 3, 4))
    if form == "frames":
        files = write_frames(tmp_path / "files", grey)
    elif form == "one channel":
        files = write_npz(tmp_path / "one.npz", grey)
    else:
        files = write_animations(tmp_path / "files", grey, form)
    other = write_npz(tmp_path / "other.npz", videos(3, 5, seed=9))
    by_files, by_arrays = judge(files, other), judge(arrays, other)
    assert by_files.metrics == pytest.approx(by_arrays.metrics, rel=1e-12)
    for name, values in by_arrays.details.items():
        assert by_files.details[name] == pytest.approx(values, rel=1e-12)
    assert by_files.images["sha256"] == by_arrays.images["sha256"]  # of the pixels, not of the files
    assert by_files.images["size"] == "5 frames of 16x16" and by_files.images["n"] == 3
    assert by_files.images["files"] == {"one channel": "npz"}.get(form, form)
    assert judge(other, files).metrics["video_mse"] == pytest.approx(by_arrays.metrics["video_mse"])


def test_the_hash_is_of_the_pixels_and_their_shape(tmp_path: Path) -> None:
    pixels = videos(2, 4)
    changed = pixels.copy()
    changed[1, 3, 0, 0, 0] ^= 1
    kinds = {"a": pixels, "b": changed, "c": pixels[::-1], "d": pixels[:1], "e": pixels.reshape(4, 2, 16, 16, 3)}
    found = {}
    for name, kind in kinds.items():
        path = write_npz(tmp_path / f"{name}.npz", kind)
        found[name] = judge(path, path, ["video_mse"]).images["sha256"]
    assert len(set(found.values())) == len(kinds)


def test_frames_and_videos_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    pixels = videos(11, 2)
    opened = open_videos(write_frames(tmp_path / "frames", pixels))
    assert len(opened) == 11
    for i in (0, 1, 10):
        assert torch.equal(opened.read(i), torch.from_numpy(pixels[i]).permute(0, 3, 1, 2))
    (tmp_path / "frames" / "000" / "0005.png").write_bytes((tmp_path / "frames" / "000" / "001.png").read_bytes())
    assert len(opened.read(0)) == 3


def test_hidden_files_beside_videos_are_passed_over(tmp_path: Path) -> None:
    folder = Path(write_animations(tmp_path / "files", videos(2, 3, channels=1), "gif"))
    (folder / ".hidden").mkdir()
    (folder / ".x.gif").write_bytes(b"")
    (folder / "README.txt").write_text("text")
    assert len(open_videos(str(folder))) == 2


def test_hidden_files_among_frames_are_passed_over(tmp_path: Path) -> None:
    folder = Path(write_frames(tmp_path / "frames", videos(2, 3)))
    (folder / "000" / ".DS_Store").write_bytes(b"\0")
    assert len(open_videos(str(folder)).read(0)) == 3


def test_a_folder_of_compressed_videos_is_told_why_not(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "first.MP4").write_bytes(b"\0")
    with pytest.raises(SettingError, match=r"no GIF.*clips \(first.MP4 is compressed with loss"):
        open_videos(str(tmp_path / "clips"))


@pytest.mark.parametrize("kind", ["nothing", "empty folder", "text"])
def test_what_holds_no_videos_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "videos"
    if kind == "empty folder":
        path.mkdir()
    if kind == "text":
        path.write_text("text")
    with pytest.raises(SettingError, match=r"no videos at|no GIF") as caught:
        open_videos(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 16, 16, 3), dtype=np.uint8),
        np.zeros((2, 3, 16, 16, 4), dtype=np.uint8),
        np.zeros((2, 3, 16, 16, 3), dtype=np.float32),
    ],
    ids=["images", "alpha", "floats"],
)
def test_arrays_of_other_things_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(SettingError, match=r"arr_0 of .* is (uint8|float32) \(2, .*expected uint8 \(N, F, H, W, 3\)"):
        open_videos(write_npz(tmp_path / "v.npz", array))


@pytest.mark.parametrize("shape", [(0, 12), (2, 0)])
def test_arrays_without_videos_or_frames_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Without videos the file is called truncated; without frames there is an IndexError."""
    name = write_npz(tmp_path / "v.npz", np.zeros((*shape, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(SettingError) as caught:
        judge(name, name, ["video_mse"])
    assert "truncated" not in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = Path(write_animations(tmp_path / "files", videos(2, 8, channels=1), "gif"))
    content = (folder / "001.gif").read_bytes()
    (folder / "001.gif").write_bytes(content[: len(content) // 2])
    with pytest.raises(SettingError, match=r"cannot read the video .*001\.gif .*mend or remove it"):
        open_videos(str(folder)).read(1)
    frames = Path(write_frames(tmp_path / "frames", videos(1, 3)))
    (frames / "000" / "001.png").write_bytes(b"\x89PNG")
    with pytest.raises(SettingError, match=r"cannot read the video .*000 .*001\.png"):
        open_videos(str(frames)).read(0)
    Image.new("RGB", (20, 16)).save(frames / "000" / "001.png")
    with pytest.raises(SettingError, match="000 has frames of several sizes"):
        open_videos(str(frames)).read(0)
    (frames / "001").mkdir()
    with pytest.raises(SettingError, match="001 has no frames"):
        open_videos(str(frames)).read(1)


def test_endless_animations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_FRAMES == 10_000
    monkeypatch.setattr("vgen.evaluation.video.MAX_FRAMES", 4)
    folder = write_animations(tmp_path / "files", videos(1, 5, channels=1), "gif")
    with pytest.raises(SettingError, match=r"000\.gif has more than 4 frames: cut it"):
        open_videos(folder).read(0)
    assert len(open_videos(write_animations(tmp_path / "four", videos(1, 4, channels=1), "gif")).read(0)) == 4


# ---- FVD


class Network(nn.Module):
    """Of StyleGAN-V's interface. Insists on the way it is called; features are mean colours of ten frames."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Dropout(0.5)  # saved in training mode: it must not be run so

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert not rescale, "the input is in -1..1 already"
        assert resize and return_features
        assert x.dim() == 5 and x.size(1) == 3 and x.dtype == torch.float32
        assert bool((x >= -1).all()) and bool((x <= 1).all())
        means = x[:, :, :10].mean((3, 4)).flatten(1)  # (B, 30): channels, then frames
        return self.noise(torch.cat([means, means.square(), torch.zeros(len(x), 340)], 1))


class Wide(nn.Module):
    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return torch.zeros(len(x), 401)


class NotANumber(nn.Module):
    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return torch.full((len(x), 400), float("nan"))


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def write_network(path: Path, network: nn.Module) -> Path:
    torch.jit.script(network).save(str(path))
    return path


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("i3d") / "i3d.pt", Network())


def expected_moments(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """What `Network` must see, computed in NumPy."""
    x = pixels.astype(np.float64) / 127.5 - 1  # (N, F, H, W, 3)
    means = x[:, :10].mean((2, 3)).transpose(0, 2, 1).reshape(len(x), -1)
    features = np.concatenate([means, means**2, np.zeros((len(x), 340))], 1)
    return torch.from_numpy(features.mean(0)), torch.from_numpy(np.cov(features, rowvar=False))


@pytest.mark.parametrize("batch_size", [8, 5, 100])
def test_fvd_is_the_frechet_distance_of_the_networks_features(tmp_path: Path, i3d: Path, batch_size: int) -> None:
    ours, theirs = videos(12, 11, 1), videos(9, 11, 2)  # sets of different numbers may be compared
    fake, real = write_npz(tmp_path / "fake.npz", ours), write_npz(tmp_path / "real.npz", theirs)
    report = judge(fake, real, ["fvd"], i3d=i3d, batch_size=batch_size)
    expected = frechet_distance(*expected_moments(ours), *expected_moments(theirs))
    assert report.metrics == {"fvd": pytest.approx(expected, rel=1e-4)} and expected > 0.1
    assert report.protocols["fvd"] == {
        "reference": {"name": real, "n": 9, "sha256": judge(real, real, ["video_mse"]).images["sha256"]},
        "extractor": "i3d-torchscript",
        "extractor_sha256": sha256(i3d),
        "input": "resized by I3D",
        "frames": 11,
    }
    line = report.protocol_line("fvd")
    assert "N=12  " in line and f"N=9 sha256:{report.protocols['fvd']['reference']['sha256'][:12]}" in line
    assert f"sha256:{sha256(i3d)[:12]}" in line and f"vgen={vgen.__version__}" in line


def test_equal_sets_have_an_fvd_of_zero(tmp_path: Path, i3d: Path) -> None:
    pixels = videos(7, 10)
    fake, real = write_npz(tmp_path / "fake.npz", pixels), write_frames(tmp_path / "frames", pixels)
    assert judge(fake, real, ["fvd"], i3d=i3d, batch_size=3).metrics == {"fvd": 0}


def test_the_whole_range_of_pixels_reaches_the_network(i3d: Path) -> None:
    black_to_white = np.linspace(0, 255, 10).astype(np.uint8)[None, :, None, None, None]
    pixels = torch.from_numpy(np.broadcast_to(black_to_white, (1, 10, 4, 4, 3)).copy()).permute(0, 1, 4, 2, 3)
    features = I3D(i3d, "cpu")(pixels)
    assert features.shape == (1, 400) and features.dtype == torch.float64
    levels = torch.from_numpy(black_to_white.reshape(-1) / 127.5 - 1)
    assert torch.allclose(features[0, :30], levels.repeat(3), atol=1e-6)
    assert features[0, 0] == -1 and features[0, 9] == 1


def test_few_videos_are_warned_of(tmp_path: Path, i3d: Path) -> None:
    many, few = (write_npz(tmp_path / f"{n}.npz", videos(n, 10, n, side=2)) for n in (2048, 2047))
    options = {"i3d": i3d, "batch_size": 512}
    assert judge(many, many, ["fvd"], **options).warnings == []
    for fake, real in ((many, few), (few, many)):
        (warning,) = judge(fake, real, ["fvd"], **options).warnings
        assert "fewer than 2048 videos" in warning and "equal N" in warning


def test_fewer_than_ten_frames_are_refused(tmp_path: Path, i3d: Path) -> None:
    nine, ten = (write_npz(tmp_path / f"{n}.npz", videos(3, n)) for n in (9, 10))
    with pytest.raises(SettingError, match="videos of 9 frames: I3D needs at least 10"):
        judge(nine, nine, ["fvd"], i3d=i3d)
    judge(ten, ten, ["fvd"], i3d=i3d)


def test_sets_of_other_lengths_or_sizes_have_no_fvd(tmp_path: Path, i3d: Path) -> None:
    fake = write_npz(tmp_path / "fake.npz", videos(3, 10))
    for name, pixels in (("longer", videos(3, 12)), ("smaller", videos(3, 10, side=12))):
        with pytest.raises(SettingError, match=f"video 0 of .*{name}.npz has .*10 frames of 16x16"):
            judge(fake, write_npz(tmp_path / f"{name}.npz", pixels), ["fvd"], i3d=i3d)


@pytest.mark.parametrize(("network", "says"), [(Wide(), r"\[3, 401\], expected \[3, 400\]")])
def test_a_network_of_another_width_is_refused(tmp_path: Path, network: nn.Module, says: str) -> None:
    name = write_npz(tmp_path / "v.npz", videos(3, 10))
    with pytest.raises(CheckpointError, match=says):
        judge(name, name, ["fvd"], i3d=write_network(tmp_path / "wide.pt", network))


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "v.npz", videos(3, 10))
    with pytest.raises(SettingError, match="not finite: look at the weights"):
        judge(name, name, ["fvd"], i3d=write_network(tmp_path / "nan.pt", NotANumber()))


def test_a_network_of_another_interface_is_refused(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "v.npz", videos(3, 10))
    try:
        judge(name, name, ["fvd"], i3d=write_network(tmp_path / "plain.pt", Plain()))
    except (SettingError, CheckpointError) as error:
        assert "i3d_torchscript.pt" in str(error)


def test_weights_are_asked_for_before_videos_are_read(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "v.npz", videos(3, 10))
    with pytest.raises(SettingError, match=r"i3d_torchscript\.pt.*--fvd-weights"):
        judge(name, name, ["video_mse", "fvd"])
    with pytest.raises(SettingError, match=r"no such file: .*none\.pt"):
        judge(name, name, ["fvd"], i3d=tmp_path / "none.pt")
    for content in (b"", b"text", (tmp_path / "v.npz").read_bytes()):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.pt is no TorchScript network: give StyleGAN-V's"):
            judge(name, name, ["fvd"], i3d=tmp_path / "bad.pt")


def test_loading_the_network_is_silent(i3d: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        I3D(i3d, "cpu")
    assert [str(warning.message) for warning in seen] == []


# ---- the command


def test_the_command_prints_and_writes_the_figures(run: Run, tmp_path: Path, i3d: Path) -> None:
    ours, theirs = videos(4, 10, 1), videos(4, 10, 2)
    write_npz(Path("fake.npz"), ours)
    write_frames(Path("real"), theirs)
    flags = ["--metrics", "video_psnr, fvd,video_mse", "--fvd-weights", i3d, "--json", "new/v.json"]
    done = run("fake.npz", "--reference", "real", *flags)
    assert done.code == 0 and list(done.figures) == ["video_psnr", "video_mse", "fvd"]
    assert len(done.warnings) == 1 and "biased" in done.warnings[0]
    found = json.loads(Path("new/v.json").read_text())
    assert found["metrics"] == pytest.approx(done.figures, rel=1e-5)
    mse = ((ours / 255.0 - theirs / 255.0) ** 2).mean((0, 2, 3, 4))
    assert found["details"]["video_mse_per_frame"] == pytest.approx(mse.tolist())
    assert len(found["details"]["video_psnr_per_frame"]) == 10 and "video_ssim_per_frame" not in found["details"]
    assert found["warnings"] == done.warnings and found["vgen"] == vgen.__version__
    for name, line in found["lines"].items():
        assert line.startswith("N=4  images=fake.npz sha256:") and f"vgen={vgen.__version__}" in line
        assert f"reference=real N=4 sha256:{found['protocol'][name]['reference']['sha256'][:12]}" in line
        assert "size=10 frames of 16x16" in line


def test_mistakes_are_one_line(run: Run, i3d: Path) -> None:
    write_npz(Path("v.npz"), videos(3, 5))
    write_npz(Path("w.npz"), videos(2, 5))
    pair = ("v.npz", "--reference")
    refused(run("v.npz", "--metrics", "fvd"), 2, "--reference")
    refused(run("--metrics", "video_mse", "--reference", "v.npz"), 2, "name both")
    refused(run(*pair, "v.npz", "--metrics", "fvd"), 2, "--fvd-weights")
    refused(run(*pair, "none", "--metrics", "video_mse"), 2, "no videos at 'none'")
    refused(run(*pair, "w.npz", "--metrics", "video_mse", "--json", "x.json"), 2, "3 and w.npz 2")
    refused(run(*pair, "v.npz", "--metrics", "video_mse,mse"), 2, "mse is no metric of videos")
    refused(run(*pair, "v.npz", "--metrics", "fvd", "--fvd-weights", i3d), 2, "5 frames")
    refused(run(*pair, "v.npz", "--metrics", "fvd", "--fvd-weights", "v.npz"), 1, "no TorchScript network")
    assert not Path("x.json").exists()


def test_spaces_between_metrics_do_not_matter(run: Run) -> None:
    """And the list of what there is leaves out the metrics of videos."""
    write_npz(Path("v.npz"), videos(2, 5))
    assert run("v.npz", "--reference", "v.npz", "--metrics", " video_mse").code == 0


def test_only_the_main_process_prints(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(Path("v.npz"), videos(2, 5))
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    done = run("v.npz", "--reference", "v.npz", "--metrics", "video_mse", "--json", "v.json")
    assert done.out == "" and not Path("v.json").exists()


@pytest.mark.parametrize(
    "flags", [["--guidance-scale", "2"], ["--tokenizer", "none"], ["--grid", "top_k=1"], ["--save-statistics", "s.npz"]]
)
def test_flags_that_mean_nothing_are_refused(run: Run, flags: list[str]) -> None:
    write_npz(Path("v.npz"), videos(2, 5))
    refused(run("v.npz", "--reference", "v.npz", "--metrics", "video_mse", *flags), 2)
