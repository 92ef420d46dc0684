"""flash-attn-4's Hopper kernels, driven so that sums over many blocks stay in the kernels.

The library's own entry points round every block's output and gradients to half precision, and leave the merging to
their caller. Here its kernel classes are compiled with a different last step: the forward folds a block into the
running output (`forward.py`), the backward adds to running float32 sums (`backward.py`).
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

# Compiling is not for several threads at once; a process has them where a GPU's ranks are virtual ones.
COMPILING = threading.RLock()


def compiled_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, called once for each set of arguments, and by one thread at a time."""
    cached = functools.cache(make)

    @functools.wraps(make)
    def found(*args: Any) -> Any:
        with COMPILING:
            return cached(*args)

    return found
