"""Judging videos: errors of every frame against the true one, and FVD with a user's I3D network."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from vgen import __version__
from vgen.data import SUFFIXES, to_model_range
from vgen.evaluation.arrays import ArrayMember
from vgen.evaluation.images import UNREADABLE, pixel_bytes
from vgen.evaluation.judges import VIDEO_METRICS
from vgen.evaluation.metrics import Moments, check_ssim, frechet_distance, per_image_error
from vgen.evaluation.report import Report
from vgen.files import sha256
from vgen.memory import is_out_of_memory
from vgen.progress import progress
from vgen.types import CheckpointError, SettingError

ANIMATED = {".gif", ".webp", ".png", ".apng"}
MIN_FRAMES = 10  # of I3D's input
MAX_FRAMES = 10_000
I3D_WIDTH = 400
TRUSTED = 2048  # videos: the usual number


class VideoSet(Protocol):
    """N videos of one size and length."""

    name: str
    files: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Video `index`, (F, 3, H, W) uint8."""
        ...


def open_videos(text: str) -> VideoSet:
    """Open an .npz with `arr_0` (N, F, H, W, 3), a folder of GIF, WebP or APNG, or a folder of folders of frames."""
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return ArrayVideos(text, path)
    if not path.is_dir():
        raise SettingError(f"no videos at {text!r}: give a folder of GIF files or of folders of frames, or an .npz")
    return FileVideos(text, path)


class ArrayVideos:
    """`arr_0` of an .npz, (N, F, H, W, 3) or one-channel, uint8, read video by video."""

    files = "npz"

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.array = name, ArrayMember(path, "arr_0")
        shape, dtype = self.array.shape, self.array.dtype
        if dtype != np.uint8 or len(shape) != 5 or shape[-1] not in (1, 3):
            raise SettingError(f"arr_0 of {name} is {dtype} {shape}: expected uint8 (N, F, H, W, 3)")
        if min(shape) < 1:
            raise SettingError(f"arr_0 of {name} has the shape {shape}: it holds no videos")

    def __len__(self) -> int:
        return self.array.shape[0]

    def read(self, index: int) -> Tensor:
        frames = torch.from_numpy(self.array.read(index, index + 1))[0]
        return frames.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


