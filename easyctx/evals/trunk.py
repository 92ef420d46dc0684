"""Answers of many prompts that begin alike, each scored for the price of what is its own.

Prompts of a needle grid are one haystack with a needle somewhere. Attention is causal, so up to the needle the keys
and values are the haystack's: they are computed once (the trunk) and kept, sharded over the ranks. A prompt then costs
one forward of the tokens from its first difference on. Prompts that share more than the trunk (a needle at one place
in texts of several lengths) go through the model together: the longest one's tokens, and beside them for each of the
others those that are its own, attending to as much of the longest as is theirs too.

What prompts share is found by comparing their token ids, so a score is that of the very prompt, whatever made it. It
equals that of a forward of the whole prompt up to rounding, since the same sums are taken in another order.

The keys of the trunk are kept for all layers: 2 x layers x key heads x head dim numbers a token, in bfloat16 and for 1M
tokens 16 GiB on each of 8 ranks for Llama-3-8B, 64 GiB for Llama-2-7B. Nothing is kept of what follows it. Where that
is too much (`layer_by_layer`), trunk and prompts go through the model side by side, and keys of one layer are all that
is kept; the trunk is then computed for each batch of prompts that the hidden states of `batch_tokens` make.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from easyctx.evals.scoring import AnswerScore, answer_score, check_answer_start
from easyctx.generation.calls import Branch, Call, Ranks
from easyctx.generation.context import PREFILL_CHUNK, Context
from easyctx.generation.layers import LayerKeys
from easyctx.generation.model import our_attention, run
from easyctx.generation.tails import Tail

# A branch is computed by every rank; what is longer is worth a forward of its own, shared out.
LONGEST_BRANCH = 1024


@dataclass(frozen=True)
class _Together:
    """Prompts of one call: their numbers, the call, the rows of it that are scored, and how much trunk it sees."""

    numbers: list[int]
    call: Call
    rows: list[int]
    needs: int

    @property
    def num_tokens(self) -> int:
        """On a rank."""
        return self.call.body + sum(len(branch.ids) for branch in self.call.branches)


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
        layer_by_layer: bool = False,
        batch_tokens: int = 1 << 20,
    ) -> None:
        """batch_tokens: tokens on a rank whose hidden states may be kept at a time, for `layer_by_layer`."""
        self.model, self.ranks, self.device = model, ranks, device
        self.chunk, self.offload = chunk, offload
        self.layer_by_layer, self.batch_tokens = layer_by_layer, batch_tokens
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
        calls = self._calls(prompts, answer_starts)
        with our_attention(self.model):
            for batch in self._batches(calls):
                for one, logits in zip(batch, self._run_batch(batch), strict=True):
                    counts = [len(prompts[i]) - answer_starts[i] for i in one.numbers]
                    found |= dict(zip(one.numbers, logits.split(counts), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _calls(self, prompts: Sequence[torch.Tensor], answer_starts: Sequence[int]) -> list[_Together]:
        """Prompts that share more than the trunk in one call, the longest one being its body."""
        calls, waiting = [], sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while waiting:
            longest = waiting[0]
            shared = {i: common_length(prompts[i], prompts[longest]) for i in waiting}
            together = [i for i in waiting if i == longest or len(prompts[i]) - shared[i] <= LONGEST_BRANCH]
            calls.append(self._call(together, prompts, answer_starts, shared))
            waiting = [i for i in waiting if i not in together]
        return calls

    def _call(
        self,
        together: list[int],
        prompts: Sequence[torch.Tensor],
        answer_starts: Sequence[int],
        shared: dict[int, int],
    ) -> _Together:
        assert self._trunk is not None
        ids = prompts[together[0]]
        start = common_length(ids, self._trunk.ids)
        own = max(answer_starts[together[0]] - 1 - start, 0) // self.ranks.multiple * self.ranks.multiple
        branches, rows, first = [], [], own // self.ranks.size
        for i in together:
            prompt, answer = prompts[i], answer_starts[i]
            sees = min(shared[i], start + own, answer - 1)
            # The last token predicts nothing that is asked.
            branches.append(Branch(prompt[sees:-1].tolist(), sees, Tail(sees)))
            rows += [first + j - sees for j in range(answer - 1, len(prompt) - 1)]
            first += len(prompt) - 1 - sees
        call = Call(self.ranks, self._trunk.store, start, ids[start : start + own], branches)
        return _Together(together, call, rows, min(start, max(branch.sees for branch in branches)))

    def _batches(self, calls: list[_Together]) -> Iterator[list[_Together]]:
        """One call at a time; layer by layer, as many as may be kept beside each other."""
        batch: list[_Together] = []
        for call in calls:
            size = sum(each.num_tokens for each in [*batch, call])
            if batch and (not self.layer_by_layer or size > self.batch_tokens):
                yield batch
                batch = []
            batch.append(call)
        if batch:
            yield batch

    def _run_batch(self, batch: list[_Together]) -> list[torch.Tensor]:
        """The logits of each call's rows."""
        assert self._trunk is not None
        needed = max(one.needs for one in batch)
        if not self.layer_by_layer or needed == 0:
            self._trunk.compute(needed)
            return [self._run(one.call, one.rows) for one in batch]
        length = -(-needed // self.ranks.multiple) * self.ranks.multiple
        keys = LayerKeys(self.ranks.runs(0, length))
        leader = Call(self.ranks, keys, body_ids=self._trunk.ids[:length], keep=True)
        for one in batch:
            one.call.store = keys
        followers = [functools.partial(self._run, one.call, one.rows) for one in batch]
        return keys.run(lambda: self._run(leader, []), followers)

    def _run(self, call: Call, rows: list[int]) -> torch.Tensor:
        self.num_computed += len(call.body_ids) + sum(len(branch.ids) for branch in call.branches)
        return run(self.model, call, rows, self.device)


def common_length(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many tokens two prompts have in common from the first one on."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length].numpy() != b[:length].numpy())
    return int(different[0]) if len(different) else length
