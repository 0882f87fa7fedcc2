"""The nouns that every floor shares: Step, Output, Request, and the Protocols samplers are written against.

Knows no model, no file format and no user interface.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from torch import Tensor

MAX_REQUEST_CHARACTERS = 1_000_000


class SettingError(ValueError):
    """A request or configuration that cannot be carried out as written (exit code 2)."""


class CheckpointError(RuntimeError):
    """A model file that is corrupt, incomplete or of another kind than was asked for (exit code 1)."""


class ModelWarning(UserWarning):
    """Something about a model that its user should know, and that stops nothing."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is known after one model evaluation. Any step can be decoded to an image."""

    index: int  # counts from 0
    total: int  # of a wave, whose length depends on its luck, the least possible from here
    tokens: Any  # next scale: list over scales of (B, n_k) int64; masked: (B, N) int64, or latents (B, N, C) for MAR;
    #              next frame: latents (B, F, C, H, W), each frame at its noise level of `time`
    known: Tensor  # (B, L) bool over all positions of the finished sample, in sampling order; next frame: (B, F)
    evaluations: int  # model evaluations so far; guidance's second branch is part of the same one
    latent: Tensor | None = None  # what the tokenizer decodes, where tokens alone do not determine it
    evaluated: Tensor | None = None  # masked families: (B, L) bool, positions evaluated in this step; None: all
    time: Tensor | None = None  # masked diffusion: (B,) diffusion time after this step, from 1 down to 0;
    #                             next frame: (B, F) noise level sigma of each frame, likewise
    wave: "Wave | None" = None  # recurrent depth


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Where a recurrent-depth generator is at work, and what that has cost."""

    depths: Tensor  # (B, N) int64: recurrences that each token has had
    drafts: Tensor  # (B, N) int64: guesses at tokens that are not known yet, -1 where there is none
    passes: int  # runs of the core so far, one after the other; each may be of many tokens
    work: int  # tokens that these runs were of, summed over rows
    restarts: int = 0  # tokens whose work was lost, an earlier guess having been wrong


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a pipeline returns for a batch of B samples: images, or the frames of videos."""

    images: Any = None  # list of PIL images, (B, H, W, 3) array or (B, 3, H, W) tensor in [0, 1]; latents for "latent"
    frames: Any = None  # videos: list of lists of PIL images, (B, F, H, W, 3) or (B, F, 3, H, W); images is None then
    tokens: Any  # as in Step
    evaluations: int
    seconds: float  # wall clock, decoding included
    seeds: list[int] | None  # one per sample, also where they were chosen at random; None with a torch.Generator


