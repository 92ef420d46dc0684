"""What a needle grid costs when what its prompts share is computed once, in seconds and in FLOPs of brute force.

    python benchmarks/needle_grid.py                 # a 1B model with random weights, up to 128K tokens, one GPU
    python benchmarks/needle_grid.py --flops-only    # arithmetic alone, also for 1M tokens

Prompts are random tokens with a needle, placed as `eval/needle.py --depth-by fraction|place|position` places it. Brute
force is every prompt alone with the same attention kernel, so that the share is that of the work; what it takes depends
on the length only, so that prompts of every length are timed and stand for those of their length.

`--seconds` are shared out: a part for brute force, then the rest among the methods, the cheapest first, so that what it
does not need is left to the others. A method runs its trunk and pieces of work scattered over the grid until its part
is over. What is left is extrapolated by FLOPs, and the row says how much was timed. Logits are compared with brute
force's, and those with what transformers' own attention makes of the same prompts: `difference_of_two_kernels`.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from shared_parts.needle_cells import NEEDLE, QUESTION, Flops, Grid, make_grid
from shared_parts.random_models import SHAPES, make_model
from shared_parts.results_file import print_table, write_results

from easyctx.evals.needle_settings import DEPTHS_BY, Cell, place_of
from easyctx.evals.scoring import Scorer
from easyctx.evals.trunk import TrunkScorer
from easyctx.generation.model import make_ranks
from easyctx.mesh import Mesh

NOTHING = torch.empty(0, dtype=torch.int64)
ANSWER = 7  # tokens, the last of the question's
BRUTE_FORCE = 0.2  # of the time
COMPARING = 0.2  # of each method's part, for comparing logits


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


class BruteForce:
    """Seconds of a prompt alone, by its length: the mean of as many as fit into `limit` seconds, at least one."""

    def __init__(self, scorer: TrunkScorer, prompts: Prompts, limit: float) -> None:
        self.num_timed = 0
        seconds: dict[int, list[float]] = {}
        scorer.follow(NOTHING)
        end = _now() + limit
        for turn in _in_turns(prompts.grid.cells):
            longest = max(sum(times) / len(times) for times in seconds.values()) if seconds else 0.0
            if seconds and _now() + longest * len(turn) / 2 > end:
                break
            for cell in turn:
                ids = prompts.build(cell)
                begin = _now()
                scorer.answer_logits([ids], [len(ids) - ANSWER])
                seconds.setdefault(cell.length, []).append(_now() - begin)
                self.num_timed += 1
        self._of_length = {length: sum(times) / len(times) for length, times in seconds.items()}

    def seconds(self, grid: Grid) -> float:
        return sum(self._of_length[cell.length] for cell in grid.cells)


def _in_turns(cells: tuple[Cell, ...]) -> Iterator[list[Cell]]:
    """All cells, one of each length at a time."""
    by_length: dict[int, list[Cell]] = {}
    for cell in cells:
        by_length.setdefault(cell.length, []).append(cell)
    for turn in itertools.zip_longest(*by_length.values()):
        yield [cell for cell in turn if cell is not None]


class Run:
    """A method on a grid: what it took, and the logits of the prompts that it ran.

    Args:
        costs: FLOPs of each group.
        limit: seconds after which no further group is begun.
    """

    def __init__(
        self, scorer: TrunkScorer, prompts: Prompts, groups: list[list[Cell]], costs: list[int], limit: float
    ) -> None:
        self.num_groups, self.num_timed = len(groups), 0
        self.logits: dict[Cell, torch.Tensor] = {}
        trunk = prompts.trunk
        scorer.follow(NOTHING)
        scorer.follow(trunk)
        begin = _now()
        # Whole, by a prompt that is all of it: it is run once however much is extrapolated.
        scorer.answer_logits([trunk], [len(trunk) - 1])
        for_trunk, cost, spent = _now() - begin, 0, 0.0
        for group, price in scattered(list(zip(groups, costs, strict=True))):
            ids = [prompts.build(cell) for cell in group]
            begin = _now()
            logits = scorer.answer_logits(ids, [len(each) - ANSWER for each in ids])
            spent += _now() - begin
            self.logits |= {cell: each.float().cpu() for cell, each in zip(group, logits, strict=True)}
            self.num_timed, cost = self.num_timed + 1, cost + price
            if for_trunk + spent > limit:
                break
        self.seconds = for_trunk + spent * sum(costs) / cost


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(args: argparse.Namespace, scorer: TrunkScorer, stock: Scorer) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after brute force and after every method."""
    shape = SHAPES[args.model]
    sizes = (args.max_length, args.num_lengths, args.depths, args.samples)
    flops, end = Flops.of(shape), _now() + args.seconds
    prompts = Prompts(make_grid("fraction", *sizes), shape["vocab_size"])
    _warm_up(scorer, prompts)
    brute = BruteForce(scorer, prompts, BRUTE_FORCE * (end - _now()))
    grids = sorted((make_grid(depth_by, *sizes) for depth_by in args.depth_by), key=flops.shared)
    described = {
        "model": args.model, "gpus": 1, "lengths": args.num_lengths, "max_length": args.max_length,
        "depths": args.depths, "samples": args.samples,
    }  # fmt: skip
    cells = prompts.grid.cells
    rows: list[dict[str, Any]] = [
        {
            "method": "brute force", **described, "cells": len(cells), "seconds": brute.seconds(prompts.grid),
            "share_of_brute_force": 1.0, "flops_share": 1.0, "timed": f"{brute.num_timed} of {len(cells)} forwards",
            "extrapolated": brute.num_timed < len(cells),
        }
    ]  # fmt: skip
    yield rows
    for left, grid in zip(range(len(grids), 0, -1), grids, strict=True):
        prompts = Prompts(grid, shape["vocab_size"])
        groups = grid.groups()
        limit = (1 - COMPARING) * (end - _now()) / left
        run = Run(scorer, prompts, groups, [flops.group(grid, group) for group in groups], limit)
        rows.append(
            {
                "method": grid.depth_by, **described, "cells": len(grid.cells), "seconds": run.seconds,
                "share_of_brute_force": run.seconds / brute.seconds(grid), "flops_share": flops.share(grid),
                "timed": f"{run.num_timed} of {run.num_groups} forwards",
                "extrapolated": run.num_timed < run.num_groups,
                **compare(args.compare, prompts, run, scorer, stock),
            }
        )  # fmt: skip
        yield rows


