"""The models of an eval run: their labels, tokenizers, configurations and weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyctx.evals.session import shards_weights

if TYPE_CHECKING:
    from easyctx.evals.scoring import Scorer
    from easyctx.evals.session import Session
    from easyctx.evals.tasks.questions import Answerer


def check_models(models: list[str], labels: list[str] | None = None) -> list[str]:
    """The label of each model: its folder's name unless given. Raises ValueError for what is no model."""
    from easyctx.adapters.folder import check_model

    for model in models:
        check_model(model)
    if labels is not None and len(labels) != len(models):
        raise ValueError(f"--labels names {len(labels)} models, --model {len(models)}")
    named = labels or [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    if len(set(named)) < len(named):
        raise ValueError(f"two models have the same label in {named}; tell them apart with --labels")
    return named


def check_one_engine_model(session: Session, models: list[str]) -> None:
    """Raises ValueError for several models under an engine that shards the weights of one."""
    if len(models) > 1 and shards_weights(session.accelerator):
        raise ValueError(
            f"{len(models)} models under {session.accelerator.distributed_type.value}, which shards one in a run: "
            "run the eval for one after the other (perplexity puts them in one figure with the same --output)"
        )


def load_tokenizer(model: str) -> Any:
    """The tokenizer saved with a model, or with an adapter's base. Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    from easyctx.adapters.folder import tokenizer_source

    try:
        return AutoTokenizer.from_pretrained(tokenizer_source(model))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer could be loaded from {model}: {error}") from error


def load_config(session: Session, model: str) -> Any:
    """The model's configuration, with the RoPE base of the run, checked against the mode."""
    from transformers import AutoConfig

    from easyctx.adapters.folder import config_source
    from easyctx.capability import check_config
    from easyctx.liger import check_liger
    from easyctx.modes import get_mode
    from easyctx.training.model import set_rope

    try:
        config = AutoConfig.from_pretrained(config_source(model))
    except OSError as error:
        raise ValueError(f"no model configuration could be loaded from {model}: {error}") from error
    check_config(config, get_mode(session.mode), session.mesh.sp_size, session.mesh.ring_degree)
    if session.liger:
        check_liger(config)
    if session.rope_theta is not None:
        set_rope(config, session.rope_theta, seq_length=0)
    return config


def check_lengths(session: Session, model: str, config: Any, lengths: list[int]) -> None:
    """Raises ValueError for lengths past those that the model's RoPE was made for, unless the run says how.

    With --rope-theta (another base) or --force (to see what happens) they run, and it is said.
    """
    limit = rope_range(config)
    beyond = [length for length in lengths if limit is not None and length > limit]
    if not beyond:
        return
    tokens = f"{model}: {', '.join(map(str, beyond))} tokens are beyond its max_position_embeddings {limit}"
    if not session.force and session.rope_theta is None:
        raise ValueError(f"{tokens}: give --rope-theta with a higher base, or --force to run them all the same")
    session.say(f"{tokens}; they run with the RoPE base {session.rope_theta or 'of the model'}")


def rope_range(config: Any) -> int | None:
    """Tokens that the configuration's RoPE was made for; its scaling counts. None where it says nothing."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if limit and original and factor:
        return max(limit, int(original * factor))
    return limit


def load_scorer(session: Session, model: str, config: Any) -> Scorer:
    """A model that scores given tokens."""
    from easyctx.evals.scoring import Scorer

    return Scorer(load_model(session, model, config), session.mode, session.mesh, session.device)


def load_generator(
    session: Session, model: str, config: Any, tokenizer: Any, *, offload_cache: bool = False
) -> Answerer:
    """A model that writes answers."""
    from easyctx.generation import Generator

    loaded = load_model(session, model, config)
    return Generator(loaded, tokenizer, session.mode, session.mesh, offload_cache=offload_cache)


def load_model(session: Session, model: str, config: Any) -> Any:
    """Loads, patches and places a model, or an adapter on its base, for inference. DeepSpeed and FSDP, which shard
    weights, wrap it."""
    from easyctx.adapters.folder import load_frozen
    from easyctx.liger import use_liger_kernels
    from easyctx.patch import apply_seq_parallel_monkey_patch

    loaded = load_frozen(model, config, session.dtype, session.device, session.quantize)
    loaded.config.use_cache = False
    if session.liger:
        use_liger_kernels(loaded)
    apply_seq_parallel_monkey_patch(session.mode, loaded, mesh=session.mesh)
    loaded.eval()
    # Nothing is trained; and FSDP2 would copy weights that are to float32.
    loaded.requires_grad_(False)
    if shards_weights(session.accelerator):
        loaded = _shard_weights(session.accelerator, loaded)
        loaded.eval()
    else:
        loaded.to(session.device)
    return loaded


def _shard_weights(accelerator: Any, model: Any) -> Any:
    import torch

    if accelerator.is_fsdp2:
        # accelerate takes an FSDP2 model only together with an optimizer; this one never steps.
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
        return model
    return accelerator.prepare(model)
