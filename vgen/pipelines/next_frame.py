"""The pipeline of FAR: videos frame by frame, from nothing, from a class, from actions, or on from a clip."""

import dataclasses
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from vgen.data import to_model_range, to_uint8, to_unit_range
from vgen.media import to_pil
from vgen.pipelines.base import Labels, Pipeline, as_tensor, build_settings, check_output_type
from vgen.pipelines.clips import CONTEXT_FILE, FINGERPRINT, fingerprint, read_clips, to_clips
from vgen.rng import BatchStream, SampleStreams
from vgen.samplers.next_frame import SCHEDULES, NextFrameSettings, branches, next_frame
from vgen.samplers.schedules import num_passes
from vgen.types import Output, Rng, SettingError, Step

MAX_FRAMES = 100_000
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class VideoSettings(NextFrameSettings):
    """The sampler's settings, and how many frames of a clip a video starts with."""

    context_frames: int = 0


class Inputs(NamedTuple):
    """The arguments of a call, checked: clips (K, F, 3, S, S) uint8 and actions (K, F), K = 1 for all samples."""

    settings: VideoSettings
    clips: Tensor | None
    clips_each: bool  # one of each sample
    actions: Tensor | None


class NextFramePipeline(Pipeline):
    """A codec of frames and a generator of the next one.

    Args:
        tokenizer: one of vgen.tokenizers.frames, or anything with its interface; None gives latents only.
        generator: vgen.generators.far.FAR, or anything with its interface.
        id2label: class names by id.
        settings: this model's default settings, fields of VideoSettings. With `context_frames` above 0 a video starts
            with a clip of `context.npz` in the model's folder: clip number seed modulo how many there are.
    """

    samplers = ("next-frame",)
    makes_videos = True

    def shared_sizes(self) -> dict[str, tuple[Any, Any]]:
        ours, theirs = ("x".join(map(str, shape)) for shape in (self.tokenizer.latent_shape, self.latent_shape))
        return {"latent": (ours, theirs)}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of a frame: (C, H, W)."""
        config = self.generator.config
        return config["in_channels"], config["side"], config["side"]

    @property
    def null_class(self) -> int:
        """The class id of unconditional rows; 0 for models without classes, those of actions among them."""
        return self.generator.config["num_classes"]

    # ---- calling

    @torch.no_grad()
    def __call__(self, class_labels: Labels = None, *, output_type: str = "pil", **settings: Any) -> Output:
        """Sample videos.

        Args:
            class_labels: ids or names, one per video (a single one serves all seeds); None is unconditional.
            seeds: one whole number per video; video i depends on its own seed alone.
            generator: one torch.Generator for the whole batch instead.
            sampler: "next-frame".
            context: a clip to continue, for all videos or one each: (F, S, S, 3) or (B, F, 3, S, S), uint8 or floats in
                [0, 1], or lists of PIL images. None takes the model's own clips where it has any.
            context_frames: how many frames of the clip, its first ones; None is all of a clip that is given, and the
                model's default otherwise. 0 starts from nothing.
            frames: of the finished video, those of the clip included.
            actions: (F,) or (B, F) ids, one for every frame, for models that are conditioned on them.
            steps: Euler steps of every frame.
            sigma_min: noise level that the last of them begins at, 0.001 in FAR's schedule; models that predict the
                clean frame and were trained at high noise alone end better from higher up.
            guidance_scale: uncond + s * (cond - uncond) of class or actions; 1 is off.
            schedule: "autoregressive", "pyramid" (a frame starts `uncertainty` passes after the one before it) or
                "full-sequence" (all frames together).
            history_guidance, history_noise: weight of the frames before, and the noise level of those that the weight
                above 1 falls on; 1 is off.
            stabilization: noise level by which generated frames are told to be imperfect.
            context_window: frames before it that a frame sees. slope: temporal decay of attention.
            cached: keep what finished frames were computed to.
            output_type: "pil" (a list of frames per video), "np" ((B, F, S, S, 3) in [0, 1]), "pt" ((B, F, 3, S, S) in
                [0, 1]) or "latent" ((B, F, C, H, W)), in `frames` of the output; without a tokenizer only the last.

        Raises SettingError (a ValueError) naming the value and the remedy.
        """
        check_output_type(output_type)
        if output_type != "latent":
            self.check_tokenizer()
        began = time.monotonic()
        steps, rng = self.begin(class_labels, **settings)
        return self.run(steps, rng, output_type, began)  # encoding a clip counts

    def stream(self, class_labels: Labels = None, **settings: Any) -> Iterator[Step]:
        """Sample, yielding a Step after every evaluation. Takes the arguments of the call, less `output_type`; they
        are checked before the first step is asked for."""
        return self.begin(class_labels, **settings)[0]

    def begin(
        self,
        class_labels: Labels,
        *,
        seeds: Sequence[int] | int | None = None,
        generator: torch.Generator | None = None,
        sampler: str | None = None,
        **settings: Any,
    ) -> tuple[Iterator[Step], Rng]:
        """The steps of a call and their noise."""
        self.resolve_sampler(sampler)
        given = self.read_inputs(settings)
        labels, rng = self.inputs(class_labels, seeds, generator)
        rows = max(len(given.clips) if given.clips_each and given.clips is not None else 1, _rows(given.actions))
        if rows > 1 and len(labels) == 1 and seeds is None:  # as many videos as there are clips or rows of actions
            labels = labels.expand(rows)
            seeded = [secrets.randbits(32) for _ in range(rows)]
            rng = SampleStreams(seeded, self.device) if generator is None else BatchStream(generator, rows, self.device)
        actions = self._per_sample("rows of actions", given.actions, len(labels))
        self.check_memory(len(labels), given.settings, class_labels is not None or actions is not None)
        context = self._context(given, rng, len(labels))
        steps = next_frame(
            self.generator,
            context,
            None if class_labels is None else labels,
            actions,
            self.generator.null_class,
            rng,
            given.settings,
        )
        return self.without_gradients(steps), rng

    def begin_edit(
        self, original: Tensor, painted: Tensor, class_labels: Labels, **settings: Any
    ) -> tuple[Iterator[Step], Rng]:
        raise SettingError("this model makes videos, which cannot be repainted: continue one with context=")

    @property
    def token_pixels(self) -> int:
        return self.tokenizer.image_size // self.latent_shape[1]

    # ---- looking at frames

    @torch.no_grad()
    def decode_floats(self, step: Step | Tensor) -> Tensor:
        """A Step, or latents (B, F, C, H, W) -> frames (B, F, 3, S, S) float32 in [0, 1]."""
        self.check_tokenizer()
        return to_unit_range(self.tokenizer.decode(step.tokens if isinstance(step, Step) else step))

    @staticmethod
    def render(images: Tensor, output_type: str) -> Any:
        """Frames (B, F, 3, S, S) in [0, 1] -> "pil", lists of lists of images, "pt" or "np"."""
        if output_type == "pil":
            return [to_pil(to_uint8(video)) for video in images]
        return images if output_type == "pt" else images.movedim(-3, -1).cpu().numpy()

    def latent(self, step: Step) -> Tensor:
        return step.tokens

    # ---- settings

    def resolve_settings(self, settings: dict[str, Any], sampler: str | None = None) -> dict[str, Any]:
        """All settings with their defaults filled in, as JSON can hold them: clips as a hash of their pixels."""
        self.resolve_sampler(sampler)
        given = self.read_inputs(settings)
        found = dataclasses.asdict(given.settings)
        if given.actions is not None:
            rows = given.actions.tolist()
            found["actions"] = rows[0] if len(rows) == 1 else rows
        if given.clips is not None:
            found["context"] = fingerprint(given.clips)
        return found

    def read_inputs(self, settings: dict[str, Any]) -> Inputs:
        """Everything but labels and seeds, checked. Raises SettingError."""
        settings = dict(settings)
        context, actions = settings.pop("context", None), settings.pop("actions", None)
        clips, each = None, False
        if isinstance(context, str) and context.startswith(FINGERPRINT):
            raise SettingError(
                f"this request continues a clip that is not part of it ({context[:19]}...): give it again, as "
                "--context or context="
            )
        if context is not None:
            self.check_tokenizer()
            clips, each = to_clips(context, self.tokenizer.image_size)
            if settings.get("context_frames") is None:
                settings["context_frames"] = clips.shape[1]
        chosen = self.chosen_settings(settings)
        if clips is not None and chosen.context_frames > clips.shape[1]:
            raise SettingError(
                f"context_frames is {chosen.context_frames}, but the clip has {clips.shape[1]} frames: give more"
            )
        return Inputs(chosen, clips, each, self._actions(actions, chosen.frames))

    def chosen_settings(self, settings: dict[str, Any]) -> VideoSettings:
        """The model's defaults and the settings given, checked. Raises SettingError."""
        absent = ("frames", "context_frames")  # None means the model's
        settings = {name: value for name, value in settings.items() if value is not None or name not in absent}
        bounds: dict[str, tuple[float, float]] = {
            "frames": (1, MAX_FRAMES),
            "context_frames": (0, MAX_FRAMES),
            "steps": (1, 1000),
            "sigma_min": (0.0001, 1.0),
            "guidance_scale": (0.0, 1000.0),
            "uncertainty": (0.0, 1000.0),
            "stabilization": (0.0, 1.0),
            "history_guidance": (0.0, 1000.0),
            "history_noise": (0.0, 1.0),
            "context_window": (1, MAX_FRAMES),
            "slope": (0.0, 1000.0),
        }
        chosen = build_settings(VideoSettings, self.config["settings"] | settings, bounds, {"schedule": SCHEDULES})
        if chosen.context_frames >= chosen.frames:
            raise SettingError(
                f"frames is {chosen.frames}, of which {chosen.context_frames} are given: at least one must be left to "
                "make, so raise frames or lower context_frames"
            )
        num_passes(chosen.frames, chosen.steps, chosen.spacing)
        self._check_window(chosen)
        return chosen

    def _check_window(self, chosen: VideoSettings) -> None:
        """What a generator with a window of full resolution cannot do beyond it."""
        config, made = self.generator.config, chosen.frames - chosen.context_frames
        window = config["window"]
        if config["context_patch_size"] is None:
            return
        if chosen.context_window is not None:
            raise SettingError(
                f"context_window is {chosen.context_window}, and this model sees old frames coarsely instead of "
                "forgetting them: leave context_window out"
            )
        if chosen.frames <= window:
            return
        busy = min(made, math.ceil(chosen.steps / chosen.spacing)) if chosen.spacing else made
        if busy > window:
            raise SettingError(
                f"schedule {chosen.schedule!r} works on {busy} frames at a time, of {chosen.frames}, and this model on "
                f"{window} at most: raise uncertainty, or use schedule='autoregressive'"
            )
        if chosen.stabilization or chosen.history_guidance != 1:
            raise SettingError(
                f"frames is {chosen.frames}, and beyond {window} frames this model knows clean ones only: leave out "
                "stabilization and history_guidance, or take fewer frames"
            )

    # ---- inputs

    def _actions(self, actions: Any, frames: int) -> Tensor | None:
        """Actions (K, F) of checked length and range."""
        if actions is None:
            return None
        number = self.generator.config["num_actions"]
        if not number:
            raise SettingError("this model knows no actions: leave actions out")
        ids = as_tensor("actions", actions, self.device)
        if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise SettingError(
                f"actions are {ids.dtype} of shape {tuple(ids.shape)}: give whole numbers, one per frame"
            )
        if ids.shape[-1] != frames or not len(ids):
            raise SettingError(f"there are {ids.shape[-1]} actions for {frames} frames: give one for every frame")
        if int(ids.min()) < 0 or int(ids.max()) >= number:
            raise SettingError(
                f"actions go from {int(ids.min())} to {int(ids.max())}: they must lie in 0..{number - 1}"
            )
        return ids.long().reshape(-1, frames)

    @staticmethod
    def _per_sample(what: str, values: Tensor | None, batch: int) -> Tensor | None:
        """Values of each sample, from those of each or of one for all. Raises SettingError."""
        if values is None:
            return None
        if len(values) not in (1, batch):
            raise SettingError(f"there are {len(values)} {what} for {batch} videos: give one for all, or one each")
        return values.expand(batch, *values.shape[1:])

    def _context(self, given: Inputs, rng: Rng, batch: int) -> Tensor:
        """Latents (B, c, C, H, W) of the frames that videos start with; float32, whatever the model computes in."""
        count, precision = given.settings.context_frames, torch.promote_types(torch.float32, self.generator.dtype)
        if not count:
            return torch.empty(batch, 0, *self.latent_shape, device=self.device, dtype=precision)
        clips = given.clips
        if clips is None:
            clips = self._own_clips(count, getattr(rng, "seeds", None) or list(range(batch)))
        clips = self._per_sample("context clips", clips, batch)
        assert clips is not None
        return self._encode(clips[:, :count]).to(self.device, precision)

    @torch.no_grad()
    def _encode(self, clips: Tensor) -> Tensor:
        return self.tokenizer.encode(to_model_range(clips.to(self.device)))

    def _own_clips(self, count: int, seeds: Sequence[int]) -> Tensor:
        """The model's own clip of each seed, (B, F, 3, S, S) uint8."""
        self.check_tokenizer()
        clips = read_clips(self.folder, self.tokenizer.image_size)
        if clips is None:
            raise SettingError(f"context_frames is {count}, and this model has no clips of its own: give context=")
        if count > clips.shape[1]:
            raise SettingError(
                f"context_frames is {count}, but the model's clips have {clips.shape[1]} frames: give context="
            )
        return clips[[seed % len(clips) for seed in seeds]]

    # ---- memory

    def check_memory(self, batch: int, settings: VideoSettings, conditional: bool) -> None:
        """Raise SettingError where cache, latents and pixels will not fit what is free."""
        parts = self.needed_bytes(batch, settings, conditional)
        needed, free = sum(parts.values()), self._free_bytes()
        if needed > free:
            listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
            raise SettingError(
                f"{batch} videos of {settings.frames} frames need about {needed / GIB:.1f} GiB ({listed}), and "
                f"{free / GIB:.1f} are free: take fewer frames or videos, or a context_window"
            )

    def needed_bytes(self, batch: int, settings: VideoSettings, conditional: bool = False) -> dict[str, int]:
        """Estimated bytes of a run by what they hold."""
        config, frames = self.generator.config, settings.frames
        rows = batch * len(branches(settings, conditional))
        held = frames
        if settings.cached and settings.context_window is not None:
            held = min(frames, settings.context_window + 2)  # with the frame just finished and the one at work
        coarse = config["context_patch_size"]
        at_full = held if coarse is None else min(held, config["window"])
        tokens = at_full * (config["side"] // config["patch_size"]) ** 2
        tokens += (held - at_full) * (config["side"] // (coarse or 1)) ** 2
        # Keys and values of every layer, or one layer at work: queries, keys, values, the stream, an MLP's middle.
        copies = 2 * config["depth"] if settings.cached else 8
        attention = copies * rows * tokens * config["width"] * torch.finfo(self.generator.dtype).bits // 8
        latents = 3 * batch * frames * math.prod(self.latent_shape) * 4
        size = 0 if self.tokenizer is None else self.tokenizer.image_size
        return {"attention": attention, "latents": latents, "pixels": batch * frames * 3 * size**2 * (4 + 4 + 1)}

    def _free_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available

    # ---- saving

    def save_pretrained(self, save_directory: str | os.PathLike, *options: Any, **named: Any) -> None:
        """Write the pipeline as a folder, with the clips it was loaded with."""
        super().save_pretrained(save_directory, *options, **named)
        if self.folder is not None and (clips := self.folder / CONTEXT_FILE).is_file():
            target = os.path.join(save_directory, CONTEXT_FILE)
            if not (os.path.exists(target) and os.path.samefile(clips, target)):
                shutil.copyfile(clips, target)


def _rows(values: Tensor | None) -> int:
    return 1 if values is None else len(values)
