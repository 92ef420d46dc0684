"""The sharded tokens that calls go on from: computed chunk by chunk, no further than is asked for."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from easyctx.generation.calls import Call, Ranks
from easyctx.generation.store import KeyStore
from easyctx.memory.host import available_host_memory
from easyctx.mesh import Mesh

PREFILL_CHUNK = 16384


class Context:
    """Token ids and, in `store`, the keys of the first of them.

    Chunks begin at the same places however far the context is computed, so results do not depend on that.

    Args:
        call_model: runs the model on a call, for the keys that it leaves in the store.
        ids: int64 `[n]`, the same on all ranks; what is left over of a multiple of `ranks.multiple` is cut off.
        chunk: tokens of a rank that go through the model at a time.
    """

    def __init__(
        self, call_model: Callable[[Call], Any], ranks: Ranks, ids: torch.Tensor, chunk: int, *, offload: bool = False
    ) -> None:
        self.call_model, self.ranks = call_model, ranks
        self.ids = ids[: len(ids) // ranks.multiple * ranks.multiple]
        self.chunk = max(chunk * ranks.size // ranks.multiple, 1) * ranks.multiple
        self.store = KeyStore(len(self.ids) // ranks.size, offload=offload)

    @property
    def length(self) -> int:
        """How many tokens have their keys in the store."""
        return self.store.filled * self.ranks.size

    def compute(self, until: int) -> None:
        """Have the keys of at least the first `until` tokens, or of all there are."""
        starts = range(self.length, min(until, len(self.ids)), self.chunk)
        mesh = self.ranks.mesh
        hidden = mesh.sp_rank + mesh.dp_rank > 0 or len(starts) < 4
        for start in tqdm(starts, desc="prefill", unit="chunk", leave=False, disable=hidden):
            self.call_model(Call(self.ranks, self.store, start, self.ids[start : start + self.chunk], keep=True))


def cache_bytes(config: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `num_tokens` tokens in all layers of a transformers configuration."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * num_tokens * dtype.itemsize


def free_bytes(device: torch.device, mesh: Mesh) -> int:
    """What the fullest GPU of the ranks that share a sequence has left, PyTorch's own reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if mesh.sp_size > 1:
        least = torch.tensor(free, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=mesh.sp_group)
        free = int(least)
    return free


def host_free_bytes() -> int:
    """Host memory that is left for each process on this machine."""
    return available_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
