"""Many tokens of a looped generator at work at a time, each at a depth of its own (2510.14961).

A token starts from a guess of the one before it, read off that one's unfinished state. `wave_exact` keeps keys and
values apart by depth and lets a token begin anew where its guess was wrong: each committed token saw exactly what it
sees in raster order, so the tokens are the same. `wave_df` is the published sampler: keys and values shared by all
depths, states taken as final once they rest.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vgen.samplers.raster import STATE_KEY, Run
from vgen.types import Step

NOISE_KEY = STATE_KEY << 1  # + readout * positions + position: wave-df's new noise


class Front:
    """The tokens at work: of row b positions done[b] .. done[b] + width[b] - 1, all before them being final.

    `inputs` (B, P) are what stands at each position: given, final or guessed, -1 where nothing is; `depths` (B, P) are
    recurrences so far.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.inputs = run.inputs()
        self.certain = self.inputs >= 0
        self.certain[:, 0] = True
        self.depths = torch.zeros(run.batch, run.positions, dtype=torch.int64)
        self.done, self.width = [0] * run.batch, [0] * run.batch
        self.tokens, self.known = run.tokens.clone(), run.known.clone()
        self.known[:, : run.shift] = True

    @property
    def busy(self) -> bool:
        """Whether any row has tokens left."""
        return any(done < self.run.positions for done in self.done)

    def grow(self, most: int, headway: int) -> None:
        """Start the next tokens, `headway` of them in each row, and any whose input is given; `most` at work.

        The first stands on what was read, the others on what is above them or before.
        """
        for row in range(self.run.batch):
            started = 0
            while self.width[row] < most and (end := self.done[row] + self.width[row]) < self.run.positions:
                if not self.certain[row, end]:
                    started += 1
                    if started > headway or (self.inputs[row, end] < 0 and headway == 1):
                        break
                    if self.inputs[row, end] < 0:
                        self.inputs[row, end] = self._placeholder(row, end)
                self.width[row] += 1

    def _placeholder(self, row: int, position: int) -> int:
        """A first guess at what stands there: the token above it, else the one before it, else the first code."""
        side = self.run.generator.config["grid"] or 1
        above = position - side
        candidates = (above, position - 1)
        found = (int(self.inputs[row, place]) for place in candidates if place >= 0)
        return next((token for token in found if token >= 0), 0)

    def window(self, starts: list[int]) -> tuple[Tensor, Tensor]:
        """Positions (B, n) from each row's start to the end of its front, and which are real (B, n)."""
        ends = [done + width for done, width in zip(self.done, self.width, strict=True)]
        count = max(end - start for start, end in zip(starts, ends, strict=True))
        positions = torch.tensor(starts)[:, None] + torch.arange(count)
        real = positions < torch.tensor(ends)[:, None]
        return positions.where(real, 0), real

    def settle(self, row: int, found: list[int], final: list[bool], restart: bool, consistent: bool = True) -> None:
        """Take what was read at a row's front: commit final tokens, guess the others anew.

        A token is committed once it is final and, if `consistent`, stands on the token before it as that was committed.
        With `restart` those whose input has changed begin anew, and all behind them.
        """
        run, first, width = self.run, self.done[row], self.width[row]
        committed = 0
        while committed < width and final[committed]:
            place = first + committed
            self.tokens[row, place + run.shift], self.known[row, place + run.shift] = found[committed], True
            committed += 1
            if consistent and committed < width and int(self.inputs[row, place + 1]) != found[committed - 1]:
                break
        changed = width
        for index, token in enumerate(found):
            follower = first + index + 1
            if index + 1 < committed or follower >= run.positions:
                continue
            if int(self.inputs[row, follower]) != token:
                self.inputs[row, follower] = token
                changed = min(changed, index + 1)
        if restart and changed < width:
            again = slice(first + changed, first + width)
            run.restarts += int((self.depths[row, again] > 0).sum())
            self.depths[row, again] = 0
        self.done[row] += committed
        self.width[row] -= committed

    def step(self, index: int) -> Step:
        """Where all rows are after evaluation number `index`, drafts included."""
        run = self.run
        drafts = torch.full((run.batch, run.number), -1)
        drafts[:, : run.number - 1] = self.inputs[:, 1 - run.shift :]
        left = max(run.positions - done for done in self.done)
        return run.step(index, index + 1 + left, self.tokens, self.known, self.depths, drafts)


