"""The optimizer and the course of its learning rate, whose only source is the command line."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from easyctx.training.config import TrainConfig

# Muon's rate for one of AdamW where its steps are scaled to be as long as AdamW's. A little more is better for it.
MUON_RATE = 2.5


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with the groups and the state of both."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._both = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        # Loading a state, which accelerate does too, exchanges both the groups and the state of this one.
        of_muon = len(self._both[0].param_groups)
        for part, groups in zip(self._both, (self.param_groups[:of_muon], self.param_groups[of_muon:]), strict=True):
            part.param_groups, part.state = groups, self.state
            part.step()


def layer_matrices(model: torch.nn.Module) -> list[torch.Tensor]:
    """The trained weights of the linear layers inside the decoder's layers: not embeddings, head, norms or biases."""
    linear = [m for name, m in model.named_modules() if ".layers." in name and isinstance(m, torch.nn.Linear)]
    return [m.weight for m in linear if m.weight.requires_grad]


def make_muon(model: torch.nn.Module, settings: dict[str, Any]) -> MuonAndAdamW:
    """Muon for the layers' matrices, at MUON_RATE times the rate, and AdamW for the rest."""
    matrices = layer_matrices(model)
    if not matrices:
        raise ValueError(
            f"--optimizer muon is for the linear layers of a decoder, and {type(model).__name__} has none that are "
            "trained: take --optimizer adamw"
        )
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    muon = torch.optim.Muon(
        [{"params": matrices, "rate_ratio": MUON_RATE}],
        lr=MUON_RATE * settings["lr"],
        weight_decay=settings["weight_decay"],
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW(muon, torch.optim.AdamW(others, fused=torch.cuda.is_available(), **settings))


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """What --optimizer names; DeepSpeed exchanges PyTorch's AdamW for its own where the optimizer is offloaded."""
    settings: dict[str, Any] = dict(
        lr=config.learning_rate,
        betas=(config.adam_betas[0], config.adam_betas[1]),
        weight_decay=config.weight_decay,
    )
    if config.optimizer == "muon":
        return make_muon(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        # fused: without the temporary copies that the default makes on a GPU
        return torch.optim.AdamW(trained, fused=torch.cuda.is_available(), **settings)
    from bitsandbytes import optim

    kinds = {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return kinds[config.optimizer](trained, **settings)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step `step` (from 0): a linear warm-up, then constant, or down to zero at the end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = config.max_train_steps - config.warmup_steps
    done = (step - config.warmup_steps) / max(left, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_schedule]
    return config.learning_rate * factor


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_ratio", 1.0)


def clip(model: Any, max_grad_norm: float, accelerator: Accelerator) -> Any:
    """Clip the global gradient norm and return what it was (0 only measures it). DeepSpeed clips by itself."""
    return accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
