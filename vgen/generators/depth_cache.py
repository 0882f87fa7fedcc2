"""Keys and values of a looped transformer: by layer, by how often the loop has run, and by position."""

import torch
from torch import Tensor

from vgen.types import SettingError


class Places:
    """Where the tokens of one evaluation stand: positions (B, n) of B rows, on the CPU, and what each of them sees.

    Args:
        positions: (B, n) int64; of padding, anything in range.
        real: (B, n) bool, False for padding, which is computed along but read by nobody; None: all are real.
        present: (B, T) bool, positions that may be seen; None: all up to a token's own.
    """

    def __init__(
        self,
        positions: Tensor,
        cosines: Tensor,
        sines: Tensor,
        scratch: int,
        real: Tensor | None = None,
        present: Tensor | None = None,
    ) -> None:
        device = cosines.device
        self.count = positions.shape[1]
        if real is not None and bool(real.all()):
            real = None
        positions = positions if real is None else positions.where(real, 0)
        self.length = int(positions.max()) + 1  # of what is read
        first = int(positions[0, 0])
        run = torch.arange(first, first + self.count)
        # Where all rows stand at the same places in a row, slices do: no gather, and no mask for a single token.
        self.span = slice(first, first + self.count) if real is None and bool((positions == run).all()) else None
        self.positions = positions.to(device)
        self.writes = self.positions if real is None else positions.where(real, scratch).to(device)
        self.rotation = tuple(part[self.positions][:, :, None, None] for part in (cosines, sines))
        self.mask: Tensor | None = None  # (B or 1, 1, n, length)
        if self.span is None or self.count > 1 or present is not None:
            allowed = torch.arange(self.length) <= positions[: 1 if self.span is not None else None, :, None]
            if present is not None:
                allowed = allowed & present[:, None, : self.length]
            self.mask = allowed[:, None].to(device)


class DepthCache:
    """Preallocated keys and values: (slots, B, heads, T + 1, d).

    The slots are the prelude's layers, the core's at each of `recurrences` runs of the loop, and the coda's. Recurrence
    number i uses the slots of i modulo `recurrences`: all of a decoder's runs give the full cache, 1 the one that all
    recurrences share (2510.14961). The last place serves padding.
    """

    def __init__(
        self,
        layers: tuple[int, int, int],
        recurrences: int,
        shape: tuple[int, int, int, int],
        rotations: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.prelude, self.core, self.coda = layers
        self.recurrences = recurrences
        batch, heads, length, width = shape
        slots = self.prelude + recurrences * self.core + self.coda
        self.keys = torch.zeros(slots, batch, heads, length + 1, width, device=rotations.device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = length
        wide = torch.promote_types(dtype, torch.float32)
        self.cosines, self.sines = rotations.real.to(wide), rotations.imag.to(wide)
        self.rows = torch.arange(batch, device=rotations.device)[:, None]

    def places(self, positions: Tensor, real: Tensor | None = None, present: Tensor | None = None) -> Places:
        """Where tokens at positions (B, n), a CPU tensor, are written and what they see: see Places. A batch twice as
        large, the second half standing where the first does, may be given by its first half."""
        repeats = len(self.rows) // len(positions)
        given = [None if part is None else part.repeat(repeats, 1) for part in (positions, real, present)]
        assert given[0] is not None
        if int(given[0].max()) >= self.length:
            raise SettingError(
                f"position {int(given[0].max())} is beyond the {self.length} that the cache was made for"
            )
        return Places(given[0], self.cosines, self.sines, self.length, given[1], given[2])

    def depths(self, depths: Tensor | int) -> Tensor | int:
        """Recurrences (B, n) already run, a CPU tensor, as `recur` takes them: a number where all are the same."""
        if isinstance(depths, int):
            return depths % self.recurrences
        slots = depths % self.recurrences
        first = int(slots[0, 0])
        if bool((slots == first).all()):
            return first
        return slots.repeat(len(self.rows) // len(slots), 1).to(self.keys.device)

    def update(
        self, layer: int, slots: Tensor | int, places: Places, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, bool]:
        """Write keys and values (B, n, heads, d) of the core's layer number `layer` at `slots`.

        Returns all keys and values up to the last place, (B, heads, L, d), or (B, n, heads, L, d) and True where every
        token reads slots of its own.
        """
        if isinstance(slots, int):
            return *self.write(self.prelude + slots * self.core + layer, places, k, v), False
        index = self.prelude + slots * self.core + layer
        self.keys[index, self.rows, :, places.writes] = k
        self.values[index, self.rows, :, places.writes] = v
        length = places.length
        return self.keys[index, self.rows, :, :length], self.values[index, self.rows, :, :length], True

    def write(self, slot: int, places: Places, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, n, heads, d) at one slot; returns all up to the last place, (B, heads, L, d)."""
        keys, values = self.keys[slot], self.values[slot]
        if places.span is not None:
            keys[:, :, places.span] = k.transpose(1, 2)
            values[:, :, places.span] = v.transpose(1, 2)
        else:
            keys[self.rows, :, places.writes] = k
            values[self.rows, :, places.writes] = v
        return keys[:, :, : places.length], values[:, :, : places.length]

    def fill(self, places: Places, depth: int) -> None:
        """Take what recurrence number `depth`, counted from 0, wrote at `places` for all later ones too."""
        first = self.prelude + depth % self.recurrences * self.core
        last = first + self.core
        for start in range(last, self.prelude + self.recurrences * self.core, self.core):
            for held in (self.keys, self.values):
                held[start : start + self.core, self.rows, :, places.writes] = held[
                    first:last, self.rows, :, places.writes
                ]
