"""Answers that a model gives while it is trained, by the sharded generator; training goes on as if they were not."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from easyctx.adapters.folder import tokenizer_source
from easyctx.data.prompts import read_prompts
from easyctx.data.tokenizer import load_tokenizer
from easyctx.generation import Answer, Generator
from easyctx.generation.context import PREFILL_CHUNK, cache_bytes, free_bytes
from easyctx.generation.model import make_ranks, shards_weights
from easyctx.head import inner_model
from easyctx.mesh import Mesh
from easyctx.training.checkpoint_files import write_durably
from easyctx.training.config import TrainConfig
from easyctx.training.memory import RunMemory
from easyctx.training.random_state import random_state, set_random_state
from easyctx.training.ranks import Ranks

SAMPLES = "samples.jsonl"
GPU_SHARE = 0.5  # of what is free, for keys; the rest is for the activations of a chunk


def load_prompts(config: TrainConfig, model_config: Any, mesh: Mesh) -> list[list[int]]:
    """The token ids of --sample-prompts, none without it.

    Raises:
        ValueError: a model that the generator does not compute exactly; prompts that cannot be used.
    """
    if not config.sample_every:
        return []
    assert config.sample_prompts is not None
    try:
        make_ranks(config.parallel_mode, mesh, model_config, one_length=True)
        tokenizer = load_tokenizer(tokenizer_source(config.model))
        room = config.seq_length - config.sample_tokens
        prompts = read_prompts(config.sample_prompts, tokenizer, "--seq-length less --sample-tokens", room)
        largest, vocabulary = max(map(max, prompts)), model_config.get_text_config().vocab_size
        if largest >= vocabulary:
            raise ValueError(f"token id {largest} is outside the model's vocabulary of {vocabulary}")
    except ValueError as error:
        raise ValueError(f"--sample-prompts {config.sample_prompts}: {error}") from error
    return prompts


class Samples:
    """Has prompts answered on all ranks together, and keeps the answers in `samples.jsonl` of the output folder.

    Args:
        prompts: from `load_prompts`.
        step: after which the run goes on: rows of later steps, of a run that was cut short, are taken out.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, mesh: Mesh, prompts: list[list[int]], step: int
    ) -> None:
        self.config, self.accelerator, self.mesh, self.prompts = config, accelerator, mesh, prompts
        self.file = Path(config.output_dir) / SAMPLES
        if not prompts:
            return
        self.ranks = Ranks()
        self.tokenizer = load_tokenizer(tokenizer_source(config.model))
        if accelerator.is_main_process and self.file.exists():
            rows = [line for line in self.file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            partial = self.file.with_suffix(".partial")
            write_durably(partial, "".join(f"{row}\n" for row in rows))
            partial.replace(self.file)

    def run_if_due(self, model: Any, step: int) -> list[str]:
        """After every `sample_every`-th step, the answers, in the order of their prompts; else none."""
        if not self.prompts or step % self.config.sample_every:
            return []
        # Of weights that are whole everywhere the model itself: DDP's wrapper has its ranks wait for each other.
        runs = model if shards_weights(model) else self.accelerator.unwrap_model(model)
        with set_aside(model):
            answers = self._answers(runs)
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                for number, answer in enumerate(answers):
                    row = {"step": step, "prompt": number, "text": answer.text, "stopped_by": answer.stopped_by}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return [answer.text for answer in answers]

    def _answers(self, model: Any) -> list[Answer]:
        """Data-parallel ranks share the prompts; one that has none left repeats the last: all make the same calls."""
        mesh, last = self.mesh, len(self.prompts) - 1
        mine: dict[int, Answer] = {}
        for begin in range(0, len(self.prompts), mesh.dp_size):
            number = min(begin + mesh.dp_rank, last)
            mode, offload = self.config.parallel_mode, self._offloads(model, number)
            generator = Generator(model, self.tokenizer, mode, mesh, longest_chunk(model), offload)
            (mine[number],) = generator.answer(self.prompts[number], max_new_tokens=self.config.sample_tokens)
        found: dict[int, Answer] = {}
        for part in self.ranks.gather(mine):
            found |= part
        return [found[number] for number in range(len(self.prompts))]

    def _offloads(self, model: Any, number: int) -> bool:
        """Whether the keys of a prompt are better kept in host memory: training has left the GPU little room."""
        device = self.accelerator.device
        if device.type != "cuda":
            return False
        config = self.accelerator.unwrap_model(model).config
        share = len(self.prompts[number]) // self.mesh.sp_size
        return cache_bytes(config, share, torch.float32) > GPU_SHARE * free_bytes(device, self.mesh)


def longest_chunk(model: nn.Module) -> int:
    """Tokens of a rank that go through the model at a time: at most a tile of its MLPs.

    ZeRO-3 gathers weights for each tile, and ranks with other prompts must gather as often.
    """
    memory: RunMemory | None = getattr(inner_model(model), "easyctx_memory", None)
    tile = memory.decision.choices.mlp_tile if memory else 0
    return min(PREFILL_CHUNK, tile or PREFILL_CHUNK)


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """For the length of a `with`, training rests: all modules are in evaluation mode, and random numbers are lent."""
    modes, state = [(module, module.training) for module in model.modules()], random_state()
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        set_random_state(state)


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, of a run that was killed
