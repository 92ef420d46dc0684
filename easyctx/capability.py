"""What sequence parallelism computes exactly, and the refusal of everything else, before any work is done."""

from pathlib import Path
from typing import Any

from easyctx.modes import Mode

# Families that the test matrix proves exact, as transformers' `model_type`.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_model_path(model: str) -> None:
    """ValueError unless `model` is the folder of a saved model or looks like a hub name (owner/name)."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--model {model} is a folder without config.json: give the folder of a saved model")
    elif path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ValueError(f"--model {model} is no folder here, and no hub name (owner/name) either")


def check_family(name: str) -> None:
    """ValueError unless `name` is a tested family."""
    if name not in FAMILIES:
        raise ValueError(f"model family {name!r} is not one that was tested to be exact: {', '.join(FAMILIES)}")


def check_config(config: Any, mode: Mode, sp_size: int | None = None) -> None:
    """Refuse, with a ValueError, a model whose attention a sequence-parallel mode cannot compute exactly.

    Args:
        config: a transformers configuration (its text part is looked at).
        sp_size: ranks that share a sequence, where they are known; some modes share out heads among them.
    """
    if mode.schedule is None:
        return
    text = config.get_text_config(decoder=True)
    check_family(text.model_type)
    dropout = getattr(text, "attention_dropout", 0.0) or 0.0
    if dropout:
        raise ValueError(
            f"attention_dropout is {dropout}, and {mode.name} computes attention without dropout: "
            "set config.attention_dropout = 0.0"
        )
    if not getattr(text, "is_causal", True):
        raise ValueError(f"{mode.name} is causal, this {text.model_type} configuration has is_causal=False")
    unknown = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        raise ValueError(f"{mode.name} cannot shard layers of type {', '.join(unknown)} ({text.model_type})")
    if sp_size is not None:
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        mode.schedule.check_heads(text.num_attention_heads, kv_heads, sp_size)


def check_call(softcap: float | None, sinks: Any, dropout: float) -> None:
    """Refuse what arrives only with the attention call itself."""
    refused = [
        name
        for name, given in (
            ("logit softcap", softcap),
            ("attention sinks", sinks),
            ("dropout", dropout or None),
        )
        if given is not None
    ]
    if refused:
        raise ValueError(f"sequence-parallel attention does not compute {', '.join(refused)} yet")
