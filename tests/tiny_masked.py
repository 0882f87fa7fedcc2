"""Tiny masked models: a random pipeline, and a generator that is a table, whose samples have laws in closed form."""

import math
from typing import Any

import torch
from tiny_models import CLASS_NAMES, randomise
from torch import Tensor, nn

from vgen.generators.masked import MaskedTransformer
from vgen.pipelines.masked import MaskedPipeline
from vgen.tokenizers.vqgan import VQGAN
from vgen.types import Step

TOKENS, CODES = 16, 12
LOOP_SAMPLERS = ("maskgit", "halton", "random", "first-hitting", "ancestral")  # those that run `unmask`
SAMPLERS = MaskedPipeline.samplers


def tiny_tokenizer(**changes: Any) -> VQGAN:
    """8 x 8 images, 4 x 4 tokens of 12 codes."""
    config: dict[str, Any] = {
        "side": 4,
        "vocab_size": CODES,
        "code_dim": 4,
        "base_channels": 8,
        "channel_multipliers": (1, 2),
        "blocks": 1,
        "norm_groups": 4,
    }
    return randomise(VQGAN(**config | changes))  # type: ignore[return-value]


def tiny_generator(**changes: Any) -> MaskedTransformer:
    """Three blocks of width 16 for `tiny_tokenizer`, three classes."""
    config: dict[str, Any] = {"num_tokens": TOKENS, "vocab_size": CODES, "num_classes": 3}
    config |= {"width": 16, "depth": 3, "heads": 2}
    return randomise(MaskedTransformer(**config | changes))  # type: ignore[return-value]


def tiny_pipeline(tokenizer: Any = None, generator: Any = None, **settings: Any) -> MaskedPipeline:
    """A pipeline of the two; the generator in double precision, so that no rounding tells one batch from another."""
    generator = tiny_generator().double() if generator is None else generator
    pipeline = MaskedPipeline(tokenizer or tiny_tokenizer(), generator, id2label=CLASS_NAMES, settings=settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: MaskedPipeline, labels: Any, seeds: Any, **settings: Any) -> Step:
    """The last step."""
    *_, last = pipeline.stream(labels, seeds=seeds, **settings)
    return last


def random_tokens(batch: int, seed: int = 0) -> Tensor:
    """Uniform tokens (batch, 16) of `tiny_tokenizer`."""
    return torch.randint(CODES, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def known_masks(*sizes: int, seed: int = 0) -> Tensor:
    """As many known positions in each row as asked, at random: (B, 16) bool."""
    order = torch.rand(len(sizes), TOKENS, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order < torch.tensor(sizes)[:, None]


class Evaluated:
    """Notes what a generator was asked: rows, tokens per row and whether the evaluation was partial."""

    def __init__(self, generator: nn.Module) -> None:
        self.calls: list[tuple[int, int, bool]] = []
        self.hook = generator.register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, given: tuple) -> None:
        self.calls.append((*given[0].shape, given[2] is not None))

    @property
    def queries(self) -> int:
        """Tokens that were evaluated, per row, the class token each time among them."""
        return sum(count + 1 for _, count, _ in self.calls)


class Table(nn.Module):
    """A generator that is a table of distributions: probabilities ((V + 1)^N, N, V), by what is known.

    State s has token floor(s / (V + 1)^i) mod (V + 1) at position i, V for a masked one. A table of one state serves
    all. Partial evaluations are ideal: they know what changed everywhere.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        states, number, codes = probabilities.shape
        self.probabilities, self.mask_token_id, self.null_class = probabilities, codes, 1
        self.config = {"num_tokens": number, "vocab_size": codes}
        self.radix = (codes + 1) ** torch.arange(number) if states > 1 else torch.zeros(number, dtype=torch.int64)

    def new_cache(self, batch: int) -> dict[str, Tensor]:
        return {}

    def forward(self, tokens: Tensor, class_labels: Tensor, positions: Any = None, cache: Any = None) -> Tensor:
        if positions is not None:
            tokens = cache["tokens"].scatter(1, positions, tokens)
        if cache is not None:
            cache["tokens"] = tokens
        logits = self.probabilities[(tokens * self.radix).sum(1)].log().float()
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[2]))


def dirichlet_table(number: int, codes: int, seed: int = 0) -> Tensor:
    """Dirichlet(1/2) distributions for every state and position: ((V + 1)^N, N, V) float64."""
    rng = torch.Generator().manual_seed(seed)
    normal = torch.randn((codes + 1) ** number, number, codes, generator=rng, dtype=torch.float64)
    gamma = normal.square() + 1e-9  # the square of a normal number is Gamma(1/2), up to its scale
    return gamma / gamma.sum(-1, keepdim=True)


def table_pipeline(probabilities: Tensor) -> MaskedPipeline:
    """Samples of a table, without a tokenizer, guidance or more than one class."""
    pipeline = MaskedPipeline(None, Table(probabilities), settings={"guidance_scale": 1.0})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def many(pipeline: MaskedPipeline, batch: int, seed: int = 0, **settings: Any) -> list[Step]:
    """The steps of a large batch, drawn from one generator, which is far quicker than a stream per sample."""
    rng = torch.Generator().manual_seed(seed)
    return list(pipeline.stream([0] * batch, generator=rng, **settings))


# ---- statistics

P_BOUND = 1e-3
KS_BOUND = 1.95  # exceeded with probability 1e-3


def p_value(statistic: float, freedom: int) -> float:
    """Of a chi-square statistic."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def goodness(counts: Tensor, law: Tensor) -> float:
    """p-value of Pearson's test; outcomes expected less than five times are taken together."""
    expected = law.double() * counts.sum()
    rare = expected < 5
    groups = [expected[~rare], expected[rare].sum()[None]], [counts[~rare].double(), counts[rare].sum()[None].double()]
    wanted, found = (torch.cat(group) for group in groups)
    wanted, found = (item[wanted > 0] for item in (wanted, found))
    return p_value(float(((found - wanted).square() / wanted).sum()), len(wanted) - 1)


def kolmogorov_smirnov(uniform: Tensor) -> float:
    """sqrt(n) times the largest distance from the uniform distribution."""
    ranked = uniform.double().flatten().sort().values
    steps = torch.arange(len(ranked) + 1) / len(ranked)
    return float(torch.maximum((ranked - steps[:-1]).abs(), (ranked - steps[1:]).abs()).max()) * math.sqrt(len(ranked))