@dataclass(frozen=True, kw_only=True)
class Request:
    """The one serialisable description of a run: built by flags or forms, embedded in files, read back."""

    model: str
    class_labels: list[int] | None = None  # None: unconditional
    seeds: list[int]
    sampler: str | None = None  # None: the family's default
    settings: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the pipeline's call
    vgen: str = ""  # version that made it
    checkpoint: str = ""  # sha256 over the model's weights
    dtype: str = "float32"
    device: str = "cpu"
    origin: str = ""  # what a person should know of where it came from; changes nothing

    def __post_init__(self) -> None:
        if not self.seeds:
            raise SettingError("a request without seeds makes no image: give at least one")
        if self.class_labels is not None and len(self.class_labels) != len(self.seeds):
            raise SettingError(
                f"{len(self.class_labels)} class labels but {len(self.seeds)} seeds: give one seed per image"
            )

    def row(self, index: int) -> "Request":
        """The request that makes sample `index` of this one alone."""
        labels = None if self.class_labels is None else [self.class_labels[index]]
        settings, actions = self.settings, self.settings.get("actions")
        if isinstance(actions, list) and actions and isinstance(actions[0], list):  # videos: of each sample its own
            settings = settings | {"actions": actions[index]}
        return replace(self, class_labels=labels, seeds=[self.seeds[index]], settings=settings)

    def to_json(self) -> str:
        """One line of JSON, its keys in order, that `from_json` reads back."""
        values = asdict(self)
        return json.dumps({name: value for name, value in values.items() if name != "origin" or value}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Request":
        """Parse what `to_json` wrote; keys of later versions are ignored. Raises SettingError for anything else."""
        if len(text) > MAX_REQUEST_CHARACTERS:
            raise SettingError(f"a request of {len(text)} characters is over the limit of {MAX_REQUEST_CHARACTERS}")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SettingError(f"not a vgen request: {error}") from error
        if not isinstance(values, dict):
            raise SettingError("not a vgen request: expected a JSON object")
        kept = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        _check_types(kept)
        return cls(**kept)


def _check_types(values: dict[str, Any]) -> None:
    """Requests come out of files that anybody may have written."""

    def integers(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)

    def text(value: Any) -> bool:
        return isinstance(value, str)

    expected: dict[str, tuple[Callable[[Any], bool], str]] = {
        "model": (text, "a string"),
        "class_labels": (lambda value: value is None or integers(value), "a list of integers or null"),
        "seeds": (integers, "a list of integers"),
        "sampler": (lambda value: value is None or text(value), "a string or null"),
        "settings": (lambda value: isinstance(value, dict), "an object"),
        **dict.fromkeys(("vgen", "checkpoint", "dtype", "device", "origin"), (text, "a string")),
    }
    for name in ("model", "seeds"):
        if name not in values:
            raise SettingError(f"not a vgen request: {name} is missing")
    for name, value in values.items():
        accepts, kind = expected[name]
        if not accepts(value):
            raise SettingError(f"not a vgen request: {name} must be {kind}")


class Rng(Protocol):
    """A source of noise for a batch of B samples."""

    def exponential(self, shape: Sequence[int], key: int) -> Tensor:
        """Standard exponential noise (B, *shape), float32; `key` names the draw within a run.

        A longer draw of the same key begins with the shorter one: rows need not agree on a length.
        """
        ...

    def normal(self, shape: Sequence[int], key: int) -> Tensor:
        """Standard normal noise (B, *shape), float32, likewise."""
        ...


class NextScaleTokenizer(Protocol):
    """What next-scale sampling asks of a tokenizer. A latent is the (B, C, H, W) sum decoded so far."""

    scales: tuple[int, ...]

    def new_latent(self, batch: int) -> Tensor:
        """The latent before the first scale: zeros (B, C, H, W)."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Code vectors (B, n, C) of tokens (B, n)."""
        ...

    @property
    def code_vectors(self) -> Tensor:
        """All code vectors (V, C)."""
        ...

    def add_scale(self, latent: Tensor, codes: Tensor, scale: int) -> Tensor:
        """The latent after adding scale number `scale`, given its code vectors (B, n_k, C)."""
        ...

    def read_scale(self, latent: Tensor, scale: int) -> Tensor:
        """What the generator reads before predicting scale number `scale`: (B, n_k, C)."""
        ...


class NextScaleGenerator(Protocol):
    """What next-scale sampling asks of a generator."""

    def condition(self, class_labels: Tensor) -> Any:
        """Everything that depends on the class alone, computed once per call; class_labels (B,)."""
        ...

    def new_cache(self, batch: int) -> Any:
        """Preallocated state for one call over `batch` rows."""
        ...

    def __call__(self, context: Tensor, condition: Any, cache: Any) -> Tensor:
        """Logits (B, n_k, V) float32 of the next scale, given what `read_scale` returned (B, n_k, C)."""
        ...


class MaskedGenerator(Protocol):
    """What the samplers of masked tokens ask of a generator."""

    def new_cache(self, batch: int) -> Any:
        """Preallocated keys and values for evaluations of `batch` rows."""
        ...

    def __call__(
        self, tokens: Tensor, class_labels: Tensor, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """Logits (B, n, V) float32 of tokens (B, n), masked ones included, at `positions` (B, n), all for None."""
        ...


class RasterGenerator(Protocol):
    """What raster samplers ask of a generator with a loop: position 0 holds the class, or the first word, and what is
    read at a position are the logits of the next token."""

    @property
    def config(self) -> Any:
        """With `num_tokens`, `vocab_size`, `width`, and `num_classes`, None where position 0 holds a token."""
        ...

    def prompt(self, class_labels: Tensor) -> Tensor:
        """Ids (B, 1) that stand for classes (B,) at position 0."""
        ...

    def new_cache(self, batch: int, recurrences: int) -> Any:
        """Preallocated keys and values of `batch` rows, of so many recurrences."""
        ...

    def scaled_state(self, uniform: Tensor) -> Tensor:
        """States (..., D) that the loop begins with, from numbers uniform in [0, 1]."""
        ...

    def embed(self, tokens: Tensor, places: Any, cache: Any) -> Tensor:
        """What the loop is given at every recurrence, (B, n, D), of tokens (B, n) at `cache.places(positions)`."""
        ...

    def recur(self, state: Tensor, embedded: Tensor, places: Any, cache: Any, depths: Any) -> Tensor:
        """One recurrence: (B, n, D) x 2 -> (B, n, D), of tokens that have had `cache.depths(numbers)` before it."""
        ...

    def read(self, state: Tensor, places: Any, cache: Any) -> Tensor:
        """Logits (B, n, V) of the tokens that follow."""
        ...


class FrameCache(Protocol):
    """Keys and values of the frames that a video generator has seen in their final form."""

    def first_needed(self, frame: int) -> int:
        """Number of the first frame that must be evaluated along with `frame`, those before it being finished;
        `frame` itself where all of them are held."""
        ...


class VideoGenerator(Protocol):
    """What next-frame sampling asks of a generator: frame k sees frames up to k, each at a noise level of its own."""

    @property
    def config(self) -> Any:
        """With `context_patch_size`: None, or a number where frames beyond a window are seen more coarsely; such a
        generator takes one noisy frame at a time with a cache."""
        ...

    def new_cache(self, batch: int, frames: int, attend_last: int | None = None) -> Any:
        """A FrameCache for videos of `frames` frames, `batch` rows."""
        ...

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        class_labels: Tensor | None = None,
        actions: Tensor | None = None,
        cache: Any = None,
        start: int = 0,
        keep: int = 0,
        attend_last: int | None = None,
        slope: float | None = None,
    ) -> Tensor:
        """Velocities (B, F, C, H, W) of latents (B, F, C, H, W) at timesteps (B, F): 1000 sigma, or -1 for a frame
        that is clean.

        Args:
            class_labels: (B,); actions: (B, F); None is the null class for all.
            cache, start, keep: the frames are numbers `start`.. of the video, all before them are in the cache, which
                takes up the first `keep` of these.
            attend_last: frame i sees frames i - attend_last..i alone.
            slope: temporal decay of attention; None is the model's own.
        """
        ...
