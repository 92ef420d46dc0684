"""Where a result came from: the versions and the hardware that every result file records."""

import importlib.metadata
import os
import platform

PACKAGES = (
    "easyctx",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "deepspeed",
    "flash-attn-4",
    "flash-attn-3",
    "flash-attn",
    "ring-flash-attn",
    "liger-kernel",
    "triton",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on, where installed; CUDA's beside a GPU."""
    import torch

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda or ""
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def hardware(gpus: int | None = None) -> str:
    """A short name of the machine, such as `2xNVIDIA-H200` or `cpu-2cores`. gpus: that took part, if not all."""
    import torch

    if torch.cuda.is_available():
        return f"{gpus or torch.cuda.device_count()}x{torch.cuda.get_device_name().replace(' ', '-')}"
    return f"cpu-{os.cpu_count()}cores"