class FileVideos:
    """A video each file, or each folder of pictures, in the order of their names."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        inside = sorted(path for path in folder.iterdir() if path.name[0] != ".")
        folders = [path for path in inside if path.is_dir()]
        files = [path for path in inside if path.suffix.lower() in ANIMATED]
        if folders and files:
            raise SettingError(f"{name} holds both folders of frames and files such as {files[0].name}: separate them")
        self.videos = folders or files
        self.files = "frames" if folders else "+".join(sorted({path.suffix[1:].lower() for path in self.videos}))
        if not self.videos:
            compressed = [path.name for path in inside if path.suffix.lower() in (".mp4", ".webm", ".avi", ".mov")]
            lossy = "is compressed with loss, which changes every figure: write PNG frames"
            hint = f" ({compressed[0]} {lossy})" if compressed else ""
            raise SettingError(f"no GIF, WebP, APNG or folders of frames in {name}{hint}")

    def __len__(self) -> int:
        return len(self.videos)

    def read(self, index: int) -> Tensor:
        path = self.videos[index]
        try:
            frames = [np.array(frame) for frame in self._frames(path)]
        except UNREADABLE as error:
            raise SettingError(f"cannot read the video {path} ({error}): mend or remove it") from error
        if len({frame.shape for frame in frames}) != 1:
            raise SettingError(f"{path} has {'frames of several sizes' if frames else 'no frames'}: mend or remove it")
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)

    def _frames(self, path: Path) -> Iterator[Image.Image]:
        if path.is_dir():
            files = [file for file in path.iterdir() if file.name[0] != "." and file.suffix.lower() in SUFFIXES]
            if len(files) > MAX_FRAMES:
                raise SettingError(f"{path} has more than {MAX_FRAMES} frames: cut it")
            for file in sorted(files):
                with Image.open(file) as image:
                    yield image.convert("RGB")
            return
        with Image.open(path) as image:
            for number, frame in enumerate(ImageSequence.Iterator(image)):
                if number >= MAX_FRAMES:
                    raise SettingError(f"{path} has more than {MAX_FRAMES} frames: cut it")
                yield frame.convert("RGB")


def evaluate_videos(
    videos: VideoSet,
    reference: VideoSet,
    metrics: Sequence[str],
    *,
    i3d: Path | None = None,
    device: str = "cpu",
    batch_size: int = 8,
) -> Report:
    """Compare videos with true ones of the same length: by pairs for the errors, as distributions for FVD.

    Raises SettingError where they do not fit or a metric is unknown.
    """
    if unknown := [name for name in metrics if name not in VIDEO_METRICS]:
        raise SettingError(f"{unknown[0]} is no metric of videos: use {', '.join(VIDEO_METRICS)}")
    paired = [name for name in metrics if name != "fvd"]
    if paired and len(videos) != len(reference):
        raise SettingError(
            f"{', '.join(paired)} compare videos one by one, but {videos.name} has {len(videos)} and "
            f"{reference.name} {len(reference)}: give as many"
        )
    detector = I3D(i3d, device) if "fvd" in metrics else None
    shape = videos.read(0).shape
    if "video_ssim" in metrics:
        check_ssim(shape[2], shape[3])
    report = Report(images=_facts(videos, shape), warnings=[])
    other = {"reference": {"name": reference.name, "n": len(reference), "sha256": _content(reference)}}
    if paired:
        errors = _errors(videos, reference)
        for name in paired:
            per_frame = errors[name.removeprefix("video_")]
            report.add(name, float(per_frame.mean()), other)
            report.details[f"{name}_per_frame"] = per_frame.tolist()
    if detector is not None:
        if min(len(videos), len(reference)) < TRUSTED:
            report.warnings.append(f"FVD of fewer than {TRUSTED} videos is biased upward: compare it at equal N only")
        moments = [_moments(found, detector, batch_size, shape) for found in (videos, reference)]
        value = frechet_distance(*(part for found in moments for part in (found.mean, found.covariance())))
        protocol = {"extractor": "i3d-torchscript", "extractor_sha256": detector.digest, "input": "resized by I3D"}
        report.add("fvd", value, other | protocol | {"frames": shape[0]})
    return report


def _errors(videos: VideoSet, reference: VideoSet) -> dict[str, Tensor]:
    """PSNR, SSIM and MSE of every frame, the mean over videos: (F,) each."""
    total: dict[str, Tensor] = {}
    with progress(len(videos), f"frames of {videos.name}", "videos") as shown:
        for index in range(len(videos)):
            ours, theirs = videos.read(index), reference.read(index)
            _check_shape(theirs, ours.shape, f"video {index} of {reference.name}")
            found = per_image_error(ours, theirs)
            if total and len(found["mse"]) != len(total["mse"]):
                raise SettingError(f"video {index} of {videos.name} has {len(ours)} frames, others {len(total['mse'])}")
            total = {name: value + total.get(name, 0) for name, value in found.items()}
            shown.advance()
    return {name: value / len(videos) for name, value in total.items()}


def _moments(videos: VideoSet, detector: "I3D", batch_size: int, shape: Sequence[int]) -> Moments:
    moments, pending = Moments(), []
    with progress(len(videos), f"I3D features of {videos.name}", "videos") as shown:
        for index in range(len(videos)):
            video = videos.read(index)
            _check_shape(video, shape, f"video {index} of {videos.name}")
            pending.append(video)
            if len(pending) == batch_size or index == len(videos) - 1:
                moments.add(detector(torch.stack(pending)))
                shown.advance(len(pending))
                pending = []
    return moments


def _check_shape(video: Tensor, shape: Sequence[int], name: str) -> None:
    if tuple(video.shape) != tuple(shape):
        found, wanted = (f"{s[0]} frames of {s[3]}x{s[2]}" for s in (video.shape, shape))
        raise SettingError(f"{name} has {found}, but {wanted} are wanted: give videos of one size and length")


class I3D:
    """A TorchScript I3D of StyleGAN-V's interface: videos (B, 3, F, H, W) in [-1, 1], resized by itself -> (B, 400)."""

    def __init__(self, path: Path | None, device: str) -> None:
        if path is None:
            raise SettingError("FVD needs the I3D network: name i3d_torchscript.pt (StyleGAN-V's) with --fvd-weights")
        if not path.is_file():
            raise SettingError(f"no such file: {path}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # deprecated, but the form that the network comes in
                self.net: Any = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is no TorchScript network: give StyleGAN-V's i3d_torchscript.pt") from error
        self.digest, self.device = sha256(path), device

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """Videos (B, F, 3, H, W) uint8 -> features (B, 400) float64. Raises SettingError below ten frames."""
        if videos.shape[1] < MIN_FRAMES:
            raise SettingError(f"videos of {videos.shape[1]} frames: I3D needs at least {MIN_FRAMES}")
        x = to_model_range(videos).transpose(1, 2).contiguous().to(self.device)
        try:
            features = self.net(x, rescale=False, resize=True, return_features=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"the network does not take videos as StyleGAN-V's i3d_torchscript.pt does ({reason}): give that file"
            ) from error
        if features.shape != (len(videos), I3D_WIDTH):
            raise CheckpointError(f"the I3D network gave {list(features.shape)}, expected {[len(videos), I3D_WIDTH]}")
        if not torch.isfinite(features).all():
            raise SettingError("the I3D network gave features that are not finite: look at the weights")
        return features.double().cpu()


def _facts(videos: VideoSet, shape: Sequence[int]) -> dict[str, Any]:
    size = f"{shape[0]} frames of {shape[3]}x{shape[2]}"
    known = {"name": videos.name, "n": len(videos), "sha256": _content(videos)}
    return known | {"files": videos.files, "size": size, "vgen": __version__}


def _content(videos: VideoSet) -> str:
    digest = hashlib.sha256()
    for index in range(len(videos)):
        video = videos.read(index)
        digest.update(f"{list(video.shape)}".encode() + pixel_bytes(video))
    return digest.hexdigest()
