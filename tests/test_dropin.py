"""Scripts in the manner of EasyContext, whose users change one import line: its train loop and its needle eval."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader

from easyctx import apply_seq_parallel_monkey_patch, prepare_dataloader, prepare_seq_parallel_inputs
from tests.models import VOCAB, tiny_model

SEQ_LENGTH, STEPS = 48, 3  # a length that divides, as EasyContext wants it


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCAB, (SEQ_LENGTH + 1,), generator=generator)} for _ in range(STEPS)]


def new_accelerator() -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state() if state is not PartialState else state._shared_state.clear()
    return Accelerator(cpu=True)


def train_loop(parallel_mode: str, family: str) -> list[float]:
    """Loss of each step: patch by family name after the model is made, positional arguments, mean over the shard."""
    accelerator = new_accelerator()
    model = tiny_model(family, torch.float64)
    apply_seq_parallel_monkey_patch(parallel_mode, family)
    loader = DataLoader(rows(), batch_size=1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = prepare_dataloader(parallel_mode, loader, accelerator)
    loss_func = torch.nn.CrossEntropyLoss()
    losses = []
    for batch in loader:
        input_ids = batch["input_ids"][..., : SEQ_LENGTH + 1][..., :-1]
        target_ids = batch["input_ids"][..., : SEQ_LENGTH + 1][..., 1:]
        position_ids = torch.arange(SEQ_LENGTH).unsqueeze(0).expand(input_ids.shape[0], -1)
        prepared = prepare_seq_parallel_inputs(
            parallel_mode,
            input_ids,
            position_ids,
            target_ids,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        local_target_ids = prepared["local_target_ids"]
        logits = model(prepared["local_input_ids"], position_ids=prepared["local_position_ids"]).logits
        loss = loss_func(logits.reshape(-1, logits.shape[-1]), local_target_ids.reshape(-1))
        accelerator.backward(loss)
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        optimizer.step()
        optimizer.zero_grad()
    apply_seq_parallel_monkey_patch("data_parallel", family)
    return losses


def undo_extract_local(gathered: torch.Tensor, world_size: int) -> torch.Tensor:
    """What eval scripts for the zigzag layout carry along: 2P chunks, rank r holding r and 2P - 1 - r."""
    chunks = gathered.chunk(2 * world_size, dim=1)
    order = [None] * (2 * world_size)
    for rank in range(world_size):
        order[rank], order[2 * world_size - 1 - rank] = chunks[2 * rank], chunks[2 * rank + 1]
    return torch.cat(order, dim=1)


def eval_loop() -> torch.Tensor:
    """Predicted tokens of one row."""
    accelerator = new_accelerator()
    model = tiny_model("llama", torch.float64)
    apply_seq_parallel_monkey_patch("zigzag_ring_attn", "llama")
    input_ids = rows()[0]["input_ids"][None, :-1]
    positions = torch.arange(SEQ_LENGTH).unsqueeze(0)
    prepared = prepare_seq_parallel_inputs(
        "zigzag_ring_attn",
        input_ids,
        positions,
        None,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
    )
    with torch.inference_mode():
        logits = model(prepared["local_input_ids"], position_ids=prepared["local_position_ids"], use_cache=False).logits
    predicted = accelerator.gather(logits.argmax(dim=-1).squeeze(0)).unsqueeze(0)
    apply_seq_parallel_monkey_patch("data_parallel", "llama")
    return undo_extract_local(predicted, accelerator.num_processes)


def run_train_loop(rank, world, mode, family):
    return train_loop(mode, family)


def run_eval_loop(rank, world):
    return eval_loop()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("mode", ["zigzag_ring_attn", "dist_flash_attn", "ulysses_attn"])
def test_train_loop(ranks, mode, family):
    model = tiny_model(family, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    want = []
    for row in rows():
        ids = row["input_ids"][None]
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:])
        loss.backward()
        want.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    for losses in ranks(4).run(run_train_loop, mode, family):
        assert losses == pytest.approx(want, rel=1e-10)


def test_eval_loop(ranks):
    want = tiny_model("llama", torch.float64)(rows()[0]["input_ids"][None, :-1]).logits.argmax(-1)
    for predicted in ranks(4).run(run_eval_loop):
        assert torch.equal(predicted, want)