def compare(number: int, prompts: Prompts, shared: Run, scorer: TrunkScorer, stock: Scorer) -> dict[str, Any]:
    """The largest difference of logits: shared and brute force, and brute force with two kernels."""
    cells = list(scattered(list(shared.logits)))[:number]
    scorer.follow(NOTHING)
    differences, of_kernels = [], []
    for cell in cells:
        ids = prompts.build(cell)
        alone = scorer.answer_logits([ids], [len(ids) - ANSWER])[0].float().cpu()
        differences.append(float((shared.logits[cell] - alone).abs().max()))
        of_kernels.append(float((stock.answer_logits(ids, len(ids) - ANSWER).float().cpu() - alone).abs().max()))
    return {
        "max_logit_difference": max(differences),
        "difference_of_two_kernels": max(of_kernels),
        "compared_prompts": len(cells),
    }


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
            sizes = (max_length, args.num_lengths, args.depths, args.samples)
            grid, flops = make_grid(depth_by, *sizes), Flops.of(SHAPES[model])
            brute = flops.brute_force(grid.cells)
            whole = flops.brute_force(make_grid("fraction", *sizes).cells)
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
    parser.add_argument("--compare", type=int, default=4, help="prompts whose logits are compared, for each method")
    parser.add_argument("--kernel", default="auto", help="attention kernel")
    parser.add_argument("--flops-only", action="store_true")
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.flops_only:
        print_table(flops_rows(args))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(SHAPES[args.model], device)
    scorer = TrunkScorer(model, make_ranks("data_parallel", None, model.config, args.kernel), device)
    stock = Scorer(model, "data_parallel", Mesh(), device)
    for rows in measure(args, scorer, stock):
        path = write_results("needle_grid", rows, args.output)  # after each, since a later one may be cut off
        print_table(rows[-1:])
    print(path)


if __name__ == "__main__":
    main()
