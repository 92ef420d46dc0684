"""`easyctx recipe`: run the stages of a context extension one after the other."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from easyctx.recipe.commands import Node


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `easyctx recipe`."""
    parser.description = (
        "Run the stages of a recipe, each a run of the train loop that starts from the last one's weights. The same "
        "command again goes on where it stopped. All stages are checked before the first starts."
    )
    parser.epilog = (
        "Exit status: 0, 2 bad input, 128 and the signal's number where one stopped it, else that of the failed stage."
    )
    parser.add_argument("recipe", metavar="FILE", help="YAML, such as train_scripts/llama2_7b_512k.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check, and print every command and its prediction")
    parser.add_argument("--shell", action="store_true", help="print the recipe as a shell script")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="begin anew at this stage; older results stay")
    group = parser.add_argument_group("several nodes: run the recipe on each of them, on a disk that all share")
    group.add_argument("--machine-rank", type=int, metavar="N", help="of this node, from 0")
    group.add_argument("--main-process-ip", metavar="ADDRESS", help="of node 0")
    group.add_argument("--main-process-port", type=int, default=29500, metavar="PORT", help="there (default: 29500)")


def run(args: argparse.Namespace) -> int:
    """Check, then run; raises `ValueError` for a user's mistake."""
    import sys

    from easyctx.recipe.check import check_machine, check_recipe
    from easyctx.recipe.process import Interrupted
    from easyctx.recipe.read import read_recipe
    from easyctx.recipe.run import StageFailed, check_done, run_recipe
    from easyctx.recipe.script import dry_run, script

    recipe = read_recipe(args.recipe)
    notes = check_recipe(recipe, args.start)
    if args.shell:
        print(script(recipe), end="")
        return 0
    check_done(recipe, args.start)
    for note in notes:
        print(f"easyctx: {note}")
    if args.dry_run:
        print("\n".join(dry_run(recipe)))
        return 0
    node = _node(args, max(stage.nodes for stage in recipe.stages))
    check_machine(recipe)
    try:
        run_recipe(recipe, start=args.start, node=node)
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status if error.status > 0 else 128 - error.status
    except Interrupted as error:
        print(f"easyctx: stopped by {error}; the same command without --from goes on", file=sys.stderr)
        return 128 + error.number
    return 0


def _node(args: argparse.Namespace, nodes: int) -> Node | None:
    from easyctx.recipe.commands import Node

    if nodes == 1:
        return None
    if args.machine_rank is None or args.main_process_ip is None:
        raise ValueError(f"{args.recipe} is for {nodes} nodes: give --machine-rank N and --main-process-ip ADDRESS")
    if not 0 <= args.machine_rank < nodes:
        raise ValueError(f"--machine-rank is {args.machine_rank}, outside 0 .. {nodes - 1} of {nodes} nodes")
    return Node(str(args.machine_rank), args.main_process_ip, str(args.main_process_port))
