"""PoSE: short rows whose position ids are stretches of a long range, skipping what lies between them.

Positional skip-wise training (Zhu et al. 2023, arXiv 2309.10400). A row of S tokens is cut into stretches at random
places. The first keeps its positions; each later one is shifted by a skip drawn evenly between the last skip and L - S,
L being the length to learn. So the model meets the distances of L tokens at the cost of S. Attention stays causal over
the whole row; only RoPE sees the positions. The text is not skipped.
"""

import zlib
from typing import Any

import torch

from easyctx.backend import OWN
from easyctx.documents import Documents
from easyctx.inputs import prepare_seq_parallel_inputs
from easyctx.mesh import Mesh
from easyctx.training.config import TrainConfig

STRETCHES = 2


def skipped_positions(input_ids: torch.Tensor, target_length: int, seed: int) -> torch.Tensor:
    """Position ids int64 `[B, S]` below `target_length` for rows of S < `target_length` tokens.

    They follow from the seed and the row's ids alone: the ranks that share a row agree on them, and a resumed run
    draws them again. The same row gets the same skips whenever it comes.
    """
    length = input_ids.shape[1]
    return torch.stack([_row(row, length, target_length, seed) for row in input_ids.cpu()]).to(input_ids.device)


def _row(ids: torch.Tensor, length: int, target_length: int, seed: int) -> torch.Tensor:
    # Both in one number of 32 bits: torch's generator on a CPU takes no more of a seed.
    own_seed = zlib.crc32(ids.contiguous().numpy().tobytes(), zlib.crc32(str(seed).encode()))
    generator = torch.Generator().manual_seed(own_seed)
    borders = torch.randperm(length - 1, generator=generator)[: STRETCHES - 1].sort().values + 1
    positions, skip = torch.arange(length), 0
    for border in borders.tolist():
        more = int(torch.randint(target_length - length - skip + 1, (), generator=generator))
        positions[border:] += more
        skip += more
    return positions


def shard_with_skips(
    input_ids: torch.Tensor, target_ids: torch.Tensor, config: TrainConfig, mesh: Mesh, device: torch.device
) -> dict[str, Any]:
    """This rank's part of whole rows and shifted targets, `[B, S]` each, with PoSE's positions."""
    assert config.pose_length is not None
    positions = skipped_positions(input_ids, config.pose_length, config.seed)
    # Positions with gaps read as packed rows. Said outright: a row is one document.
    one_document = Documents(input_ids.shape[1], ((0,),))
    inputs = prepare_seq_parallel_inputs(
        config.parallel_mode,
        input_ids,
        positions,
        target_ids,
        mesh.sp_rank,
        mesh.sp_size,
        device,
        documents=one_document,
        ring_degree=mesh.ring_degree,
    )
    if "documents" not in inputs:  # a stock model is told by a mask that hides nothing
        inputs["attention_mask"] = torch.ones_like(inputs["local_input_ids"])
    return inputs


def check_pose(config: TrainConfig, borders: list[str]) -> None:
    """ValueError where PoSE was asked for and cannot be: a range no longer than the rows, rows of several documents."""
    if config.pose_length is None:
        return
    if config.pose_length <= config.seq_length:
        raise ValueError(
            f"--pose-length is {config.pose_length}, and --seq-length {config.seq_length}: positions are skipped in a "
            "range longer than the rows; raise it, or leave it out to train on whole sequences"
        )
    if config.attn_backend != OWN:
        raise ValueError(
            f"--pose-length {config.pose_length} needs positions that attention backend {config.attn_backend} does not "
            "take: leave the backend out"
        )
    if borders:
        raise ValueError(
            f"--pose-length skips positions within one document, and {config.dataset} records the borders of several "
            f"in a row ({', '.join(borders)}): give --ignore-borders, or rows without borders"
        )
