"""Training a next-frame generator: flow matching of every frame, given the clean frames before it (FAR, 2503.19325).

Two schemes. "clean-context" is FAR's: all frames are noisy, a few left clean at random. "two-copies" gives each noisy
frame clean copies of those before it, exactly what sampling shows it, at twice the tokens.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vgen.data import spread, to_model_range, to_uint8
from vgen.files import atomic_file
from vgen.generators.far import FAR
from vgen.hub import load_tokenizer
from vgen.media import contact_sheet, sheet_zoom, to_pil
from vgen.moving import ClipSource, MovingDigits, VideoFolder
from vgen.pipelines.clips import CONTEXT_FILE
from vgen.pipelines.next_frame import NextFramePipeline
from vgen.tokenizers.frames import PatchPCA
from vgen.training.config import TrainingConfig, read_part
from vgen.training.families import build_model
from vgen.training.trainer import epoch_order
from vgen.types import SettingError

MOVING_DIGITS = "moving-mnist"
SCHEMES = ("two-copies", "clean-context")
FITTED_ON = 200  # clips that a codec is fitted on
HELD_OUT = 64  # clips that evaluation uses
SHOWN = 4  # of them on a sheet
BUNDLED = 16  # test clips that a model is exported with, to start videos from
CLEAN = -1.0  # timestep of clean frames
TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run, up to a share of its steps: what the clips are like and how noisy frames are.

    The settings of clips are those of vgen.moving.MovingDigits; folders of videos have none.
    """

    until: float = 1.0
    noise_mean: float = 0.0  # of the logit of the noise level; FAR's is 0, above it frames are mostly noise
    digits: int | list[int] = 1
    speed: float | list[float] | None = None  # pixels per frame, or bounds; None: OpenSTL's
    directions: int | None = None  # 4 or 8: steps of whole pixels; None: any angle
    frames: int | None = None  # of a clip; None: as many as `video.frames` says
    rollout: int = 0  # two-copies: up to so many passes put the model's own frames into the clean copies, against drift

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise SettingError(f"until is {self.until}: a phase ends at a share of the run above 0, at most 1")
        if not math.isfinite(self.noise_mean):
            raise SettingError(f"noise_mean is {self.noise_mean}: it must be finite")
        if isinstance(self.speed, list) and len(self.speed) != 2:
            raise SettingError(f"speed is {self.speed}: give pixels per frame, or two bounds")
        if self.rollout < 0:
            raise SettingError(f"rollout is {self.rollout}: it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class VideoTraining:
    """What a run on clips decides beside a TrainingConfig: its `video` settings."""

    size: int = 64  # of the frames in pixels
    frames: int = 10  # of a clip, in training unless its phase says otherwise, and in evaluation
    stride: int = 1  # folders of videos: take every so many-th frame
    context_frames: int = 5  # that evaluation, and a phase's rollout, predict the others from
    scheme: str = "two-copies"
    clean_ratio: float = 0.1  # clean-context: share of frames that are left clean
    context_noise: float = 0.0  # two-copies: clean copies get up to this noise level, against drift
    conditional: bool = False  # learn the classes of a folder of class folders
    codec: dict[str, Any] = field(default_factory=dict)  # of PatchPCA, where `tokenizer` names none
    phases: list[Phase] = field(default_factory=lambda: [Phase()])

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise SettingError(f"video.scheme is {self.scheme!r}: use one of {', '.join(SCHEMES)}")
        for frames in [self.frames, *(phase.frames for phase in self.phases if phase.frames is not None)]:
            if not 0 < self.context_frames < frames:
                raise SettingError(
                    f"video.context_frames is {self.context_frames} of {frames} frames: leave at least one to predict"
                )
        if self.scheme != "two-copies" and any(phase.rollout for phase in self.phases):
            raise SettingError(f"video.scheme is {self.scheme!r}: a phase's rollout needs two-copies")
        for name in ("clean_ratio", "context_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"video.{name} is {getattr(self, name)}: it must be from 0 to below 1")
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
            raise SettingError(f"the phases end at {ends}: give rising shares of the run, the last being 1")


def video_training(values: dict[str, Any]) -> VideoTraining:
    """Settings from a preset. Raises SettingError for one that is unknown, of another type or out of bounds."""
    phases = values.get("phases", [{}])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise SettingError(f"video.phases is {phases!r}: give a list with the settings of each phase")
    built = [Phase(**read_part(phase, Phase, f"video.phases[{i}]")) for i, phase in enumerate(phases)]
    others = {name: value for name, value in values.items() if name != "phases"}
    return VideoTraining(**read_part(others, VideoTraining, "video"), phases=built)


class NextFrameTask:
    """A next-frame generator and the clips it learns from (vgen.training.trainer.Task)."""

    num_examples = 0  # the trainer then numbers examples through the whole run

    def __init__(self, config: TrainingConfig) -> None:
        self.config, self.video = config, video_training(config.video)
        frames = self.video.frames
        self.sources = [self._source("train", phase, phase.frames or frames) for phase in self.video.phases]
        self.held_out = self._source("test", self.video.phases[-1], frames)
        self.codec = self._codec()
        channels, side, _ = self.codec.latent_shape
        self.class_names = list(self.held_out.class_names) if self.video.conditional else []
        self.model = build_model(
            {config.family: FAR},
            config,
            without=["init_gate"],
            in_channels=channels,
            side=side,
            num_classes=len(self.class_names),
        )
        if self.model.is_long and self.video.scheme == "two-copies":
            raise SettingError("FAR-Long trains with --set video.scheme=clean-context")
        self.model.init_weights(gate=config.model.get("init_gate", 0.0))
        self._check_sampling()

    def _source(self, split: str, phase: Phase, frames: int) -> ClipSource:
        config, video = self.config, self.video
        if config.data != MOVING_DIGITS:
            return VideoFolder(config.data, split, video.size, frames, video.stride)
        speed = tuple(phase.speed) if isinstance(phase.speed, list) else phase.speed
        law: dict[str, Any] = {"digits": phase.digits, "speed": speed, "directions": phase.directions}
        return MovingDigits(config.data_root, split, video.size, frames=frames, seed=config.seed, **law)

    def _check_sampling(self) -> None:
        """Wrong `sample_settings` show before the first step, not at the first evaluation or after the last step."""
        pipeline, video = self.pipeline(), self.video
        given = pipeline.chosen_settings({}).context_frames
        if given > video.frames:
            raise SettingError(
                f"sample_settings.context_frames is {given}, but the clips that the model comes with have "
                f"{video.frames} frames: lower it, or raise video.frames"
            )
        pipeline.chosen_settings({"frames": video.frames, "context_frames": video.context_frames})

    def _codec(self) -> Any:
        """The tokenizer that is named, or principal components of the last phase's clips."""
        video, source = self.video, self.sources[-1]
        if self.config.tokenizer:
            codec = load_tokenizer(self.config.tokenizer, device="cpu", dtype=torch.float32)[0]
            if not hasattr(codec, "latent_shape"):
                raise SettingError(f"{self.config.tokenizer} is a {type(codec).__name__}, no codec of frames")
            if codec.image_size != video.size:
                raise SettingError(
                    f"video.size is {video.size}, but {self.config.tokenizer} takes frames of {codec.image_size} "
                    f"pixels: --set video.size={codec.image_size}"
                )
            return codec.requires_grad_(False)
        made = isinstance(source, MovingDigits)
        try:
            codec = PatchPCA(image_size=video.size, **{"image_channels": 1 if made else 3, **video.codec})
        except TypeError as error:
            raise SettingError(f"video.codec: {str(error).rpartition('() ')[2]}") from error
        number = min(FITTED_ON, len(source))
        clips, _ = source.clips(range(number) if made else spread(len(source), number))  # folders are sorted by class
        return codec.fit(to_model_range(clips.flatten(0, 1).expand(-1, 3, -1, -1)))

    # ---- what the trainer asks for

    def batch(self, indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clips (B, F, 1 or 3, S, S) uint8, class ids (B,), and the number of the phase they belong to."""
        number = self._phase(int(indices[0]))
        examples = [self._example(self.sources[number], index) for index in indices.tolist()]
        clips, labels = zip(*examples, strict=True)
        found = torch.cat(clips)
        if self.config.flip:
            flipped = np.random.default_rng(seed).random(len(found)) < 0.5
            found[flipped] = found[flipped].flip(-1)
        return found, torch.cat(labels), torch.tensor(number)

    def _phase(self, index: int) -> int:
        """Number of the phase that an example of the run belongs to, the same for all of a step."""
        share = index // self.config.batch_size / self.config.steps
        return next(i for i, phase in enumerate(self.video.phases) if share < phase.until)

    def _example(self, source: ClipSource, index: int) -> tuple[Tensor, Tensor]:
        """Example `index` of the run: a clip of its own where clips are made, otherwise of endless shuffled epochs."""
        if isinstance(source, MovingDigits):
            clips, labels = source.clips([index])
        else:
            epoch, place = divmod(index, len(source))
            number = int(epoch_order(len(source), self.config.seed, epoch)[place])
            clips, labels = source.clips([number], seed=self.config.seed + epoch)
        return clips, labels[:, 0]

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clips, ids, number = batch
        phase, clean, labels = self.video.phases[number], self._latents(clips), self._labels(ids, rng)
        sigma = draw_levels(torch.full((len(clean),), phase.noise_mean), clean.shape[1], rng).to(clean.device)
        passes = int(torch.randint(phase.rollout + 1, (), generator=rng)) if phase.rollout else 0
        seen = self._rolled_out(model, clean, labels, passes, rng)
        losses, counted = self._losses(model, clean, sigma, labels, rng, seen)
        return mean_of_counted(losses, counted), {}

    @torch.no_grad()
    def _rolled_out(
        self, model: nn.Module, clean: Tensor, labels: Tensor | None, passes: int, rng: torch.Generator
    ) -> Tensor:
        """The clips as the model would have them after the frames that are given.

        Each pass predicts all frames at once from pure noise and those before them, so that after n passes a frame
        rests on up to n - 1 generations of the model's own frames: what it meets when sampling, to be mended from the
        true frames that are still in sight (the pushforward trick of 2202.03376, for all frames in parallel).
        """
        seen, given = clean, self.video.context_frames
        for _ in range(passes):
            noise = torch.randn(clean.shape, generator=rng).to(clean.device)
            velocity = model(noise, torch.full_like(clean[:, :, 0, 0, 0], TIMESTEPS), labels, clean=seen)
            seen = torch.cat([clean[:, :given], (noise - velocity)[:, given:].to(clean.dtype)], 1)
        return seen

    def _losses(
        self,
        model: nn.Module,
        clean: Tensor,
        sigma: Tensor,
        labels: Tensor | None,
        rng: torch.Generator,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The squared error of what the network predicts, of each frame (B, F), and which frames count.

        With two copies, `seen` is what it sees of frames before; None: the clean ones.
        """
        noise = torch.randn(clean.shape, generator=rng).to(clean.device)
        counted = torch.ones_like(sigma, dtype=torch.bool)
        if self.video.scheme == "clean-context":
            counted = torch.rand(sigma.shape, generator=rng).to(sigma.device) >= self.video.clean_ratio
            if self.model.is_long:  # frames beyond the window are context alone
                counted[:, : -self.model.config["window"]] = False
        level = sigma.where(counted, 0)[..., None, None, None]
        noisy = torch.lerp(clean, noise, level)
        times = (TIMESTEPS * sigma).where(counted, CLEAN)
        context = self._context(clean if seen is None else seen, rng) if self.video.scheme == "two-copies" else None
        velocity = model(noisy, times, labels, clean=context)
        error = velocity - (noise - clean)
        if self.model.config["prediction"] == "sample":  # of x0 = z - sigma v
            error = error * level
        return error.float().square().mean((2, 3, 4)), counted

    def _context(self, clean: Tensor, rng: torch.Generator) -> Tensor:
        """Clean copies, a little noisy where that is asked for, though the network is told that they are clean."""
        if not self.video.context_noise:
            return clean
        level = torch.rand(*clean.shape[:2], 1, 1, 1, generator=rng) * self.video.context_noise
        return torch.lerp(clean, torch.randn(clean.shape, generator=rng).to(clean.device), level.to(clean.device))

    def _latents(self, clips: Tensor) -> Tensor:
        if self.codec.device != clips.device:
            self.codec.to(clips.device)
        with torch.no_grad(), torch.autocast(clips.device.type, enabled=False):
            return self.codec.encode(to_model_range(clips).expand(-1, -1, 3, -1, -1))

    def _labels(self, labels: Tensor, rng: torch.Generator | None) -> Tensor | None:
        """Class ids (B,), dropped at random with an `rng`."""
        if not self.class_names:
            return None
        if rng is None:
            return labels
        dropped = torch.rand(len(labels), generator=rng) < self.config.label_dropout
        return labels.masked_fill(dropped.to(labels.device), self.model.null_class)

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Nothing follows a step."""

    # ---- held-out figures

    def evaluate(self) -> dict[str, float]:
        """The loss on test clips, and squared errors of predictions, pixels in [0, 1]: of the first predicted frame, of
        all, and of repeating the last frame given."""
        clips, labels = self._test_clips(HELD_OUT)
        rng = torch.Generator().manual_seed(0)  # the same noise at every evaluation
        clean = self._latents(clips)
        sigma = draw_levels(torch.full((len(clips),), self.video.phases[-1].noise_mean), clean.shape[1], rng)
        losses, counted = self._losses(self.model, clean, sigma.to(clean.device), self._labels(labels, None), rng)
        given = self.video.context_frames
        truth = clips.float() / 255
        found = self._predict(clips, labels)[:, :, : clips.shape[2]].float() / 255
        errors = (found - truth).square().mean((0, 2, 3, 4))[given:]
        copied = (truth[:, given - 1 : given] - truth).square().mean((0, 2, 3, 4))[given:]
        return {
            "test_loss": float(mean_of_counted(losses, counted)),
            "test_mse_first": float(errors[0]),
            "test_mse": float(errors.mean()),
            "test_mse_copy": float(copied.mean()),
        }

    def _test_clips(self, number: int) -> tuple[Tensor, Tensor]:
        clips, labels = self.held_out.clips(spread(len(self.held_out), min(number, len(self.held_out))), seed=0)
        return clips.to(self.model.device), labels[:, 0].to(self.model.device)

    def _predict(self, clips: Tensor, labels: Tensor) -> Tensor:
        """Clips of which the first frames are given (B, F, 3, S, S) uint8."""
        given = self._labels(labels, None)
        frames = self.pipeline()(
            None if given is None else given.tolist(),
            context=clips.cpu().expand(-1, -1, 3, -1, -1).numpy(),
            context_frames=self.video.context_frames,
            frames=self.video.frames,
            seeds=list(range(len(clips))),
            output_type="pt",
        ).frames
        return to_uint8(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def picture(self) -> Image.Image:
        """Rows of true frames, each above the frames predicted from its first ones."""
        clips, labels = self._test_clips(SHOWN)
        truth, found = clips.expand(-1, -1, 3, -1, -1), self._predict(clips, labels)
        rows = [row for pair in zip(truth, found, strict=True) for row in pair]
        tiles = [tile for row in rows for tile in to_pil(row.cpu())]
        return contact_sheet(tiles, self.video.frames, sheet_zoom(self.video.size))

    # ---- the finished model

    def pipeline(self) -> NextFramePipeline:
        names, settings = dict(enumerate(self.class_names)), self.config.sample_settings
        return NextFramePipeline(self.codec, self.model, id2label=names, settings=settings)

    def export(self, folder: Path, card: str) -> None:
        for part in (self.model, self.codec):
            torch.nn.Module.half(part)
        self.pipeline().save_pretrained(folder)
        for part in (self.model, self.codec):
            part.float()
        if self.config.sample_settings.get("context_frames"):
            clips = self._test_clips(BUNDLED)[0].movedim(-3, -1).cpu().numpy()
            with atomic_file(folder / CONTEXT_FILE) as partial, partial.open("wb") as file:
                np.savez_compressed(file, clips)
        (folder / "README.md").write_text(card)


def draw_levels(means: Tensor, frames: int, rng: torch.Generator) -> Tensor:
    """Noise levels (B, F) in 0.001..1 of frames, whose logits are normal about means (B,): FAR's law for mean 0.

    In thousandths, as the published code draws its timesteps.
    """
    share = torch.sigmoid(torch.randn(len(means), frames, generator=rng) - means[:, None])
    return (TIMESTEPS - (TIMESTEPS * share).floor().clamp_max(TIMESTEPS - 1)) / TIMESTEPS


def mean_of_counted(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean over samples of the mean over each one's counted frames: (B, F) x 2 -> a scalar; 0 for none."""
    return ((losses * counted).sum(1) / counted.sum(1).clamp_min(1)).mean()
