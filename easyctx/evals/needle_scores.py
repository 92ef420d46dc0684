"""The prompts of a needle grid, run: each alone or what they share once; and the one against the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyctx.evals.results import append_rows, write_json

if TYPE_CHECKING:
    import torch

    from easyctx.evals.needle_prompts import NeedlePrompts, Prompt
    from easyctx.evals.needle_settings import Cell, NeedleSettings
    from easyctx.evals.scoring import Scorer
    from easyctx.evals.session import Session
    from easyctx.evals.trunk import TrunkScorer

TRUNK_KEYS = {
    "auto": "the first of these that there is memory for",
    "device": "on the GPU",
    "host": "in host memory",
    "layers": "one layer at a time; the trunk is then computed for every few prompts",
}
# Of free memory for the trunk's keys, or the hidden states of several prompts; the rest is for one forward.
MEMORY_SHARE = 0.5
HIDDEN_STATES = 8  # of a token, while its prompt waits for others: residual, q, k, v, cosines and sines


def in_order(cells: Sequence[Cell], settings: NeedleSettings) -> list[Cell]:
    """Short prompts first; those of one trunk together."""
    trunk = settings.shift_haystack
    return sorted(cells, key=lambda cell: (cell.sample if trunk else 0, cell.length, cell.sample, cell.depth))


def make_trunk_scorer(session: Session, scorer: Scorer, max_length: int, keys: str = "auto") -> TrunkScorer | None:
    """What shares the prompts' beginnings; None, having said why, where every prompt must run alone.

    keys: where the trunk's are kept, one of `TRUNK_KEYS`.
    """
    from easyctx.evals.trunk import TrunkScorer
    from easyctx.generation.context import cache_bytes
    from easyctx.generation.model import make_ranks, shards_weights
    from easyctx.head import inner_model

    config = inner_model(scorer.model).config
    try:
        ranks = make_ranks(session.mode, session.mesh, config)
        needed = cache_bytes(config, max_length // ranks.size, session.dtype)
        on_device, on_host = _free_memory(session)
        if keys == "auto":
            room = {"device": MEMORY_SHARE * on_device, "host": MEMORY_SHARE * on_host}
            keys = next((where for where, free in room.items() if needed <= free), "layers")
        if shards_weights(scorer.model) and (session.mesh.dp_size > 1 or keys == "layers"):
            what = "go through the model one beside the other" if keys == "layers" else "are others on other ranks"
            raise ValueError(f"an engine gathers the model's weights for one forward at a time, and prompts {what}")
    except ValueError as error:
        session.say(f"every prompt is run alone: {error}")
        return None
    if keys != "device":
        session.say(f"the haystack's keys, {needed / 2**30:.1f} GiB a rank, are kept {TRUNK_KEYS[keys].split(';')[0]}")
    hidden = HIDDEN_STATES * config.get_text_config().hidden_size * session.dtype.itemsize
    return TrunkScorer(
        scorer.model,
        ranks,
        session.device,
        offload=keys == "host",
        layer_by_layer=keys == "layers",
        batch_tokens=int(MEMORY_SHARE * on_device / hidden),
    )


def _free_memory(session: Session) -> tuple[int, int]:
    """Bytes for each rank on its device and on the host, the same answer on all ranks."""
    import torch
    import torch.distributed as dist

    from easyctx.generation.context import free_bytes, host_free_bytes

    on_host = on_device = session.on_main(host_free_bytes)
    if session.device.type == "cuda":
        on_device = free_bytes(session.device, session.mesh)
        if session.mesh.dp_size > 1:
            least = torch.tensor(on_device, device=session.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            on_device = int(least)
    return on_device, on_host


def pieces_of_work(scorer: Scorer | TrunkScorer, prompts: NeedlePrompts, cells: list[Cell]) -> list[list[Cell]]:
    """The cells as they are run: those of a needle together; layer by layer, as many as there is memory for."""
    from easyctx.evals.trunk import TrunkScorer

    groups = prompts.together(cells)
    if not (isinstance(scorer, TrunkScorer) and scorer.layer_by_layer):
        return groups
    pieces: list[list[Cell]] = []
    room = 0
    for group in groups:
        size = max(cell.length for cell in group) // scorer.ranks.size
        # Each sample may have a haystack of its own.
        if pieces and size <= room and pieces[-1][0].sample == group[0].sample:
            pieces[-1] += group
            room -= size
        else:
            pieces.append(list(group))
            room = scorer.batch_tokens - size
    return pieces


def score_cells(
    session: Session, scorer: Scorer | TrunkScorer, prompts: NeedlePrompts, cells: list[Cell], rows_file: Path
) -> None:
    """Runs the cells and appends a row for each when its piece of work is done."""
    from tqdm import tqdm

    progress = tqdm(total=len(cells), desc="needle", unit="prompt", mininterval=0.5, disable=not session.is_main)
    for group, counts in session.share(pieces_of_work(scorer, prompts, cells)):
        rows = score_group(scorer, prompts, group)
        rows = session.gather(rows if counts else [])
        if session.is_main:
            append_rows(rows_file, rows)
        progress.update(len(rows))
        progress.set_postfix_str(f"{group[-1].length} tokens, depth {group[-1].depth:g}%", refresh=False)
    progress.close()


def score_group(scorer: Scorer | TrunkScorer, prompts: NeedlePrompts, group: list[Cell]) -> list[dict[str, Any]]:
    """The rows of a piece of work, in one go where the scorer shares."""
    import torch

    from easyctx.evals.trunk import TrunkScorer

    if not isinstance(scorer, TrunkScorer):
        return [score_prompt(scorer, prompts, prompts.build(cell)) for cell in group]
    built = [prompts.build(cell) for cell in group]
    scorer.follow(_trunk(prompts, group[0].sample))
    begin = time.perf_counter()
    scores = scorer.score_answers(
        [torch.from_numpy(prompt.ids) for prompt in built], [prompt.answer_start for prompt in built]
    )
    seconds = (time.perf_counter() - begin) / len(group)
    return [_row(prompts, prompt, score, seconds) for prompt, score in zip(built, scores, strict=True)]


def score_prompt(scorer: Scorer, prompts: NeedlePrompts, prompt: Prompt) -> dict[str, Any]:
    """One row of cells.jsonl."""
    import torch

    begin = time.perf_counter()
    [score] = scorer.score_answers([torch.from_numpy(prompt.ids)], [prompt.answer_start])
    return _row(prompts, prompt, score, time.perf_counter() - begin)


def _row(prompts: NeedlePrompts, prompt: Prompt, score: Any, seconds: float) -> dict[str, Any]:
    predicted = prompts.encoder.decode(score.predicted)
    return {
        "length": prompt.cell.length,
        "depth": prompt.cell.depth,
        "sample": prompt.cell.sample,
        "prompt_hash": prompt.hash,
        "seed": prompts.settings.seed,
        "needle_start": prompt.needle_start,
        "expected": prompt.answer,
        "prediction": predicted,
        "correct": all(score.right),
        "substring": prompt.answer in predicted,
        "token_accuracy": sum(score.right) / len(score.right),
        "logprob": sum(score.logprob),
        "seconds": round(seconds, 4),
    }


def verify(
    session: Session,
    scorer: Scorer,
    trunk: TrunkScorer,
    prompts: NeedlePrompts,
    cells: list[Cell],
    number: int,
    file: Path,
) -> None:
    """Runs `number` of the cells, spread over the grid, both ways; says and writes how far their logits differ."""
    import torch

    number = min(number, len(cells))
    chosen = [cells[(2 * i + 1) * len(cells) // (2 * number)] for i in range(number)]
    found = []
    for cell, counts in session.share(in_order(chosen, prompts.settings)):
        prompt = prompts.build(cell)
        ids = torch.from_numpy(prompt.ids)
        trunk.follow(_trunk(prompts, cell.sample))
        # Together with the cells that share its needle, as it was scored.
        group = next(group for group in prompts.together(cells) if cell in group)
        built = [prompts.build(each) for each in group]
        shared = trunk.answer_logits(
            [torch.from_numpy(each.ids) for each in built], [each.answer_start for each in built]
        )[group.index(cell)].float()
        alone = scorer.answer_logits(ids, prompt.answer_start).float()
        difference = {
            "length": cell.length,
            "depth": cell.depth,
            "sample": cell.sample,
            "max_logit_difference": float((shared - alone).abs().max()),
            "largest_logit": float(alone.abs().max()),
            "same_predictions": torch.equal(shared.argmax(-1), alone.argmax(-1)),
        }
        found += session.gather([difference] if counts else [])
    worst = max(each["max_logit_difference"] for each in found)
    same = sum(each["same_predictions"] for each in found)
    session.say(
        f"verified {len(found)} prompts against running each alone: logits differ by at most {worst:.3g} "
        f"(they reach {max(each['largest_logit'] for each in found):.3g}); {same} of {len(found)} predict the same"
    )
    session.on_main(lambda: write_json(file, {"max_logit_difference": worst, "prompts": found}))


def _trunk(prompts: NeedlePrompts, sample: int) -> torch.Tensor:
    import torch

    return torch.from_numpy(prompts.trunk(sample))
