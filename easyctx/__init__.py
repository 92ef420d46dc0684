"""easyctx: exact full attention over sequences that are sharded over GPUs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easyctx.documents import Documents
    from easyctx.inputs import gather_sequence, prepare_dataloader, prepare_seq_parallel_inputs, shift_labels
    from easyctx.mesh import make_mesh
    from easyctx.patch import apply_seq_parallel_monkey_patch

__version__ = "0.1.0"

_EXPORTS = {
    "Documents": "easyctx.documents",
    "apply_seq_parallel_monkey_patch": "easyctx.patch",
    "gather_sequence": "easyctx.inputs",
    "make_mesh": "easyctx.mesh",
    "prepare_dataloader": "easyctx.inputs",
    "prepare_seq_parallel_inputs": "easyctx.inputs",
    "shift_labels": "easyctx.inputs",
}

__all__ = [
    "Documents",
    "apply_seq_parallel_monkey_patch",
    "gather_sequence",
    "make_mesh",
    "prepare_dataloader",
    "prepare_seq_parallel_inputs",
    "shift_labels",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `easyctx --help` and bad arguments need not wait for torch and transformers."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'easyctx' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
