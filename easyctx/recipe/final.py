"""A finished model with another RoPE base in its config.json, in a folder of its own.

    python -m easyctx.recipe.final --model output/512k --output output/final --rope-theta 1e9

The weights are not copied where the disk can link them. The stage's own folder stays as it was trained.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from easyctx.parser import Parser
from easyctx.training.card import MODEL_CARD, read_run_card, write_model_card
from easyctx.training.checkpoint_files import write_durably
from easyctx.training.model import set_rope


def rope_of(folder: Path) -> dict[str, Any]:
    """The RoPE settings in a folder's config.json; {} where there is none."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["rope_parameters"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def is_made(model: Path, output: Path, rope_theta: float) -> bool:
    """Whether `output` holds the weights of `model` with that base already."""
    rope = rope_of(output)
    card = read_run_card(output)
    return rope.get("full_attention", rope).get("rope_theta") == rope_theta and card == read_run_card(model)


def make_final(model: Path, output: Path, rope_theta: float) -> None:
    """Write `output` whole or not at all; an older one that was made by this is replaced.

    Raises:
        ValueError: no finished model, no single RoPE base, or a folder of something else.
    """
    if not (model / "config.json").is_file() or not read_run_card(model):
        raise ValueError(f"--model {model} holds no finished run of easyctx.train")
    if rope_theta <= 0:
        raise ValueError(f"--rope-theta is {rope_theta}, and must be positive")
    if output.exists() and not read_run_card(output):
        raise ValueError(f"--output {output} holds something else: name a new folder")
    config = AutoConfig.from_pretrained(model)
    set_rope(config, rope_theta, 0)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and path.name not in ("config.json", MODEL_CARD) and not path.name.startswith("."):
            _link(path, partial / path.name)
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    settings["rope_parameters"] = config.rope_parameters
    write_durably(partial / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    write_model_card(partial, name=output.name)
    shutil.rmtree(output, ignore_errors=True)
    os.replace(partial, output)


def _link(source: Path, target: Path) -> None:
    # The run card is rewritten by nobody, and weights are replaced by new files, so a shared one stays as it is.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="easyctx.recipe.final", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="output folder of a finished run")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--rope-theta", required=True, type=float, help="RoPE base to write")
    args = parser.parse_args(argv)
    try:
        make_final(Path(args.model), Path(args.output), args.rope_theta)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"easyctx: {args.output} has the weights of {args.model} and RoPE base {args.rope_theta:g}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
