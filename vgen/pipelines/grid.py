"""What the pipelines that reveal a grid of tokens share, whether tokens are codes or vectors."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vgen.data import to_model_range, to_unit_range
from vgen.pipelines.base import Labels, Pipeline
from vgen.pipelines.editing import touched_tokens
from vgen.pipelines.given import check_both, check_codes, check_given, check_left
from vgen.types import Output, Rng, SettingError, Step


class GridPipeline(Pipeline):
    """A tokenizer of one grid of tokens and a generator that reveals them. Families subclass this.

    Args:
        tokenizer: images to tokens and back; None gives tokens only.
        generator: what predicts the masked ones.
        id2label: class names by id.
        settings: this model's default sampling settings.
    """

    # ---- what families provide

    @abstractmethod
    def chosen_settings(self, settings: dict[str, Any], sampler: str | None) -> Any:
        """The model's defaults and the settings given, checked: a dataclass. Raises SettingError."""

    @abstractmethod
    def given_tokens(self, tokens: Any, known: Any, batch: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, ...), whatever serves as masked where they are not known, and which are, (B, N) bool."""

    @abstractmethod
    def steps(
        self, labels: Tensor, rng: Rng, tokens: Tensor, known: Tensor, sampler: str, settings: Any
    ) -> Iterator[Step]:
        """The steps of a run, all arguments checked."""

    # ---- calling

    def sample(self, class_labels: Labels, output_type: str, settings: dict[str, Any]) -> Output:
        """The call of every family."""
        if output_type != "latent":
            self.check_tokenizer()
        steps, rng = self.begin(class_labels, **settings)
        return self.run(steps, rng, output_type)

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
        tokens: Any = None,
        known: Any = None,
        **settings: Any,
    ) -> tuple[Iterator[Step], Rng]:
        """The steps of a call and their noise."""
        chosen, name = self.chosen_settings(settings, sampler), self.resolve_sampler(sampler)
        labels, rng = self.inputs(class_labels, seeds, generator)
        given, kept = self.given_tokens(tokens, known, len(labels))
        return self.without_gradients(self.steps(labels, rng, given, kept, name, chosen)), rng

    def resolve_settings(self, settings: dict[str, Any], sampler: str | None = None) -> dict[str, Any]:
        return dataclasses.asdict(self.chosen_settings(settings, sampler))

    def begin_edit(
        self, original: Tensor, painted: Tensor, class_labels: Labels, **settings: Any
    ) -> tuple[Iterator[Step], Rng]:
        """A token is repainted when any of its pixels is."""
        touched = touched_tokens(painted, self.token_pixels).flatten()
        if bool(touched.all()):
            return self.begin(class_labels, **settings)
        tokens = self.tokenizer.encode(to_model_range(original))
        return self.begin(class_labels, tokens=tokens, known=~touched, **settings)

    @property
    def token_pixels(self) -> int:
        return self.tokenizer.image_size // self.tokenizer.side

    def both_given(self, tokens: Any, known: Any, batch: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Tokens (B, *shape) and what is known of them (B, N) bool, of the right shapes. Raises SettingError."""
        check_both(tokens, known)
        given, kept = check_given(tokens, known, batch, shape, self.device)
        check_left(kept)
        return given, kept


class CodePipeline(GridPipeline):
    """A grid of codes, `generator.mask_token_id` standing where one is not known yet."""

    def shared_sizes(self) -> dict[str, tuple[Any, Any]]:
        config, tokenizer = self.generator.config, self.tokenizer
        return {
            "vocab_size": (tokenizer.config["vocab_size"], config["vocab_size"]),
            "number of tokens": (tokenizer.num_tokens, config["num_tokens"]),
        }

    # ---- given tokens

    def given_tokens(self, tokens: Any, known: Any, batch: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) with the mask's id where they are not known, and which are known, (B, N) bool."""
        number, mask = self.generator.config["num_tokens"], self.generator.mask_token_id
        if tokens is None and known is None:
            given = torch.full((batch, number), mask, device=self.device)
            return given, given != mask
        given, kept = self.both_given(tokens, known, batch, (number,))
        given = check_codes(given, kept, mask)
        return given.masked_fill(~kept, mask), kept

    # ---- looking at tokens

    @torch.no_grad()
    def decode_floats(self, step: Step | Tensor) -> Tensor:
        """A Step, or tokens (B, N) -> images (B, 3, S, S) float32 in [0, 1]; masked tokens as the codes' mean."""
        self.check_tokenizer()
        return to_unit_range(self.tokenizer.decode_latent(self.latent(step)))

    def latent(self, step: Step | Tensor) -> Tensor:
        """Code vectors (B, C, h, w) of a Step or of tokens; the tokens themselves where there is no tokenizer."""
        tokens = step.tokens if isinstance(step, Step) else step
        if self.tokenizer is None:
            return tokens
        masked = tokens == self.generator.mask_token_id
        vectors = self.tokenizer.latent(tokens.masked_fill(masked, 0))
        mean = self.tokenizer.codebook.weight.float().mean(0)[None, :, None, None]
        return torch.where(masked.view(len(tokens), 1, *vectors.shape[2:]), mean, vectors)


def check_recap(full_steps: int, partial_steps: int, steps: int) -> None:
    """Raise SettingError where ReCAP's whole or partial evaluations do not fit a run of `steps`."""
    if full_steps > steps:
        raise SettingError(f"full_steps is {full_steps}: it must lie in 0..{steps}, the number of steps")
    if partial_steps >= steps and partial_steps:
        raise SettingError(
            f"partial_steps is {partial_steps}: it must lie in 0..{steps - 1}, below the number of steps"
        )
