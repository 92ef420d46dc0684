"""What every eval asks of a model: log-probability and argmax of given tokens, under any mode.

The model runs as it is; only its output head is replaced for the length of one forward by one that goes over
the scored rows in chunks and keeps two numbers of each. So logits exist for one chunk at a time, each rank
scores the positions it holds, and all modules are called through the model's own forward, as ZeRO-3 and FSDP2
need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from easyctx.documents import Documents
from easyctx.head import inner_model, post_process, replaced_forward, rows_of_a_tile
from easyctx.inputs import IGNORE_INDEX, gather_sequence, prepare_seq_parallel_inputs
from easyctx.mesh import Mesh


@dataclass(frozen=True)
class Scored:
    """For each position of input_ids [B, S]: logprob float32 of its target and argmax int64, on the CPU.

    Both are 0 where the target is -100.
    """

    logprob: torch.Tensor
    predicted: torch.Tensor


@dataclass(frozen=True)
class AnswerScore:
    """One prompt's answer of n tokens, teacher forced: lists of n, in order."""

    predicted: list[int]
    right: list[bool]
    logprob: list[float]


def check_answer_start(start: int, length: int) -> None:
    """ValueError for an answer without a token, or without anything before it."""
    if not 1 <= start < length:
        raise ValueError(f"an answer that starts at token {start} of {length} is not scored")


