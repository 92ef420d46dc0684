"""What a needle grid costs when what its prompts share is computed once, in seconds and in FLOPs of brute force.

    python benchmarks/needle_grid.py                 # a 1B model with random weights, up to 128K tokens, one GPU
    python benchmarks/needle_grid.py --flops-only    # arithmetic alone, also for 1M tokens

Prompts are random tokens with a needle, placed as `eval/needle.py --depth-by fraction|place|position` places it. Brute
force is every prompt alone with the same attention kernel, so that the share is that of the work. Each method runs its
pieces of work scattered over the grid until its part of `--seconds` is over; what is left is extrapolated by FLOPs, and
the row says so. Logit differences are those of the prompts that both ran, beside what another kernel (transformers'
own attention) makes of the same prompts.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results_file import print_table, write_results
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from easyctx.evals.needle_settings import DEPTHS_BY, Cell, NeedleSettings, place_of
from easyctx.evals.scoring import Scorer
from easyctx.evals.trunk import TrunkScorer
from easyctx.generation.model import make_ranks
from easyctx.mesh import Mesh

NEEDLE, QUESTION, ANSWER = 16, 40, 7  # tokens; the answer is the last of the question's
SHAPES: dict[str, dict[str, int]] = {
    "1B": dict(num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, vocab_size=128256),
    "8B": dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=128256),
    "tiny": dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, vocab_size=256),
}  # fmt: skip


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


def make_grid(depth_by: str, args: argparse.Namespace, max_length: int) -> Grid:
    lengths = [round(max_length * (i + 1) / args.num_lengths) for i in range(args.num_lengths)]
    depths = [round(100 * i / (args.depths - 1), 1) for i in range(args.depths)]
    cells = [Cell(length, depth, sample) for length in lengths for depth in depths for sample in range(args.samples)]
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
        longest = max(cell.length for cell in group)
        own = sum(self.stretch(cell.length - QUESTION, cell.length) for cell in group if cell.length < longest)
        return self.stretch(min(grid.place(cell) for cell in group), longest) + own

    def brute_force(self, cells: tuple[Cell, ...]) -> int:
        return sum(self.stretch(0, cell.length) for cell in cells)

    def share(self, grid: Grid) -> float:
        """Of brute force over the same cells; the trunk, run once, included."""
        shared = self.stretch(0, grid.max_length) + sum(self.group(grid, group) for group in grid.groups())
        return shared / self.brute_force(grid.cells)


class Prompts:
    """The grid's token ids."""

    def __init__(self, grid: Grid, vocab_size: int) -> None:
        self.grid, self.vocab_size = grid, vocab_size
        self.trunk = self._random(0, grid.max_length)

    def build(self, cell: Cell) -> torch.Tensor:
        place = self.grid.place(cell)
        key = place_of(self.grid.settings, cell, self.grid.max_length)
        owner = hash((cell.length, cell.depth, cell.sample) if key is None else (key, cell.sample))
        haystack = cell.length - NEEDLE - QUESTION
        parts = [self.trunk[:place], self._random(owner, NEEDLE), self.trunk[place:haystack]]
        return torch.cat([*parts, self._random(owner + 1, QUESTION)])

    def _random(self, seed: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed % 2**31)
        return torch.randint(0, self.vocab_size, (count,), generator=generator)


def scattered(items: list[Any]) -> Iterator[Any]:
    """All items, any first ones of them spread over the whole list."""
    order = sorted(range(len(items)), key=lambda i: i * 0.618033988749895 % 1)
    return (items[i] for i in order)