class Memory(NamedTuple):
    """Embeddings and states (streams B, P + 1, D) of all positions; the last one serves padding."""

    embedded: Tensor
    states: Tensor

    @classmethod
    def of(cls, run: Run) -> "Memory":
        """An empty one, with room for all of a run."""
        like = run.begin(torch.zeros(run.batch, 1, dtype=torch.int64))
        shape = (len(like), run.positions + 1, like.shape[2])
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def where(self, run: Run, positions: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Where positions (B, n) are kept."""
        places = positions.where(real, run.positions).repeat(run.streams, 1).to(self.states.device)
        return torch.arange(len(places), device=places.device)[:, None], places


def wave_exact(run: Run, inner: int, most: int, headway: int) -> Iterator[Step]:
    """The tokens of `raster`, for fewer passes of the core: `inner` recurrences, then a readout of all at work.

    With all recurrences at a time this is Jacobi decoding (2410.01699) with coupled noise. The run's cache keeps every
    recurrence apart. Args: `most` tokens at work, `headway` of them starting after each readout.
    """
    front, memory, index = Front(run), Memory.of(run), 0
    while front.busy:
        front.grow(most, headway)
        _start(run, front, memory)
        positions, real = front.window(front.done)
        places = run.cache.places(positions, real)
        kept = memory.where(run, positions, real)
        embedded, state = memory.embedded[kept], memory.states[kept]
        depths, count = front.depths.gather(1, positions).where(real, 0), int(real.sum())
        for number in range(inner):
            state = run.recur(state, embedded, places, depths + number, count)
        memory.states[kept] = state
        found = run.read(state, positions, places).tolist()
        for row, width in enumerate(front.width):
            at_work = slice(front.done[row], front.done[row] + width)
            front.depths[row, at_work] += inner
            final = (front.depths[row, at_work] >= run.recurrences).tolist()
            front.settle(row, found[row][:width], final, restart=True)
        yield front.step(index)
        index += 1


def _start(run: Run, front: Front, memory: Memory) -> None:
    """Embed the tokens that begin, or begin anew: the last of each row's front."""
    ends = [done + width for done, width in zip(front.done, front.width, strict=True)]
    starts = [
        done + int((front.depths[row, done:end] > 0).sum())
        for row, (done, end) in enumerate(zip(front.done, ends, strict=True))
    ]
    if starts == ends:
        return
    positions, real = front.window(starts)
    places = run.cache.places(positions, real)
    kept = memory.where(run, positions, real)
    memory.embedded[kept] = run.embed(front.inputs.gather(1, positions), positions, places)
    memory.states[kept] = run.begin(positions)


def wave_df(run: Run, inner: int, most: int, headway: int) -> Iterator[Step]:
    """The published sampler, whose tokens may differ: a state that moves less than the threshold between readouts is
    final, or one that has had all its recurrences. The run's cache is shared by all recurrences.

    Embeddings are made anew before each readout, a share of the old one staying. Frozen keys and values are those of
    the token's last pass.
    """
    settings = run.settings
    threshold = 0.03 if settings.exit_threshold is None else settings.exit_threshold
    front, memory, index = Front(run), Memory.of(run), 0
    while front.busy:
        front.grow(most, headway)
        positions, real = front.window(front.done)
        places = run.cache.places(positions, real)
        kept = memory.where(run, positions, real)
        depths, count = front.depths.gather(1, positions).where(real, 0), int(real.sum())
        new = run.for_states(depths == 0)
        made = run.embed(front.inputs.gather(1, positions), positions, places)
        embedded = torch.where(new, made, torch.lerp(made, memory.embedded[kept], settings.momentum))
        before = state = torch.where(new, run.begin(positions), memory.states[kept])
        if settings.state_noise:
            state = _mix(run, state, positions, depths, index)
        for _ in range(inner):
            state = run.recur(state, embedded, places, 0, count)
        memory.embedded[kept], memory.states[kept] = embedded, state
        found = run.read(state, positions, places).tolist()
        moved = run.change(state, before)
        for row, width in enumerate(front.width):
            at_work = slice(front.done[row], front.done[row] + width)
            front.depths[row, at_work] += inner
            final = (moved[row, :width] < threshold) | (front.depths[row, at_work] >= run.recurrences)
            rightmost = settings.freeze_rule == "rightmost"
            if rightmost:
                final = final.flip(0).cummax(0).values.flip(0)
            front.settle(row, found[row][:width], final.tolist(), settings.restart, consistent=not rightmost)
        yield front.step(index)
        index += 1


def _mix(run: Run, state: Tensor, positions: Tensor, depths: Tensor, index: int) -> Tensor:
    """States with a share of new noise, which falls with the recurrences that they have had."""
    first = NOISE_KEY + index * run.positions
    noise = state.new_zeros(run.batch, run.positions, state.shape[2])
    for position in sorted(set(positions.flatten().tolist())):
        uniform = -torch.expm1(-run.rng.exponential(state.shape[2:], key=first + position))
        noise[:, position] = run.generator.scaled_state(uniform)
    chosen = noise[run.rows.to(noise.device), positions.to(noise.device)].repeat(run.streams, 1, 1)
    return torch.lerp(state, chosen, run.for_states(run.settings.state_noise / (1 + depths)).to(state))