def answer_score(logits: torch.Tensor, wanted: torch.Tensor) -> AnswerScore:
    """The score of the tokens `wanted` `[n]` by the logits `[n, V]` that predict them."""
    logits, wanted = logits.float(), wanted.to(logits.device)
    predicted = logits.argmax(-1)
    logprob = logits.gather(-1, wanted[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return AnswerScore(predicted.tolist(), (predicted == wanted).tolist(), logprob.tolist())


class Scorer:
    """A loaded model with the mode and the mesh it runs under. All ranks must make the same calls."""

    def __init__(self, model: nn.Module, mode: str, mesh: Mesh, device: torch.device):
        self.model = model
        self.mode = mode
        self.mesh = mesh
        self.device = device

    @torch.no_grad()  # in inference mode FSDP2 would make buffers that training cannot use afterwards
    def score_targets(
        self, input_ids: torch.Tensor, target_ids: torch.Tensor, documents: Documents | None = None
    ) -> Scored:
        """Scores target_ids[b, i] as the token that follows input_ids[b, i] (both [B, S] int64).

        -100 is not scored. Position ids are 0..S-1, or each document's own in rows of several.
        """
        length = input_ids.shape[1]
        positions = None if documents else torch.arange(length).expand_as(input_ids)
        local = prepare_seq_parallel_inputs(
            self.mode,
            input_ids,
            positions,
            target_ids,
            self.mesh.sp_rank,
            self.mesh.sp_size,
            self.device,
            documents=documents,
            ring_degree=self.mesh.ring_degree,
        )
        borders = {"documents": local["documents"]} if "documents" in local else {}
        logprob, predicted = self._score_shard(
            local["local_input_ids"], local["local_position_ids"], local["local_target_ids"], **borders
        )
        gathered = [gather_sequence(self.mode, each, self.mesh, length).cpu() for each in (logprob, predicted)]
        return Scored(*gathered)

    def score_answers(self, prompts: list[torch.Tensor], answer_starts: list[int]) -> list[AnswerScore]:
        """Scores ids[start:] of each prompt ([S] int64, one length for all) under teacher forcing."""
        input_ids = torch.stack(prompts)
        targets = torch.full_like(input_ids, IGNORE_INDEX)
        for row, start in enumerate(answer_starts):
            check_answer_start(start, input_ids.shape[1])
            targets[row, start - 1 : -1] = input_ids[row, start:]
        scored = self.score_targets(input_ids, targets)
        answers = []
        for row, start in enumerate(answer_starts):
            wanted = input_ids[row, start:].cpu()
            predicted = scored.predicted[row, start - 1 : -1]
            answers.append(
                AnswerScore(
                    predicted=predicted.tolist(),
                    right=(predicted == wanted).tolist(),
                    logprob=scored.logprob[row, start - 1 : -1].tolist(),
                )
            )
        return answers

    @torch.inference_mode()
    def answer_logits(self, prompt: torch.Tensor, answer_start: int) -> torch.Tensor:
        """Logits `[n, V]` that predict the n tokens of ids[answer_start:] (`[S]` int64), on every rank."""
        check_answer_start(answer_start, len(prompt))
        length = len(prompt)
        mesh, first, num_rows = self.mesh, answer_start - 1, length - answer_start
        numbers = torch.arange(length)[None]
        local = prepare_seq_parallel_inputs(
            self.mode, prompt[None], numbers, None, mesh.sp_rank, mesh.sp_size, self.device,
            ring_degree=mesh.ring_degree,
        )  # fmt: skip
        positions = local["local_position_ids"]
        # Padding repeats the last position, which is not asked for.
        mine = ((positions[0] >= first) & (positions[0] < length - 1)).nonzero().squeeze(1)
        rows = mine if len(mine) else torch.zeros(1, dtype=torch.long, device=self.device)
        output = self.model(
            input_ids=local["local_input_ids"], position_ids=positions, use_cache=False, logits_to_keep=rows
        )
        logits = output.logits.new_zeros(num_rows, output.logits.shape[-1])
        if len(mine):
            logits[positions[0, mine] - first] = output.logits[0]
        if mesh.sp_size > 1:
            dist.all_reduce(logits, group=mesh.sp_group)
        return logits

    def _score_shard(
        self, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, **borders: Documents
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprob = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
        predicted = torch.zeros_like(targets)
        scored = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
        # A rank without a scored row scores one for nothing: all ranks make the same calls.
        rows = scored if len(scored) else torch.zeros(1, dtype=torch.long, device=targets.device)
        every_row = len(rows) == targets.shape[1]
        with _chunked_head(self.model, targets[:, rows]) as result:
            output = self.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=0 if every_row else rows,
                **borders,
            )
        self._check_first_row(output.logits, result)
        valid = targets[:, rows] != IGNORE_INDEX
        logprob[:, rows] = torch.where(valid, result["logprob"], 0.0)
        predicted[:, rows] = torch.where(valid, result["predicted"], 0)
        return logprob, predicted

    @staticmethod
    def _check_first_row(logits: torch.Tensor, result: dict[str, torch.Tensor]) -> None:
        """The model's own first row of logits must be ours: it shows that nothing is done to them later."""
        ours, own = result["first_row"], logits[:, 0].float()
        if ours.shape != own.shape or not torch.allclose(ours, own, rtol=2e-2, atol=2e-2, equal_nan=True):
            raise ValueError(
                "this model does something to its logits after its output head that the evals do not know"
                f" (largest difference {(ours - own).abs().max().item():.3g}); scores would be wrong"
            )


@contextmanager
def _chunked_head(model: nn.Module, targets: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """For one forward, the output head scores the rows it is given against `targets` [B, R] in chunks.

    Fills the yielded dict with logprob and predicted [B, R] and first_row [B, V] float32; the model gets
    only the first row's logits.
    """
    inner = inner_model(model)
    head, config = inner.get_output_embeddings(), inner.config.get_text_config()
    original = head.forward
    result: dict[str, torch.Tensor] = {}

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, R, hidden size]."""
        first = original(hidden[:, :1])
        result["first_row"] = post_process(first[:, 0].float(), config)
        rows = max(1, rows_of_a_tile(first.shape[-1]) // len(hidden))
        parts = []
        for begin in range(0, hidden.shape[1], rows):
            part_targets = targets[:, begin : begin + rows].clamp_min(0)
            logits = post_process(original(hidden[:, begin : begin + rows]).float(), config)
            wanted = logits.gather(-1, part_targets[..., None]).squeeze(-1)
            parts.append((wanted - logits.logsumexp(-1), logits.argmax(-1)))
        result["logprob"] = torch.cat([logprob for logprob, _ in parts], dim=1)
        result["predicted"] = torch.cat([predicted for _, predicted in parts], dim=1)
        return first

    with replaced_forward(head, forward):
        yield result
