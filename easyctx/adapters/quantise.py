"""A model's linear layers loaded in 4 bits, by bitsandbytes (NF4; QLoRA, arXiv 2305.14314)."""

from typing import Any

import torch


def quantised(kind: str | None, double_quant: bool, compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The keywords of `from_pretrained` for these settings; none where nothing is quantised.

    Args:
        compute: dtype of the products. The 4-bit numbers are also stored in words of it: FSDP2 shards what has a
            floating-point dtype.
        device: where the layers are quantised, one by one as they are read, and stay.
    """
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute,
    )
    return {"quantization_config": settings, "device_map": {"": device}}
