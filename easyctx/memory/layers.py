"""Decoder layers that keep what was chosen for them, and make the rest again in their backward.

Each call of a layer is a checkpoint (PyTorch's, non-reentrant) over a `Run`, which knows how to have the layer's input
and attention's result again: from where they were kept, or from the layers before.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from easyctx.memory.choices import LayerChoice
from easyctx.memory.gather import gathered
from easyctx.memory.kept import Kept, keep_at
from easyctx.memory.recall import Result, keeping
from easyctx.memory.spill import Spill

Phase = Literal["forward", "backward", "input of the next"]


class Layer:
    """A decoder layer under a choice. `forward` is what its module had before."""

    def __init__(
        self, module: nn.Module, index: int, choice: LayerChoice, spill: Spill | None, has_dropout: bool
    ) -> None:
        self.module, self.index, self.choice, self.spill = module, index, choice, spill
        self.forward: Callable[..., Any] = module.forward
        self.has_dropout = has_dropout
        self.previous: Layer | None = None
        self.has_next = False
        self.newest: Run | None = None  # of the forward that is under way, until the next layer took it
        self.counts = {"forward": 0, "backward": 0, "input of the next": 0}

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(hidden, *args, **kwargs)
        before = self.previous.take_newest() if self.previous is not None else None
        if self.choice.everything:
            return self.forward(hidden, *args, **kwargs)
        run = Run(self, before, hidden, args, kwargs)
        self.newest = run if self.has_next else None
        # A tensor among the arguments tells PyTorch the device; the input itself is the run's affair.
        out = checkpoint(run, hidden.new_empty(0), use_reentrant=False, preserve_rng_state=self.has_dropout)
        run.leave_forward(out)
        return out

    def take_newest(self) -> "Run | None":
        run, self.newest = self.newest, None
        return run


class Run:
    """One call of a layer: its forward, its rerun in the backward, and reruns for later layers' inputs."""

    def __init__(
        self, layer: Layer, before: "Run | None", hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.layer, self.before, self.args, self.kwargs = layer, before, args, kwargs
        self.needs_gradient = hidden.requires_grad
        self.phase: Phase = "forward"
        self.hidden: torch.Tensor | None = hidden
        self.input: Kept | None = None
        self.attention: tuple[Kept, Kept] | None = None
        if layer.choice.inputs != "recompute":
            self.input = keep_at(hidden, layer.choice.inputs, layer.index, layer.spill)
        # Whether the layer's MLP result is only added to something, and need not exist in the backward.
        self.mlp_is_only_added = False
        self.mlp_node: Any = None

    def __call__(self, _: torch.Tensor) -> Any:
        """What PyTorch checkpoints: the first call is the forward's, the second the backward's."""
        if self.phase == "forward":
            assert self.hidden is not None
            return self._run(self.hidden)
        self.phase = "backward"
        hidden = self._take_input().requires_grad_(self.needs_gradient)
        if self.before is not None:
            self.before.prefetch()
        return self._run(hidden)

    def leave_forward(self, out: Any) -> None:
        """The forward is over: from now on the input is had from where it is kept."""
        self.hidden, self.phase = None, "backward"
        self.mlp_is_only_added = is_only_added(_hidden_of(out).grad_fn, self.mlp_node)
        self.mlp_node = None

    def prefetch_attention(self) -> None:
        for part in self.attention or ():
            part.prefetch()

    def prefetch(self) -> None:
        """The backward of this layer comes next: fetch what it begins with."""
        start: Run = self
        while start.input is None and start.before is not None:
            start = start.before
        start.prefetch_attention()
        if start.input is not None:
            start.input.prefetch()

    def recall(self) -> Result | None:
        if self.attention is None or self.phase == "forward":
            return None
        out, lse = (part.get(keep=self.phase == "input of the next") for part in self.attention)
        return out, lse

    def keep(self, result: Result) -> None:
        if self.phase == "forward" and (place := self.layer.choice.attention) != "recompute":
            assert self.attention is None, "a layer called its attention twice"
            out, lse = (keep_at(part, place, self.layer.index, self.layer.spill) for part in result)
            self.attention = out, lse

    def _run(self, hidden: torch.Tensor) -> Any:
        self.layer.counts[self.phase] += 1
        with keeping(self):
            return self.layer.forward(hidden, *self.args, **self.kwargs)

    def _take_input(self) -> torch.Tensor:
        """This layer's input, without a graph, for the last time."""
        return self._make_inputs() if self.input is None else self.input.get()

    @torch.no_grad()
    def _make_inputs(self) -> torch.Tensor:
        """Run the layers from the last kept input up to this one.

        The inputs of those between stay, where that kept one was, until their backwards.
        """
        runs: list[Run] = []
        start: Run = self
        while start.input is None:
            runs.append(start)
            assert start.before is not None, "a layer whose input was not kept has none before it in this forward"
            start = start.before
        place = start.layer.choice.inputs
        hidden = start.input.get(keep=True)
        for later in reversed(runs):
            before = later.before
            assert before is not None
            later.prefetch_attention()
            # The layer before this one is the next whose backward runs: its weights can stay together.
            with gathered(before.layer.module, before.layer.forward, stays=later is self) as forward:
                hidden = before._rerun(forward, hidden)
            if later is not self:
                later.input = keep_at(hidden, place, later.layer.index, later.layer.spill)
        return hidden

    def _rerun(self, forward: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        self.phase = "input of the next"
        self.layer.counts[self.phase] += 1
        with keeping(self):
            out = _hidden_of(forward(hidden, *self.args, **self.kwargs))
        self.phase = "backward"
        return out


def _hidden_of(out: Any) -> torch.Tensor:
    """A layer's hidden states, which some families return as the first of several."""
    return out[0] if isinstance(out, tuple) else out


def is_only_added(node: Any, wanted: Any) -> bool:
    """Whether `wanted`'s result reaches `node` through sums alone, which keep nothing for their backward."""
    while node is not None and wanted is not None:
        if node is wanted:
            return True
        if node.name() not in ("AddBackward0", "PreBackwardFunctionForModuleBackward"):
            return False
        inputs = [function for function, _ in node.next_functions]
        if wanted in inputs:
            return True
        # The result is the last summand of a residual layer.
        node = inputs[-1]
    return False