def make_model(shape: dict[str, int], device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, max_position_embeddings=1 << 20, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


class Run:
    """One method on a grid: what it took, and the logits of the first prompts."""

    def __init__(self, scorer: TrunkScorer, prompts: Prompts, flops: Flops, device: torch.device) -> None:
        self.scorer, self.prompts, self.flops, self.device = scorer, prompts, flops, device
        self.logits: dict[Cell, torch.Tensor] = {}

    def time(self, groups: list[list[Cell]], trunk: torch.Tensor, costs: list[int], limit: float) -> tuple[float, int]:
        """(seconds for all groups, how many of them were run)."""
        self.scorer.follow(torch.empty(0, dtype=torch.int64))
        self.scorer.follow(trunk)
        # The trunk whole, by a prompt that is all of it; timed apart, as it is run once however much is extrapolated.
        begin = self._now()
        if len(trunk):
            self.scorer.answer_logits([trunk], [len(trunk) - 1])
        for_trunk, done, cost, spent = self._now() - begin, 0, 0, 0.0
        for group, price in scattered(list(zip(groups, costs, strict=True))):
            ids = [self.prompts.build(cell) for cell in group]
            begin = self._now()
            logits = self.scorer.answer_logits(ids, [len(each) - ANSWER for each in ids])
            spent += self._now() - begin
            self.logits |= {cell: each.float().cpu() for cell, each in zip(group, logits, strict=True)}
            done, cost = done + 1, cost + price
            if spent > limit:
                break
        return for_trunk + spent * sum(costs) / cost, done

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(args: argparse.Namespace, shape: dict[str, int]) -> list[dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, flops = make_model(shape, device), Flops.of(shape)
    scorer = TrunkScorer(model, make_ranks("data_parallel", None, model.config, args.kernel), device)
    stock = Scorer(model, "data_parallel", Mesh(), device)
    rows = []
    for depth_by in args.depth_by:
        grid = make_grid(depth_by, args, args.max_length)
        prompts, limit = Prompts(grid, shape["vocab_size"]), args.seconds / len(args.depth_by) / 2.5
        _warm_up(scorer, prompts)
        alone = [[cell] for cell in grid.cells]
        brute, shared = (Run(scorer, prompts, flops, device) for _ in range(2))
        brute_costs = [flops.brute_force((cell,)) for cell in grid.cells]
        nothing = torch.empty(0, dtype=torch.int64)
        brute_seconds, brute_done = brute.time(alone, nothing, brute_costs, limit)
        groups = grid.groups()
        costs = [flops.group(grid, group) for group in groups]
        seconds, done = shared.time(groups, prompts.trunk, costs, limit)
        compared = list(scattered([cell for cell in brute.logits if cell in shared.logits]))[: args.compare]
        if not compared:  # the samples of two short runs may not meet
            compared = list(shared.logits)[: args.compare]
            scorer.follow(nothing)
        others = {}
        for cell in compared:
            ids = prompts.build(cell)
            if cell not in brute.logits:
                brute.logits[cell] = scorer.answer_logits([ids], [len(ids) - ANSWER])[0].float().cpu()
            others[cell] = stock.answer_logits(ids, len(ids) - ANSWER).float().cpu()
        common = {
            "model": args.model, "gpus": 1, "lengths": args.num_lengths, "max_length": args.max_length,
            "depths": args.depths, "samples": args.samples, "cells": len(grid.cells),
        }  # fmt: skip
        rows.append(
            {
                "method": f"brute force, {depth_by}", **common, "seconds": brute_seconds, "share_of_brute_force": 1.0,
                "max_logit_difference": None, "flops_share": 1.0, "timed": f"{brute_done} of {len(alone)} forwards",
                "extrapolated": brute_done < len(alone), "compared_prompts": None, "another_kernel": None,
            }
        )  # fmt: skip
        rows.append(
            {
                "method": depth_by, **common, "seconds": seconds, "share_of_brute_force": seconds / brute_seconds,
                "max_logit_difference": _largest(shared.logits, brute.logits, compared),
                "flops_share": flops.share(grid), "timed": f"{done} of {len(groups)} forwards",
                "extrapolated": done < len(groups) or brute_done < len(alone), "compared_prompts": len(compared),
                "another_kernel": _largest(others, brute.logits, compared),
            }
        )  # fmt: skip
        print_table(rows[-2:])
    return rows


def _largest(some: dict[Cell, torch.Tensor], others: dict[Cell, torch.Tensor], cells: list[Cell]) -> float:
    return max(float((some[cell] - others[cell]).abs().max()) for cell in cells)


def _warm_up(scorer: TrunkScorer, prompts: Prompts) -> None:
    """Compile kernels, and have the allocator know the largest call."""
    longest = max(prompts.grid.cells, key=lambda cell: cell.length)
    ids = prompts.build(longest)
    scorer.follow(prompts.trunk[: len(ids) // 4])
    for _ in range(2):
        scorer.answer_logits([ids, ids[:-1]], [len(ids) - ANSWER, len(ids) - 1 - ANSWER])


def flops_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for model, max_length in ((args.model, args.max_length), (args.model, 1 << 20), ("8B", 1 << 20)):
        for depth_by in args.depth_by:
            grid, flops = make_grid(depth_by, args, max_length), Flops.of(SHAPES[model])
            brute = flops.brute_force(grid.cells)
            whole = flops.brute_force(make_grid("fraction", args, max_length).cells)
            rows.append(
                {
                    "method": depth_by, "model": model, "max_length": max_length, "lengths": args.num_lengths,
                    "depths": args.depths, "samples": args.samples, "cells": len(grid.cells),
                    "forwards": len(grid.groups()), "brute_force_pflop": brute / 1e15,
                    "flops_share": flops.share(grid), "flops_share_of_all_cells": flops.share(grid) * brute / whole,
                }
            )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1B", choices=SHAPES)
    parser.add_argument("--max-length", type=int, default=131072)
    parser.add_argument("--num-lengths", type=int, default=20)
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--depth-by", nargs="+", default=list(DEPTHS_BY), choices=list(DEPTHS_BY))
    parser.add_argument("--seconds", type=float, default=270, help="for all methods together")
    parser.add_argument("--compare", type=int, default=6, help="prompts whose logits are compared, for each method")
    parser.add_argument("--kernel", default="auto", help="attention kernel")
    parser.add_argument("--flops-only", action="store_true")
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.flops_only:
        print_table(flops_rows(args))
        return
    print(write_results("needle_grid", measure(args, SHAPES[args.model]), args.output))


if __name__ == "__main__":
    main()
