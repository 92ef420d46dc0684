"""The configuration to check: from a folder, a file, the hub, or a family's default. Never weights."""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from easyctx.hub_names import why_no_hub_name


def load_config(model: str) -> tuple[Any, str]:
    """The text model's transformers configuration, and in a few words where it came from.

    Args:
        model: a folder with config.json, such a file, a family name ("llama", "gpt-oss") or a hub name.

    Raises:
        ValueError: nothing of these, or a configuration that cannot be read.
    """
    path, family = Path(model), model.replace("-", "_").lower()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--model {model} is a folder without config.json: give the folder of a saved model")
        return _from_file(path / "config.json")
    if path.is_file():
        return _from_file(path)
    if family in CONFIG_MAPPING:
        return _text(AutoConfig.for_model(family), model, f"transformers' default for {family}")
    if model.endswith(".json") or why_no_hub_name(model):
        raise ValueError(
            f"--model {model} is no folder, no file, no family that transformers knows (such as llama), "
            "and no hub name (owner/name) either"
        )
    try:
        return _text(AutoConfig.from_pretrained(model), model, f"the hub's {model}")
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--model {model}: its configuration could not be loaded from the hub: {reason}") from error


def _from_file(path: Path) -> tuple[Any, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--model: {path} cannot be read as JSON: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"--model: {path} has model_type {kind!r}, which this transformers does not know")
    try:
        return _text(CONFIG_MAPPING[kind].from_dict(values), str(path), str(path))
    except Exception as error:  # each family validates in its own way
        reason = " ".join(str(error).split())
        raise ValueError(f"--model: {path} is no valid {kind} configuration: {reason}") from error


def _text(config: Any, model: str, origin: str) -> tuple[Any, str]:
    text = config.get_text_config(decoder=True)
    missing = [n for n in ("num_hidden_layers", "num_attention_heads", "hidden_size") if not getattr(text, n, None)]
    if missing:
        raise ValueError(f"--model {model} ({config.model_type}) is no decoder that can be made small: no {missing[0]}")
    return text, origin if text is config else f"{origin}, the text part of {config.model_type} alone"
