"""What all pipelines share: class labels, seeds, output formats, and the request that repeats a run."""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import secrets
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from vgen import __version__
from vgen.data import to_uint8
from vgen.files import hash_tensors, sha256
from vgen.media import to_pil
from vgen.pipelines.editing import composite, to_mask, to_pixels
from vgen.rng import BatchStream, SampleStreams
from vgen.samplers.logits import read_schedule
from vgen.types import Output, Request, Rng, SettingError, Step

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
GIVEN = ("tokens", "known")  # arguments of the call that are no settings, and that a request holds in full
EDIT = "edit"  # in a request's settings: hashes of the image and the mask of an edit, which it does not hold
SettingsType = TypeVar("SettingsType")
Labels = int | str | Sequence[int | str] | Tensor | np.ndarray | None


class Pipeline(DiffusionPipeline):
    """A tokenizer and a generator with the samplers that join them. Families subclass this.

    Args:
        tokenizer: images to tokens and back, or frames to latents; None gives those only.
        generator: what predicts them.
        id2label: class names by id.
        settings: this model's default sampling settings.
    """

    _optional_components = ["tokenizer"]  # noqa: RUF012
    samplers: tuple[str, ...]  # the default first
    readers: Mapping[str, Sequence[str]] = {}  # samplers that read a setting, where not all do
    makes_videos: bool = False  # whether a call gives `frames` instead of `images`
    source: str = ""  # the name this pipeline was loaded by
    folder: Path | None = None  # where it was loaded from
    files: Sequence[Path] = ()  # its weights there
    decode_batch: int | None = None  # samples that are decoded at a time; None: all of a batch

    def __init__(
        self,
        tokenizer: Any,
        generator: Any,
        id2label: dict[int, str] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, generator=generator)
        names = {str(key): value for key, value in (id2label or {}).items()}
        self.register_to_config(id2label=names, settings=dict(settings or {}))
        if tokenizer is not None:
            tokenizer.to(memory_format=torch.channels_last)
            for name, (ours, theirs) in self.shared_sizes().items():
                if ours != theirs:
                    raise SettingError(f"tokenizer and generator do not fit: {name} is {ours} against {theirs}")
        self.resolve_settings({})  # a model with impossible defaults is refused at once

    # ---- what families provide

    @abstractmethod
    def shared_sizes(self) -> dict[str, tuple[Any, Any]]:
        """By name, what tokenizer and generator must agree on."""

    @abstractmethod
    def stream(self, class_labels: Labels = None, **settings: Any) -> Iterator[Step]:
        """Sample step by step; the same arguments as calling the pipeline, less `output_type`."""

    @abstractmethod
    def decode_floats(self, step: Any) -> Tensor:
        """A Step, or tokens -> images (B, 3, H, W) float32 in [0, 1]."""

    @abstractmethod
    def resolve_settings(self, settings: dict[str, Any], sampler: str | None = None) -> dict[str, Any]:
        """All sampling settings with their defaults filled in. Raises SettingError for one that is out of bounds."""

    @abstractmethod
    def begin_edit(
        self, original: Tensor, painted: Tensor, class_labels: Labels, **settings: Any
    ) -> tuple[Iterator[Step], Rng]:
        """The steps that repaint images (B, 3, S, S) uint8 where `painted` (S, S), and their noise."""

    @property
    @abstractmethod
    def token_pixels(self) -> int:
        """Side of a token in pixels."""

    # ---- calling

    def decode(self, step: Any) -> Tensor:
        """A Step, or tokens -> images (B, 3, H, W) uint8: what previews show and files hold."""
        return to_uint8(self.decode_floats(step))

    def run(self, steps: Iterator[Step], rng: Rng, output_type: str, began: float | None = None) -> Output:
        """Drain `steps` and render the last one. `began` is when the call began, where it did work before these."""
        check_output_type(output_type)
        began = time.monotonic() if began is None else began
        for step in steps:
            last = step
        made = self.latent(last) if output_type == "latent" else self.render(self._decode_parts(last), output_type)
        return Output(
            **{"frames" if self.makes_videos else "images": made},
            tokens=last.tokens,
            evaluations=last.evaluations,
            seconds=time.monotonic() - began,
            seeds=getattr(rng, "seeds", None),
        )

    def _decode_parts(self, step: Step) -> Tensor:
        """`decode_floats`, of `decode_batch` samples at a time: decoders often need more memory than all else."""
        batch, size = len(step.known), self.decode_batch
        if size is None or size >= batch:
            return self.decode_floats(step)
        parts = [self.decode_floats(rows_of(step, slice(start, start + size))) for start in range(0, batch, size)]
        return torch.cat(parts)

    def latent(self, step: Step) -> Any:
        """What output_type "latent" gives."""
        return step.latent

    @staticmethod
    def render(images: Tensor, output_type: str) -> Any:
        """Images (B, 3, H, W) in [0, 1] -> "pil", which alone rounds to 256 levels, "pt" or "np"."""
        if output_type == "pil":
            return to_pil(to_uint8(images))
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

    # ---- editing

    @torch.no_grad()
    def edit(
        self, image: Any, mask: Any, class_labels: Labels = None, *, output_type: str = "pil", **settings: Any
    ) -> Output:
        """Repaint the masked part of an image: in-painting, out-painting, or a change of class inside the mask.

        Tokens none of whose pixels are painted are kept: dictated at every scale against what has been generated so
        far (next scale), or given from the start (masked families). Pixels outside the mask come back exactly; the
        seam is feathered inside it over half a token.

        Args:
            image: a PIL image, an (S, S, 3) array or a (B, 3, S, S) or (3, S, S) tensor; floats in [0, 1], or uint8.
            mask: (S, S) in any of these forms: nonzero (white) is repainted, zero is kept.
            class_labels: what to paint; None paints without a class.
            settings: those of the call. One image with several seeds or labels gives as many versions.
        """
        check_output_type(output_type)
        if output_type == "latent":
            raise SettingError("edit composites pixels: output_type must be 'pil', 'np' or 'pt'")
        original, painted = self._to_edit(image, mask)
        steps, rng = self.begin_edit(original, painted, class_labels, **settings)
        output = self.run(steps, rng, "pt")
        blended = self._blend(original, painted, to_uint8(output.images))
        return dataclasses.replace(output, images=self.render(blended / 255, output_type))

    @torch.no_grad()
    def stream_edit(self, image: Any, mask: Any, class_labels: Labels = None, **settings: Any) -> Iterator[Step]:
        """The steps of `edit`, before compositing, which `blend_edit` does."""
        return self.begin_edit(*self._to_edit(image, mask), class_labels, **settings)[0]

    def blend_edit(self, image: Any, mask: Any, step: Step) -> Tensor:
        """A step of `stream_edit` as `edit` shows it, (B, 3, S, S) uint8: what is not masked is the image's own."""
        return self._blend(*self._to_edit(image, mask), self.decode(step))

    def _blend(self, original: Tensor, painted: Tensor, generated: Tensor) -> Tensor:
        seam, device = self.token_pixels // 2, generated.device
        return composite(original.to(device), generated, painted.to(device), seam)

    def _to_edit(self, image: Any, mask: Any) -> tuple[Tensor, Tensor]:
        """An image (B, 3, S, S) uint8 and what is painted over (S, S) bool."""
        self.check_tokenizer()
        return to_pixels(image, self.tokenizer.image_size), to_mask(mask, self.tokenizer.image_size)

    @torch.no_grad()
    def without_gradients(self, steps: Iterator[Step]) -> Iterator[Step]:
        yield from steps

    # ---- inputs

    def inputs(
        self, class_labels: Labels, seeds: Sequence[int] | int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Rng]:
        """Class ids (B,), null class where unconditional, and the batch's noise.

        A single label serves all seeds. Without `seeds` or `generator` every sample gets a random seed.
        """
        class_labels = _plain(class_labels)
        ids = self.label_ids(class_labels)
        seeds = _plain(seeds)
        seeds = [seeds] if isinstance(seeds, (int, float)) else seeds
        if generator is not None and not isinstance(generator, torch.Generator):
            raise SettingError(f"generator is a {type(generator).__name__}: give a torch.Generator, or use seeds=")
        if seeds is not None and generator is not None:
            raise SettingError("seeds and generator were both given: give one (seeds: one stream per sample)")
        if ids is not None and seeds is not None and len(seeds) != len(ids):
            if isinstance(class_labels, (int, str)):
                ids = ids * len(seeds)
            else:
                raise SettingError(f"{len(ids)} class labels but {len(seeds)} seeds: give one seed per image")
        batch = len(ids) if ids is not None else len(seeds) if seeds is not None else 1
        if batch == 0:
            raise SettingError("nothing to sample: class_labels and seeds are empty")
        labels = self.label_tensor(ids, batch)
        if generator is not None:
            return labels, BatchStream(generator, batch, self.device)
        return labels, SampleStreams(seeds or [secrets.randbits(32) for _ in range(batch)], self.device)

    def save_pretrained(self, save_directory: str | os.PathLike, *options: Any, **named: Any) -> None:
        """Write the pipeline as a folder of safetensors and JSON, for `vgen.load`; see diffusers for the options."""
        super().save_pretrained(save_directory, *options, **named)
        for config in Path(save_directory).glob("*/config.json"):
            values = json.loads(config.read_text())
            if values.pop("_name_or_path", None):  # where it was loaded from is nobody else's business
                config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    # ---- classes

    @property
    def null_class(self) -> int:
        """The class id of unconditional rows, one past the last class."""
        return self.generator.null_class

    @property
    def class_names(self) -> list[str]:
        """Names by class id; the ids themselves where the model has no names."""
        names = {int(key): value for key, value in (self.config.get("id2label") or {}).items()}
        return [names.get(index, str(index)) for index in range(self.null_class)]

    def label_ids(self, class_labels: Labels) -> list[int] | None:
        """Ids or names -> ids. Raises SettingError naming the range or the nearest names."""
        if class_labels is None:
            return None
        class_labels = _plain(class_labels)
        labels = [class_labels] if isinstance(class_labels, (int, str)) else class_labels
        return [self._label_id(label) for label in labels]

    def row_labels(self, class_labels: Labels, rows: int) -> Tensor:
        """Class ids (B,) for so many rows of tokens. Raises SettingError where there is not one for each."""
        labels = self.label_tensor(self.label_ids(class_labels), rows)
        if len(labels) != rows:
            raise SettingError(f"{len(labels)} class labels for {rows} rows of tokens: give one per row")
        return labels

    def label_tensor(self, ids: list[int] | None, batch: int) -> Tensor:
        """Class ids (B,) on the pipeline's device, the null class for None."""
        return torch.tensor([self.null_class] * batch if ids is None else ids, device=self.device)

    def _label_id(self, label: int | str) -> int:
        last = self.null_class - 1
        if last < 0:
            raise SettingError(f"this model is unconditional, it has no class {label!r}: leave class_labels out")
        if isinstance(label, str):
            wanted = label.strip().lower()
            names = {name.lower(): index for index, name in reversed(list(enumerate(self.class_names)))}
            # "tench" finds "tench, Tinca tinca"
            names |= {part.strip(): index for name, index in names.items() for part in name.split(",")} | names
            if wanted in names:
                return names[wanted]
            if not re.fullmatch("-?[0-9]+", wanted):
                near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}?" if near else f"classes: {', '.join(self.class_names[:20])}"
                raise SettingError(f"unknown class {label!r}: {hint}")
            label = int(wanted)
        if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label <= last:
            raise SettingError(f"class {label} is outside 0..{last}")
        return int(label)

    # ---- requests

    def request(
        self, class_labels: Labels, seeds: Sequence[int], sampler: str | None, settings: dict[str, Any]
    ) -> Request:
        """The request that repeats a call with these arguments, defaults spelt out and given tokens as lists."""
        ids = self.label_ids(class_labels)
        given = {name: _nested(settings[name]) for name in GIVEN if settings.get(name) is not None}
        settings = {name: value for name, value in settings.items() if name not in GIVEN}
        return Request(
            model=self.source,
            class_labels=ids,
            seeds=list(seeds),
            sampler=self.resolve_sampler(sampler),
            settings=self.resolve_settings(settings, sampler) | given,
            vgen=__version__,
            checkpoint=self.checkpoint(),
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
        )

    def resolve_sampler(self, sampler: str | None) -> str:
        """A sampler's name, the default for None. Raises SettingError for one that this family does not have."""
        if sampler not in (None, *self.samplers):
            raise SettingError(f"unknown sampler {sampler!r}: use one of {', '.join(self.samplers)}")
        return sampler or self.samplers[0]

    def checkpoint(self) -> str:
        """Hash of the weights: of the files where the pipeline was loaded from a folder, else of the tensors."""
        if not hasattr(self, "_checkpoint"):
            self._checkpoint = sha256(*self.files) if self.files else self._hash_tensors()
        return self._checkpoint

    def _hash_tensors(self) -> str:
        digest = hashlib.sha256()
        for module in (self.tokenizer, self.generator):
            hash_tensors(digest, module.state_dict() if module is not None else {})
        return digest.hexdigest()

    def check_tokenizer(self) -> None:
        """Raise SettingError where this pipeline was built without its tokenizer."""
        if self.tokenizer is None:
            raise SettingError("this pipeline has no tokenizer, which this needs: convert it again with tokenizer=")


