"""Which model is meant: a name that is known here, or whatever `easyctx check` takes. Sizes only, never weights."""

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from easyctx.check.source import load_config

_LLAMA3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
_MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

# Short name -> (hub names, model type, what differs from the type's defaults), from the config.json of each.
MODELS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "llama-2-7b": (
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "llama-2-13b": (
        ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"),
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    ),
    "llama-33b": (
        ("huggyllama/llama-30b",),
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 6656,
            "intermediate_size": 17920,
            "num_hidden_layers": 60,
            "num_attention_heads": 52,
        },
    ),
    "llama-3-8b": (
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            **_LLAMA3,
        },
    ),
    "llama-3-70b": (
        ("meta-llama/Meta-Llama-3-70B", "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.3-70B-Instruct"),
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            **_LLAMA3,
        },
    ),
    "qwen3-8b": (
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"),
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
    ),
    "mistral-7b": (
        ("mistralai/Mistral-7B-v0.3",),
        "mistral",
        {**_MISTRAL, "vocab_size": 32768, "sliding_window": None},
    ),
    "mistral-7b-v0.1": (
        ("mistralai/Mistral-7B-v0.1",),
        "mistral",
        {**_MISTRAL, "vocab_size": 32000, "sliding_window": 4096},
    ),
    "danube2-1.8b": (
        ("h2oai/h2o-danube2-1.8b-base", "h2oai/h2o-danube2-1.8b-chat"),
        "mistral",
        {
            "vocab_size": 32000,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 80,
            "sliding_window": None,
        },
    ),
}
_BY_NAME = {name.lower(): short for short, (hub, _, _) in MODELS.items() for name in (short, *hub)}


def load_shape_config(model: str) -> tuple[Any, str]:
    """A transformers configuration with the model's sizes, and in a few words where it came from.

    Args:
        model: a name of the table (short or the hub's), a folder or file of a config.json, a family name, a hub name.

    Raises:
        ValueError: nothing of these.
    """
    short = _BY_NAME.get(model.lower())
    if short is not None:
        _, kind, values = MODELS[short]
        return CONFIG_MAPPING[kind](**values), f"built-in sizes of {short}"
    try:
        config, source = load_config(model)
    except ValueError as error:
        raise ValueError(f"{error} (known here without a file: {', '.join(MODELS)})") from error
    _check_sizes(config, source)
    return config, source


def _check_sizes(config: Any, source: str) -> None:
    """ValueError for sizes that no model can have."""
    text = config.get_text_config(decoder=True)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(value := getattr(text, name, None), int) or value < 1:
            raise ValueError(f"{source} has {name} {value!r}: make it a whole number of at least 1")
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ValueError(
            f"{source} has num_attention_heads {heads} and num_key_value_heads {kv_heads}: the first must be a "
            "multiple of the second"
        )


def windows_of(config: Any) -> dict[int | None, int]:
    """How many layers attend in which window; None for those that see all."""
    text = config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if window is None or getattr(text, "use_sliding_window", True) is False:
        return {None: layers}
    sliding = layers if not kinds else sum(kind == "sliding_attention" for kind in kinds)
    return {w: count for w, count in ((None, layers - sliding), (window, sliding)) if count}


def name_for_training(model: str) -> str:
    """What the train loop's `--model` takes: a hub name, or the folder of a config.json; MODEL for a bare family."""
    short = _BY_NAME.get(model.lower())
    if short is not None:
        return MODELS[short][0][0] if short == model.lower() else model
    if Path(model).is_file():
        return str(Path(model).parent)
    return model if Path(model).is_dir() or "/" in model else "MODEL"
