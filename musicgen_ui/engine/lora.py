"""LoRA adapters beside the packed weights, put on and taken off a row at a time.

An adapter (Hu et al. 2021, arXiv 2106.09685) adds a product of two narrow matrices to some of the
decoder's: `y = W x + strength · scale · B (A x)`. W stays packed as it is, so a checkpoint serves
jobs with different adapters, strengths or none in the same step: each product adds the narrow path
to the rows of the jobs that wear one. Where several matrices are packed in one, as query, key and
value, a path adds to its own slice of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

OUTSIDE = -1  # the layer of what is in no layer


class Place(NamedTuple):
    """A matrix of the checkpoint: in which packed product it is, and where in its outputs."""

    layer: int
    product: str
    start: int
    outputs: int
    inputs: int


@dataclass(frozen=True, eq=False)
class Patch:
    """What an adapter adds to a slice of a product's outputs."""

    start: int
    down: Tensor  # A, [rank, inputs]
    up: Tensor  # scale · B, [outputs, rank]

    def add(self, x: Tensor, y: Tensor, strength: float) -> None:
        """Adds to `y`, [rows, outputs of the product], in place, what `x` [rows, inputs] brings."""
        y[:, self.start : self.start + len(self.up)] += (x @ self.down.T) @ (strength * self.up).T

    def embed(self, columns: Tensor, x: Tensor, strength: float) -> None:
        """Adds to `x`, [n, hidden], in place, what one codebook of `columns` [n, codebooks] does.

        Here `start` is the codebook and `down` a table of [rank, codes].
        """
        x += self.down[:, columns[:, self.start]].T @ (strength * self.up).T


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory."""

    name: str
    base: str  # the checkpoint it was trained on, as it says; may be empty
    patches: Mapping[tuple[int, str], list[Patch]]  # by layer and product
    stamp: tuple[tuple[str, int, int], ...] = ()  # names, sizes and times of its files

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        held = [patch for patches in self.patches.values() for patch in patches]
        return sum(patch.down.nbytes + patch.up.nbytes for patch in held)


@dataclass(frozen=True)
class Worn:
    """An adapter as a job wears it."""

    adapter: Adapter
    strength: float

    def add(self, layer: int, product: str, x: Tensor, y: Tensor) -> None:
        """Adds to the product's outputs `y`, in place, what its inputs `x` bring."""
        for patch in self.adapter.patches.get((layer, product), ()):
            patch.add(x, y, self.strength)

    def embed(self, columns: Tensor, x: Tensor) -> None:
        """Adds to the embedded `columns`, `x`, in place."""
        for patch in self.adapter.patches.get((OUTSIDE, "embed_tokens"), ()):
            patch.embed(columns, x, self.strength)


@dataclass(frozen=True)
class Rows:
    """Which rows of a step wear what; the others are as the checkpoint has them."""

    worn: list[tuple[slice, Worn]] = field(default_factory=list)

    def product(
        self, layer: int, name: str, linear: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """The product of [rows, inputs] with the packed weights and with what the rows wear."""
        y = linear(x)
        for rows, worn in self.worn:
            worn.add(layer, name, x[rows], y[rows])
        return y

    def embedded(self, columns: Tensor, x: Tensor) -> Tensor:
        """The embedded columns, [rows, hidden], with what the rows wear added in place."""
        for rows, worn in self.worn:
            worn.embed(columns[rows], x[rows])
        return x

    @staticmethod
    def of(each: list[tuple[Worn | None, int]]) -> Rows:
        """The rows of one job after the other: what it wears, and how many they are."""
        found: list[tuple[slice, Worn]] = []
        end = 0
        for worn, count in each:
            start, end = end, end + count
            if worn is None:
                continue
            if found and found[-1][1] == worn and found[-1][0].stop == start:
                start = found.pop()[0].start
            found.append((slice(start, end), worn))
        return Rows(found)


BARE = Rows()
