"""What sequence parallelism computes exactly, and the refusal of everything else, before any work is done."""

from pathlib import Path
from typing import Any

from easyctx.modes import Mode

# Families that the test matrix proves exact, as transformers' `model_type`.
FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "smollm3",
)
_TEXT_PARTS = {"gemma3": "gemma3_text"}  # of a model that also sees images

# Why some families can never be sharded by positions. Read off the modeling sources of transformers 5.23.
_REFUSED = {
    "has recurrent, convolution or linear-attention layers, which need their tokens in order on one rank": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba glm5_next granitemoehybrid inkling inkling2 inkling2_text "
        "inkling_text jamba kimi_linear lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl mamba mamba2 minimax nemotron_h "
        "olmo_hybrid qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text "
        "recurrent_gemma rwkv xlstm zamba zamba2 zaya"
    ),
    "has sparse, indexed or chunked attention, whose masks are not computed here": (
        "axk2 deepseek_v32 deepseek_v4 dots3_note glm_moe_dsa hy_v4 llama4 llama4_text minimax_m3_vl "
        "minimax_m3_vl_text mistral_large4"
    ),
    "adds ALiBi to its attention scores, which is not computed here": "bloom falcon mpt",
    "attends in both directions, and sequence parallelism here is causal": (
        "albert bert distilbert electra longformer modernbert roberta xlm-roberta"
    ),
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ATTENTION_DROPOUT = (
    "attention_dropout",
    "attention_dropout_rate",
    "attention_probs_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
)
_BOTH_DIRECTIONS = {"is_causal": False, "use_bidirectional_attention": True, "is_encoder_decoder": True}
# Keywords of an attention call that change its result in ways not computed here.
_UNKNOWN_KEYWORDS = ("indices", "block_indices", "position_bias", "sinks")


def check_model_path(model: str) -> None:
    """ValueError unless `model` is the folder of a saved model or looks like a hub name (owner/name)."""
    path = Path(model)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"--model {model} is a folder without config.json: give the folder of a saved model")
    elif path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ValueError(f"--model {model} is no folder here, and no hub name (owner/name) either")


def check_family(name: str) -> str:
    """The family's name in `FAMILIES`; ValueError, with the reason where it is known, for one that is not there."""
    family = _TEXT_PARTS.get(name, name)
    if family in FAMILIES:
        return family
    for reason, names in _REFUSED.items():
        if family in names.split():
            raise ValueError(
                f"model family {name!r} {reason}: train it with data_parallel, or choose one of {', '.join(FAMILIES)}"
            )
    raise ValueError(f"model family {name!r} is not one that was tested to be exact: {', '.join(FAMILIES)}")


def check_config(config: Any, mode: Mode, sp_size: int | None = None, ring_degree: int | None = None) -> None:
    """Refuse, with a ValueError, a model whose attention a sequence-parallel mode cannot compute exactly.

    Args:
        config: a transformers configuration (its text part is looked at).
        sp_size: ranks that share a sequence, where they are known; some modes share out heads among them.
        ring_degree: how many of them form the ring, for `usp_attn`.
    """
    if mode.schedule is None:
        return
    text = config.get_text_config(decoder=True)
    check_family(text.model_type)
    _check_randomness(text, mode)
    for name, wrong in _BOTH_DIRECTIONS.items():
        if getattr(text, name, None) == wrong:
            raise ValueError(f"{mode.name} is causal, this {text.model_type} configuration has {name}={wrong}")
    _check_layers(text, mode)
    if sp_size is not None:
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        mode.check_heads(text.num_attention_heads, kv_heads, sp_size, ring_degree)


def _check_randomness(text: Any, mode: Mode) -> None:
    """What is random in a layer would be another random number on every rank."""
    for name in _ATTENTION_DROPOUT:
        if dropout := getattr(text, name, 0.0) or 0.0:
            raise ValueError(
                f"{name} is {dropout}, and {mode.name} computes attention without dropout: set config.{name} = 0.0"
            )
    if noise := getattr(text, "router_jitter_noise", 0.0) or 0.0:
        raise ValueError(f"router_jitter_noise is {noise}, and ranks would draw their own: set it to 0.0")


def _check_layers(text: Any, mode: Mode) -> None:
    layer_types = getattr(text, "layer_types", None) or ()
    if unknown := sorted(set(layer_types) - _LAYER_TYPES):
        raise ValueError(f"{mode.name} cannot shard layers of type {', '.join(unknown)} ({text.model_type})")
    if "sliding_attention" in layer_types and getattr(text, "use_sliding_window", None) is False:
        # transformers masks such layers, but does not tell their attention function of the window.
        raise ValueError(
            f"layer_types has sliding_attention, but use_sliding_window is False ({text.model_type}): set it to True, "
            "or make these layers full_attention"
        )


def window_of(config: Any) -> int | None:
    """The sliding window that some layer uses, or None."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return window if window and (types is None or "sliding_attention" in types) else None


def needs_eager(config: Any) -> bool:
    """Whether the stock model has no "sdpa" attention, which knows neither softcap nor sinks."""
    return config.get_text_config(decoder=True).model_type in ("gemma2", "gpt_oss")


def check_call(module: Any, dropout: float, keywords: dict[str, Any]) -> None:
    """Refuse what only the attention call itself shows."""
    if dropout:
        raise ValueError(f"attention was called with dropout {dropout}, which sequence parallelism does not compute")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} attends in both directions, and sequence parallelism is causal")
    if given := [name for name in _UNKNOWN_KEYWORDS if keywords.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} calls attention with {', '.join(given)}, which is not computed here")
