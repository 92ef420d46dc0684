"""The arithmetic of `needle_grid.py`: which cells share a needle, and how many FLOPs that leaves. No model."""

from dataclasses import dataclass
from typing import Any

from easyctx.evals.needle_settings import Cell, NeedleSettings, place_of

NEEDLE, QUESTION = 16, 40  # tokens


@dataclass(frozen=True)
class Grid:
    """Cells, and in which groups a method runs them; one cell to a group for brute force."""

    depth_by: str
    max_length: int
    cells: tuple[Cell, ...]

    @property
    def settings(self) -> NeedleSettings:
        return NeedleSettings(depth_by=self.depth_by)

    def place(self, cell: Cell) -> int:
        """The token before which the needle is put."""
        at = place_of(self.settings, cell, self.max_length)
        room = cell.length - NEEDLE - QUESTION
        return min(round(cell.depth / 100 * room) if at is None else at, room)

    def groups(self) -> list[list[Cell]]:
        """Cells that share a needle."""
        groups: dict[Any, list[Cell]] = {}
        for cell in self.cells:
            at = place_of(self.settings, cell, self.max_length)
            groups.setdefault(cell if at is None else (at, cell.sample), []).append(cell)
        return list(groups.values())


def make_grid(depth_by: str, max_length: int, num_lengths: int, num_depths: int, samples: int) -> Grid:
    """The cells that `eval/needle.py` makes of as many lengths and depths, evenly spaced."""
    lengths = [round(max_length * (i + 1) / num_lengths) for i in range(num_lengths)]
    depths = [round(100 * i / (num_depths - 1), 1) for i in range(num_depths)]
    cells = [Cell(length, depth, sample) for length in lengths for depth in depths for sample in range(samples)]
    if depth_by == "position":
        cells = [cell for cell in cells if cell.depth / 100 * max_length <= cell.length]
    return Grid(depth_by, max_length, tuple(cells))


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of a shape, the output head aside, which sees a few tokens of each prompt."""

    linear: int  # for a token
    attention: int  # for a query and a key

    @staticmethod
    def of(shape: dict[str, int]) -> "Flops":
        width, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
        keys = shape["num_key_value_heads"] * shape["head_dim"]
        weights = 2 * width * heads + 2 * width * keys + 3 * width * shape["intermediate_size"]
        return Flops(2 * shape["num_hidden_layers"] * weights, 4 * shape["num_hidden_layers"] * heads)

    def stretch(self, start: int, stop: int) -> int:
        """Tokens `start` to `stop` of a text, attending to all before them."""
        return (stop - start) * self.linear + (stop * (stop + 1) - start * (start + 1)) // 2 * self.attention

    def group(self, grid: Grid, group: list[Cell]) -> int:
        """Cells that share a needle: the longest from the needle on, and of the others what is their own."""
        longest = max(group, key=lambda cell: cell.length)
        start = grid.place(longest)
        total = self.stretch(start, longest.length)
        for cell in group:
            # A needle that is pushed to the end of a short text comes before that of the longest one.
            place = grid.place(cell)
            if cell != longest:
                total += self.stretch(cell.length - QUESTION if place == start else place, cell.length)
        return total

    def brute_force(self, cells: tuple[Cell, ...]) -> int:
        return sum(self.stretch(0, cell.length) for cell in cells)

    def shared(self, grid: Grid) -> int:
        """All groups, and the trunk, run once."""
        return self.stretch(0, grid.max_length) + sum(self.group(grid, group) for group in grid.groups())

    def share(self, grid: Grid) -> float:
        """Of brute force over the same cells."""
        return self.shared(grid) / self.brute_force(grid.cells)