def rows_of(step: Step, rows: slice) -> Step:
    """A step of some of its samples alone."""

    def take(values: Any) -> Any:
        return [part[rows] for part in values] if isinstance(values, list) else values[rows]

    kept = {name: getattr(step, name) for name in ("tokens", "known", "latent", "evaluated", "time")}
    taken = {name: take(values) for name, values in kept.items() if values is not None}
    return dataclasses.replace(step, **taken, wave=None)


def check_output_type(output_type: str) -> None:
    """Raise SettingError where a pipeline cannot return its images so."""
    if output_type not in OUTPUT_TYPES:
        raise SettingError(f"output_type is {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}")


def build_settings(
    kind: type[SettingsType],
    given: dict[str, Any],
    bounds: dict[str, tuple[float, float]],
    choices: Mapping[str, Sequence[str]],
) -> SettingsType:
    """Sampling settings of a dataclass by keyword, each of its own type and within its bounds.

    `bounds` are of numbers, `choices` of strings; what may be None by its default may be given as None.
    Raises SettingError naming the value and the bounds.
    """
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = dict(given)
    if EDIT in given:
        raise SettingError(
            "this request is of an edit, and the image and the mask are not part of it: open them in the studio's Edit "
            "tab, or give them to the pipeline's edit()"
        )
    if unknown := [name for name in given if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}"
        raise SettingError(f"unknown setting {unknown[0]!r}: {hint}")
    for name, value in given.items():
        default = known[name].default
        if value is None and default is None:
            continue
        if name == "guidance_schedule":
            given[name] = read_schedule(value)
        elif name in choices:
            if value not in choices[name]:
                listed = " or ".join(repr(choice) for choice in choices[name])
                raise SettingError(f"{name} is {value!r}: use {listed}")
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                raise SettingError(f"{name} is {value!r}: it must be True or False")
        else:
            low, high = bounds[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise SettingError(f"{name} is {value!r}: it must lie in {low}..{high}")
            if isinstance(low, int) and not isinstance(value, int):
                raise SettingError(f"{name} is {value!r}: it must be a whole number")
    return kind(**given)


def check_readers(chosen: Any, sampler: str, readers: Mapping[str, Sequence[str]]) -> None:
    """Raise SettingError where a setting is not its default and `sampler` is none of those that read it."""
    defaults = {item.name: item.default for item in dataclasses.fields(chosen)}
    for name, samplers in readers.items():
        if sampler not in samplers and getattr(chosen, name) != defaults[name]:
            raise SettingError(f"{name} is of no effect with sampler {sampler!r}: it is read by {', '.join(samplers)}")


def as_tensor(name: str, values: Any, device: torch.device) -> Tensor:
    """A tensor, array or list as a tensor. Raises SettingError for anything else."""
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"{name} is no tensor, array or list of numbers: {str(error).splitlines()[0]}") from error


def _nested(values: Any) -> Any:
    """Arrays, or lists of them, as nested lists."""
    return [_nested(item) for item in values] if isinstance(values, (list, tuple)) else _plain(values)


def _plain(values: Any) -> Any:
    """Tensors, arrays and their scalars as Python numbers and lists."""
    return values.tolist() if hasattr(values, "tolist") else values
