"""Training a recurrent-depth generator: next tokens after a random number of recurrences (2502.05171).

How often the loop runs is drawn anew at every step, and only the last recurrences are differentiated. What helps the
loop come to rest, and early states to be legible, is switched by the `loop` settings; figures of how well it does, the
gates of vgen.pipelines.raster, are measured along with the loss.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.generators.recurrent import RecurrentTransformer
from vgen.pipelines.raster import RasterPipeline
from vgen.samplers.raster import relative_change
from vgen.tokenizers.vqgan import VQGAN
from vgen.training.config import TrainingConfig, read_part
from vgen.training.generators import GeneratorTask, cross_entropy
from vgen.types import SettingError

DEPTH_SIGMA = 0.5  # of the logarithm of the mean number of recurrences
SHALLOW_DEPTHS = 4  # a quarter of the recurrences is what "shallow" measures


@dataclass(frozen=True, kw_only=True)
class LoopTraining:
    """How the loop is trained: a run's `loop` settings. Probabilities are of a step."""

    backprop_depth: int = 4  # recurrences that are differentiated, the last ones
    shallow_weight: float = 0.25  # of the loss of a readout after fewer recurrences, any number of them
    shallow_share: float = 0.5  # probability that there is one
    lag_share: float = 0.25  # probability that later tokens are behind in the recurrences that are not differentiated
    noise_share: float = 0.25  # probability that new noise is mixed into states
    noise: float = 0.2  # the most of it
    rest_weight: float = 0.0  # of the relative change of states in the last recurrence

    def __post_init__(self) -> None:
        if self.backprop_depth < 1:
            raise SettingError(f"loop.backprop_depth is {self.backprop_depth}: it must be at least 1")
        for name in ("shallow_share", "lag_share", "noise_share", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"loop.{name} is {getattr(self, name)}: it must lie in 0..1")
        for name in ("shallow_weight", "rest_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"loop.{name} is {getattr(self, name)}: it must be at least 0, and finite")


def draw_depth(mean: float, rng: torch.Generator) -> int:
    """A number of recurrences, at least 1: Poisson about a log-normal mean, heavy to the right; on average mean + 1."""
    tau = math.log(mean) - DEPTH_SIGMA**2 / 2 + DEPTH_SIGMA * float(torch.randn((), generator=rng))
    return int(torch.poisson(torch.tensor(math.exp(tau)), generator=rng)) + 1


class RecurrentTask(GeneratorTask):
    """A recurrent-depth transformer and the grids of tokens it learns from."""

    model_class = RecurrentTransformer
    tokenizer_class = VQGAN
    held_out = 500  # at five depths

    def __init__(self, config: TrainingConfig) -> None:
        self.loop = LoopTraining(**read_part(config.loop, LoopTraining, "loop"))
        self.gates: dict[str, float] = {}
        super().__init__(config)
        self.pipeline()  # wrong `sample_settings` show before the first step, not after the last

    def decided(self) -> dict[str, Any]:
        side = self.tokenizer.side
        return {"num_tokens": side * side, "grid": side, "vocab_size": self.tokenizer.config["vocab_size"]}

    # ---- training

    def training_loss(
        self, model: nn.Module, tokens: Tensor, labels: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loop, inputs = self.loop, self.model.inputs(tokens, labels)
        depth = draw_depth(self.model.config["recurrences"], rng)
        learnt = min(loop.backprop_depth, depth)
        chances = torch.rand(3, generator=rng)
        state = self.model.random_state(*inputs.shape, rng).to(inputs.device)
        state = self._advance(state, inputs, depth - learnt, bool(chances[0] < loop.lag_share), rng)
        if chances[1] < loop.noise_share:
            share = loop.noise * torch.rand(len(inputs), 1, 1, generator=rng).to(state)
            state = torch.lerp(state, self.model.random_state(*inputs.shape, rng).to(state), share)
        shallow = 0  # recurrences before the early readout, where there is one
        if chances[2] < loop.shallow_share and depth > 1:
            shallow = int(torch.randint(1, depth, (), generator=rng))
        on_the_way = shallow - (depth - learnt)
        found = model(inputs, state, learnt, on_the_way if on_the_way > 0 else None)
        loss = cross_entropy(found.logits, tokens).mean()
        figures = {"depth": torch.tensor(float(depth))}
        if shallow:
            early = found.early if on_the_way > 0 else self._after(model, inputs, shallow, rng)
            loss = loss + loop.shallow_weight * cross_entropy(early, tokens).mean()
        if loop.rest_weight:
            loss = loss + loop.rest_weight * relative_change(found.state, found.before).square().mean()
        return loss, figures

    def _after(self, model: nn.Module, inputs: Tensor, depth: int, rng: torch.Generator) -> Tensor:
        """Logits after `depth` recurrences from a state of their own, the last ones differentiated."""
        learnt = min(self.loop.backprop_depth, depth)
        state = self.model.random_state(*inputs.shape, rng).to(inputs.device)
        return model(inputs, self._advance(state, inputs, depth - learnt, False, rng), learnt).logits

    @torch.no_grad()
    def _advance(self, state: Tensor, inputs: Tensor, count: int, lag: bool, rng: torch.Generator) -> Tensor:
        """States after recurrences that are not differentiated. With a lag a token waits at its first state while those
        before it are already at work, as in a wave whose keys and values are shared."""
        if not count:
            return state
        embedded = self.model.embed(inputs)
        waits = torch.zeros(inputs.shape[1])
        if lag:
            waits = (torch.rand(inputs.shape[1], generator=rng).sort().values * (count + 1)).floor()
        for number in range(count):
            refined = self.model.recur(state, embedded)
            state = torch.where((waits <= number)[None, :, None].to(state.device), refined, state) if lag else refined
        return state

    # ---- held-out figures

    @torch.no_grad()
    def test_losses(self, tokens: Tensor, labels: Tensor, first: int) -> dict[str, Tensor]:
        """Cross-entropy per token at the usual number of recurrences, a quarter and twice as many; how much states
        still change, depend on where they began, and resemble one another (1: all tokens' are the same)."""
        model, inputs = self.model, self.model.inputs(tokens, labels)
        usual = model.config["recurrences"]
        rng = torch.Generator().manual_seed(first)  # the same states at every evaluation
        states = [model.random_state(*inputs.shape, rng).to(inputs.device) for _ in range(2)]
        found, other = (model(inputs, state, usual) for state in states)
        deeper = model(inputs, found.state, usual)
        shallow = model(inputs, states[0], max(1, usual // SHALLOW_DEPTHS))
        return {
            "test_loss": cross_entropy(found.logits, tokens).mean(1),
            "test_loss_shallow": cross_entropy(shallow.logits, tokens).mean(1),
            "test_loss_deeper": cross_entropy(deeper.logits, tokens).mean(1),
            "test_residual": relative_change(found.state, found.before).median(1).values,
            "test_agreement": (found.logits.argmax(-1) == other.logits.argmax(-1)).float().mean(1),
            "test_likeness": likeness(found.state),
        }

    def evaluate(self) -> dict[str, float]:
        figures = super().evaluate()
        usual = figures["test_loss"]
        self.gates = {
            "residual": figures["test_residual"],
            "deeper": figures["test_loss_deeper"] - usual,
            "agreement": figures["test_agreement"],
            "shallow": figures["test_loss_shallow"] - usual,
        }
        return figures

    # ---- the finished model

    def pipeline(self) -> RasterPipeline:
        """Without its gates: that a loop does not rest yet is no news in training."""
        return self._pipeline({})

    def finished_pipeline(self) -> RasterPipeline:
        return self._pipeline(self.gates)

    def _pipeline(self, gates: dict[str, float]) -> RasterPipeline:
        names, settings = dict(enumerate(self.class_names)), self.config.sample_settings
        return RasterPipeline(self.tokenizer, self.model, id2label=names, settings=settings, gates=gates)


def likeness(state: Tensor) -> Tensor:
    """Mean cosine between the states (B, n, D) of different tokens: (B,); near 1 where the loop forgets its tokens."""
    unit = F.normalize(state.float(), dim=-1)
    count = unit.shape[1]
    return (unit.sum(1).square().sum(-1) - count) / (count * (count - 1))
