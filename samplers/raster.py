"""Token after token in raster order with a looped generator, and what all its samplers share.

Noise is keyed by (seed, position), for the tokens and for the states that the loop begins with: every sampler that
loses nothing draws the same tokens. Bookkeeping is done on the CPU, where a row's front is a number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.samplers.logits import Schedule, draw, guide, share_guidance, temper, truncate
from vgen.types import RasterGenerator, Rng, Step, Wave

STATE_KEY = 1 << 41  # + position: the state a position begins with


@dataclass(frozen=True, kw_only=True)
class RasterSettings:
    """How tokens are drawn, how often the loop runs for each, and how many are at work at a time."""

    guidance_scale: float = 2.0
    guidance_schedule: Schedule = "linear"  # by the share of tokens before it, from 1; "constant"; a curve
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    recurrences: int | None = None  # of every token, r; wave-df: at most; None: the model's
    state_scale: float = 1.0  # of the states the loop begins with; 0: they are zero
    exit_threshold: float | None = None  # relative change of a state below which raster and wave-df take it as final;
    #                                      None: raster never does, wave-df at 0.03
    inner_recurrences: int = 2  # waves: recurrences between one readout and the next, r'
    wavefront: int | None = None  # waves, jacobi: most tokens at work; None: recurrences / inner_recurrences, or 8
    headway: int = 1  # waves: tokens that start after each readout
    momentum: float = 0.1  # wave-df: share of a token's old embedding that stays
    state_noise: float = 0.0  # wave-df: share of new noise in a state before its recurrences, falling with their number
    freeze_rule: str = "prefix"  # wave-df: which tokens are final: those before the first restless one, or "rightmost"
    restart: bool = True  # wave-df: a token begins anew where the one before it has changed
    row_lead: int = 3  # zipar: tokens that a row must be ahead of the next


class Run:
    """A batch of rows at work: evaluations with guidance, noise by position, and what they have cost.

    Args:
        labels: classes (B,). tokens: (B, N), read where `known` (B, N).
        slots: recurrences whose keys and values are kept apart, 1 for none.
    """

    def __init__(
        self,
        generator: RasterGenerator,
        labels: Tensor,
        null_class: int,
        rng: Rng,
        settings: RasterSettings,
        tokens: Tensor,
        known: Tensor,
        slots: int,
    ) -> None:
        config = generator.config
        self.generator, self.rng, self.settings = generator, rng, settings
        self.device, self.vocab = tokens.device, config["vocab_size"]
        self.batch, self.number = tokens.shape
        # Where position 0 holds a class, position p is followed by token p; where it holds a token, by token p + 1.
        self.shift = 0 if config["num_classes"] is not None else 1
        self.positions = self.number - self.shift
        self.known, self.tokens = known.cpu(), tokens.cpu().masked_fill(~known.cpu(), self.vocab)
        guided = settings.guidance_scale != 1 and self.shift == 0 and bool((labels != null_class).any())
        self.streams = 2 if guided else 1
        streams = [labels, torch.full_like(labels, null_class)][: self.streams]
        self.first = torch.cat([generator.prompt(part) for part in streams]) if self.shift == 0 else None
        self.scale_at = share_guidance(settings.guidance_scale, settings.guidance_schedule, self.device)
        self.recurrences = settings.recurrences or config["recurrences"]
        self.cache = generator.new_cache(self.batch * self.streams, slots)
        self.noise = torch.empty(self.batch, self.positions, self.vocab, device=self.device)
        self.states = torch.zeros(self.batch, self.positions, config["width"], device=self.device)
        self.drawn = 0  # positions whose noise is there
        self.passes = self.work = self.restarts = 0
        self.rows = torch.arange(self.batch)[:, None]

    # ---- what stands where

    def inputs(self) -> Tensor:
        """Tokens (B, P) that stand at each position as far as they are known, -1 elsewhere and for the class."""
        inputs = torch.full((self.batch, self.positions), -1)
        given = self.tokens[:, : self.number - 1].masked_fill(~self.known[:, : self.number - 1], -1)
        inputs[:, 1 - self.shift :] = given
        return inputs

    def follow(self, positions: Tensor, drawn: Tensor) -> Tensor:
        """Tokens (B, n) that follow `positions` (B, n): those drawn, but for given ones."""
        places = positions + self.shift
        given = self.known.gather(1, places)
        return torch.where(given, self.tokens.gather(1, places), drawn)

    # ---- evaluating; everything comes and goes in B rows, streams of guidance are inside

    def embed(self, inputs: Tensor, positions: Tensor, places: object) -> Tensor:
        """The prelude of tokens (B, n) at positions (B, n), CPU tensors: (streams B, n, D)."""
        ids = inputs.clamp_min(0).to(self.device).repeat(self.streams, 1)
        if self.first is not None:
            start = (positions == 0).to(self.device).repeat(self.streams, 1)
            ids = torch.where(start, self.first, ids)
        return self.generator.embed(ids, places, self.cache)

    def begin(self, positions: Tensor) -> Tensor:
        """States (streams B, n, D) that the loop begins with at positions (B, n)."""
        self._draw_noise(int(positions.max()) + 1)
        return self._rows(self.states, positions).repeat(self.streams, 1, 1)

    def recur(self, state: Tensor, embedded: Tensor, places: object, depths: Tensor | int, count: int) -> Tensor:
        """One recurrence, of `count` tokens in all."""
        self.passes += 1
        self.work += count
        return self.generator.recur(state, embedded, places, self.cache, self.cache.depths(depths))

    def read(self, state: Tensor, positions: Tensor, places: object) -> Tensor:
        """Tokens (B, n) that follow positions (B, n), on the CPU."""
        settings = self.settings
        logits = self.generator.read(state, places, self.cache)
        if self.streams == 2:
            share = (positions + self.shift + 1) / self.number
            scale = torch.stack([torch.as_tensor(self.scale_at(column)).flatten() for column in share.unbind(1)], 1)
            cond, uncond = logits.chunk(2)
            logits = guide(cond, uncond, scale.to(logits)[..., None])
        logits = truncate(temper(logits, settings.temperature), settings.top_k, settings.top_p)
        return self.follow(positions, draw(logits, self._rows(self.noise, positions)).cpu())

    def change(self, state: Tensor, before: Tensor) -> Tensor:
        """Relative change of states (streams B, n, D), the greatest over the streams: (B, n), on the CPU."""
        return relative_change(state, before).unflatten(0, (self.streams, self.batch)).amax(0).cpu()

    def for_states(self, values: Tensor) -> Tensor:
        """Values (B, n) of tokens, to be combined with states: (streams B, n, 1)."""
        return values.repeat(self.streams, 1)[..., None].to(self.device)

    def _rows(self, values: Tensor, positions: Tensor) -> Tensor:
        """Values (B, P, ...) at positions (B, n)."""
        return values[self.rows.to(values.device), positions.to(values.device)]

    def _draw_noise(self, count: int) -> None:
        """Noise of the first `count` positions, which are drawn in order whichever of them are at work."""
        for position in range(self.drawn, count):
            self.noise[:, position] = self.rng.exponential((self.vocab,), key=position)
            if self.settings.state_scale:
                uniform = -torch.expm1(-self.rng.exponential(self.states.shape[2:], key=STATE_KEY + position))
                states = self.generator.scaled_state(uniform) * self.settings.state_scale
                if states.dtype != self.states.dtype:
                    self.states = self.states.to(states.dtype)
                self.states[:, position] = states
        self.drawn = max(self.drawn, count)

    # ---- telling

    def step(
        self, index: int, total: int, tokens: Tensor, known: Tensor, depths: Tensor, drafts: Tensor | None = None
    ) -> Step:
        """What is known: tokens (B, N) where `known`, and recurrences (B, P) and guesses (B, N) of the others."""
        all_depths = torch.zeros(self.batch, self.number, dtype=torch.int64)
        all_depths[:, self.shift :] = depths
        guesses = torch.full_like(tokens, -1) if drafts is None else drafts.masked_fill(known, -1)
        wave = Wave(depths=all_depths, drafts=guesses, passes=self.passes, work=self.work, restarts=self.restarts)
        return Step(
            index=index,
            total=total,
            tokens=tokens.masked_fill(~known, self.vocab).to(self.device),
            known=known.clone().to(self.device),
            evaluations=index + 1,
            wave=wave,
        )


def raster(run: Run) -> Iterator[Step]:
    """Every token on its own, with all of its recurrences or until its state rests: what others are measured against.

    A token that exits early leaves what its last recurrence wrote to those that later tokens run beyond it.
    """
    inputs, tokens, known = run.inputs(), run.tokens.clone(), run.known.clone()
    known[:, : run.shift] = True
    threshold = run.settings.exit_threshold or 0.0
    depths = torch.zeros(run.batch, run.positions, dtype=torch.int64)
    for position in range(run.positions):
        positions = torch.full((run.batch, 1), position)
        places = run.cache.places(positions)
        embedded = run.embed(inputs[:, position : position + 1], positions, places)
        state, resting = run.begin(positions), torch.zeros(run.batch, 1, dtype=torch.bool)
        for number in range(run.recurrences):
            refined = run.recur(state, embedded, places, number, run.batch - int(resting.sum()))
            depths[:, position : position + 1] += ~resting
            if threshold:
                rests = run.change(refined, state) < threshold
                refined = torch.where(run.for_states(resting), state, refined)
                resting = resting | rests
            state = refined
            if bool(resting.all()):
                run.cache.fill(places, number)
                break
        found = run.read(state, positions, places)[:, 0]
        place = position + run.shift
        tokens[:, place], known[:, place] = found, True
        if position + 1 < run.positions:
            inputs[:, position + 1] = found
        yield run.step(position, run.positions, tokens, known, depths)


def relative_change(state: Tensor, before: Tensor) -> Tensor:
    """How much states (B, n, D) differ from earlier ones, by their length: (B, n), float32 or wider."""
    wide = torch.promote_types(state.dtype, torch.float32)
    size = state.to(wide).norm(dim=-1).clamp_min(torch.finfo(wide).tiny)
    return (state.to(wide) - before.to(wide)).norm(dim=-1) / size
