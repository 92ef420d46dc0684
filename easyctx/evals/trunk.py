"""Answers of many prompts that begin alike, each scored for the price of what is its own.

Prompts of a needle grid are one haystack with a needle somewhere. Attention is causal, so up to the needle the keys
and values are the haystack's: they are computed once (the trunk) and kept, sharded over the ranks. A prompt then costs
one forward of the tokens from its first difference on. Prompts that share more than the trunk (a needle at one place
in texts of several lengths) go through the model together: the longest one's tokens, and beside them for each of the
others those that are its own, attending to as much of the longest as is theirs too.

What prompts share is found by comparing their token ids, so a score is that of the very prompt, whatever made it. It
equals that of a forward of the whole prompt up to rounding, since the same sums are taken in another order.

The keys of the trunk are kept for all layers: 2 x layers x key heads x head dim numbers a token (16 GiB a rank for
Llama-3-8B at 1M tokens on 8 ranks in bfloat16). Nothing is kept of what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from easyctx.evals.scoring import AnswerScore, answer_score, check_answer_start
from easyctx.generation.calls import Branch, Call, Ranks
from easyctx.generation.context import PREFILL_CHUNK, Context
from easyctx.generation.model import our_attention, run
from easyctx.generation.store import Tail

# A branch is computed by every rank; what is longer is worth a forward of its own, shared out.
LONGEST_BRANCH = 1024


class TrunkScorer:
    """Scores prompts against a trunk. All ranks that share a sequence must make the same calls."""

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        device: torch.device,
        *,
        chunk: int = PREFILL_CHUNK,
        offload: bool = False,
    ) -> None:
        self.model, self.ranks, self.device = model, ranks, device
        self.chunk, self.offload = chunk, offload
        self.num_computed = 0  # tokens that went through the model, over all ranks
        self._trunk: Context | None = None
        self._trunk_ids: torch.Tensor | None = None

    def follow(self, trunk: torch.Tensor) -> None:
        """Take these token ids (int64 `[n]`) as what prompts begin with. The same ones again cost nothing."""
        if self._trunk_ids is None or not torch.equal(trunk, self._trunk_ids):
            self._trunk = None  # before the next one takes its memory
            self._trunk_ids = trunk
            self._trunk = Context(lambda call: self._run(call, []), self.ranks, trunk, self.chunk, offload=self.offload)

    def score_answers(self, prompts: Sequence[torch.Tensor], answer_starts: Sequence[int]) -> list[AnswerScore]:
        """Scores ids[start:] of each prompt (int64 `[S]`, of any lengths) under teacher forcing."""
        logits = self.answer_logits(prompts, answer_starts)
        return [
            answer_score(rows, prompt[start:])
            for rows, prompt, start in zip(logits, prompts, answer_starts, strict=True)
        ]

    @torch.inference_mode()
    def answer_logits(self, prompts: Sequence[torch.Tensor], answer_starts: Sequence[int]) -> list[torch.Tensor]:
        """Logits `[n, V]` that predict the n tokens of each prompt's answer, on the device."""
        for prompt, start in zip(prompts, answer_starts, strict=True):
            check_answer_start(start, len(prompt))
        found: dict[int, torch.Tensor] = {}
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while waiting:
            longest = waiting[0]
            shared = {i: common_length(prompts[i], prompts[longest]) for i in waiting}
            together = [i for i in waiting if i == longest or len(prompts[i]) - shared[i] <= LONGEST_BRANCH]
            chosen = [(prompts[i], answer_starts[i], shared[i]) for i in together]
            found |= dict(zip(together, self._together(chosen), strict=True))
            waiting = [i for i in waiting if i not in found]
        return [found[i] for i in range(len(prompts))]

    def _together(self, prompts: list[tuple[torch.Tensor, int, int]]) -> list[torch.Tensor]:
        """One call for prompts (ids, start of the answer, tokens shared with the first one, which is the longest)."""
        ids, answer_start, _ = prompts[0]
        assert self._trunk is not None
        start = common_length(ids, self._trunk.ids)
        own = max(answer_start - 1 - start, 0) // self.ranks.multiple * self.ranks.multiple
        branches, rows, first = [], [], own // self.ranks.size
        for prompt, answer, shared in prompts:
            sees = min(shared, start + own, answer - 1)
            # The last token predicts nothing that is asked.
            branches.append(Branch(prompt[sees:-1].tolist(), sees, Tail(sees)))
            rows += [first + i - sees for i in range(answer - 1, len(prompt) - 1)]
            first += len(prompt) - 1 - sees
        with our_attention(self.model):
            self._trunk.compute(min(start, max(branch.sees for branch in branches)))
            call = Call(self.ranks, self._trunk.store, start, ids[start : start + own], branches)
            logits = self._run(call, rows)
        return list(logits.split([len(prompt) - answer for prompt, answer, _ in prompts]))

    def _run(self, call: Call, rows: list[int]) -> torch.Tensor:
        self.num_computed += len(call.body_ids) + sum(len(branch.ids) for branch in call.branches)
        return run(self.model, call, rows, self.device)


def common_length(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many tokens two prompts have in common from the first one on."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length].numpy() != b[:length].numpy())
    return int(different[0]) if len(different) else length
