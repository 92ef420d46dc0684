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

# Of free memory for the trunk's keys; the rest is for the forward of the longest prompt.
TRUNK_SHARE = 0.5


def in_order(cells: Sequence[Cell], settings: NeedleSettings) -> list[Cell]:
    """Short prompts first; those of one trunk together."""
    trunk = settings.shift_haystack
    return sorted(cells, key=lambda cell: (cell.sample if trunk else 0, cell.length, cell.sample, cell.depth))


def make_trunk_scorer(session: Session, scorer: Scorer, max_length: int) -> TrunkScorer | None:
    """What shares the prompts' beginnings; None, having said why, where every prompt must run alone."""
    from easyctx.evals.trunk import TrunkScorer
    from easyctx.generation.context import cache_bytes, free_bytes, host_free_bytes
    from easyctx.generation.model import make_ranks, shards_weights
    from easyctx.head import inner_model

    config = inner_model(scorer.model).config
    offload = False
    try:
        ranks = make_ranks(session.mode, session.mesh, config)
        if session.mesh.dp_size > 1 and shards_weights(scorer.model):
            raise ValueError("the model's weights are sharded over ranks that have different prompts")
        needed = cache_bytes(config, max_length // ranks.size, session.dtype)
        if session.device.type == "cuda":
            offload = needed > TRUNK_SHARE * free_bytes(session.device, session.mesh)
        host = session.on_main(host_free_bytes)
        if (offload or session.device.type == "cpu") and needed > TRUNK_SHARE * host:
            raise ValueError(
                f"the haystack's keys take {needed / 2**30:.0f} GiB a rank, and {host / 2**30:.0f} GiB of host memory "
                "are free for each"
            )
    except ValueError as error:
        session.say(f"every prompt is run alone: {error}")
        return None
    if offload:
        session.say(f"the haystack's keys, {needed / 2**30:.1f} GiB a rank, are kept in host memory")
    return TrunkScorer(scorer.model, ranks, session.device, offload=offload)


def score_cells(
    session: Session, scorer: Scorer | TrunkScorer, prompts: NeedlePrompts, cells: list[Cell], rows_file: Path
) -> None:
    """Runs the cells and appends a row for each; those that share a needle are one piece of work."""
    from tqdm import tqdm

    progress = tqdm(total=len(cells), desc="needle", unit="prompt", mininterval=0.5, disable=not session.is_main)
    for group, counts in session.share(prompts.together(cells)):
        rows = score_group(scorer, prompts, group)
        rows = session.gather(rows if counts else [])
        if session.is_main:
            append_rows(rows_file, rows)
        progress.update(len(rows))
        progress.set_postfix_str(f"{group[-1].length} tokens, depth {group[-1].depth:g}%", refresh=False)
    progress.close()


def score_group(scorer: Scorer | TrunkScorer, prompts: NeedlePrompts, group: list[Cell]) -> list[dict[str, Any]]:
    """The rows of cells that share a needle, in one go where the scorer shares."""
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
