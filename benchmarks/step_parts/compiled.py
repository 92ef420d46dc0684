"""How many kernels a process has compiled so far, by compiler."""

import sys
from collections import Counter
from typing import Any

from torch._dynamo.utils import counters


class Compiled:
    """Counts from its making on; a kernel that comes from a compiler's cache on disk counts like a compiled one."""

    def __init__(self) -> None:
        self._of_triton = 0
        try:
            from triton import knobs
        except ImportError:  # a CPU's PyTorch
            return
        before = knobs.runtime.jit_post_compile_hook

        def note(*args: Any, **kwargs: Any) -> Any:
            self._of_triton += 1
            return before(*args, **kwargs) if before is not None else None

        knobs.runtime.jit_post_compile_hook = note

    def now(self) -> Counter[str]:
        """Graphs of torch.compile, kernels of Triton's and of FlashAttention-4's."""
        return Counter(
            torch_compile=counters["stats"]["unique_graphs"], triton=self._of_triton, flash_attn_4=_of_flash_attn_4()
        )


def _of_flash_attn_4() -> int:
    """What lies in the caches that the functions of its interface carry; two names may share one."""
    interface = sys.modules.get("flash_attn.cute.interface")
    if interface is None:
        return 0
    carried = [getattr(each, "__dict__", {}).get("compile_cache") for each in vars(interface).values()]
    return sum({id(cache): _size(cache) for cache in carried if cache is not None}.values())


def _size(cache: Any) -> int:
    """Of a dict, or of an object around one."""
    inner = cache if hasattr(cache, "__len__") else getattr(cache, "cache", ())
    return len(inner)
