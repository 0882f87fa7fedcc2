"""Rows of an image side by side: a row begins when the one above it is some tokens ahead (ZipAR, 2412.04062)."""

from collections.abc import Iterator

import torch

from vgen.samplers.raster import Run
from vgen.types import Step


def zipar(run: Run, side: int, lead: int) -> Iterator[Step]:
    """One token of every unfinished row at a time, each with all its recurrences; its tokens differ from `raster`'s.

    What the row above has not made yet is neither seen nor waited for. A row's first token stands on the last one of
    the row above, which is unknown when it begins: the last known one there takes its place (ours).
    """
    inputs, tokens, known = run.inputs(), run.tokens.clone(), run.known.clone()
    counts = [0] * side  # tokens made of each row
    depths = torch.zeros(run.batch, run.positions, dtype=torch.int64)
    present = torch.zeros(run.batch, run.positions, dtype=torch.bool)
    index, total = 0, side + (side - 1) * min(lead, side)
    while counts[-1] < side:
        ready = [
            row
            for row, count in enumerate(counts)
            if count < side and (not row or counts[row - 1] >= min(side, count + lead))
        ]
        at = torch.tensor([row * side + counts[row] for row in ready])
        for row in ready:
            if not counts[row] and row and bool((inputs[:, row * side] < 0).any()):
                last = (row - 1) * side + counts[row - 1] - 1
                unknown = inputs[:, row * side] < 0
                inputs[unknown, row * side] = tokens[unknown, last]
        positions = at.expand(run.batch, -1)
        present[:, at] = True
        places = run.cache.places(positions, present=present)
        embedded, state = run.embed(inputs[:, at], positions, places), run.begin(positions)
        for number in range(run.recurrences):
            state = run.recur(state, embedded, places, number, positions.numel())
        found = run.read(state, positions, places)
        tokens[:, at], known[:, at] = found, True
        depths[:, at] = run.recurrences
        followers = at + 1
        inside = followers < run.positions
        inputs[:, followers[inside]] = found[:, inside]
        for row in ready:
            counts[row] += 1
        yield run.step(index, max(total, index + 1), tokens, known, depths)
        index += 1
