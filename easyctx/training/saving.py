"""Writing the trained model: safetensors, config and tokenizer that load again, checked, and never half a file."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from easyctx.adapters.folder import config_source, tokenizer_source
from easyctx.adapters.save import gather_trained, write_adapter
from easyctx.adapters.settings import AdapterSettings
from easyctx.engine import engine_name
from easyctx.mesh import Mesh
from easyctx.training.card import RUN_CARD, write_run_card
from easyctx.training.checkpoint_files import CHECKPOINTS
from easyctx.training.config import TrainConfig
from easyctx.training.progress import Progress

PARTIAL = ".partial"


def make_output_dir(config: TrainConfig, accelerator: Accelerator) -> None:
    """Make the output folder, once every rank has looked into it; a run that is written over loses its checkpoints
    and the card that says that it is finished."""
    accelerator.wait_for_everyone()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if config.overwrite and accelerator.is_main_process:
        (folder / RUN_CARD).unlink(missing_ok=True)  # first: cut short here, it is no finished run to `--resume`
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def save_run(accelerator: Accelerator, model: Any, config: TrainConfig, progress: Progress, mesh: Mesh) -> None:
    """Write a finished run's weights, then the cards that make its folder complete. All ranks must call this."""
    save_model(accelerator, model, config)
    if accelerator.is_main_process:
        write_run_card(config, progress, str(mesh), engine_name(accelerator))
        print(f"easyctx: saved {config.output_dir}, checked against the weights in memory", flush=True)


def save_model(accelerator: Accelerator, model: Any, config: TrainConfig) -> None:
    """Gather the weights on rank 0 and write them to `config.output_dir`, loadable by `from_pretrained`.

    Of a run with adapters these are written alone, as peft would, with the model's config.json beside them.

    Everything is written to a folder beside, read back and compared with the weights in memory, then moved in;
    config.json comes last, so a folder that has one is complete. All ranks must call this.
    """
    settings = AdapterSettings.from_config(config)
    state = gather_trained(accelerator, model) if settings.is_on else accelerator.get_state_dict(model)
    if config.save_dtype != "auto":
        state = cast(state, getattr(torch, config.save_dtype))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial = Path(config.output_dir) / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        unwrapped: PreTrainedModel = accelerator.unwrap_model(model)
        if settings.is_on:
            state = write_adapter(partial, unwrapped, state, settings, config.model)
        else:
            # Files hold a mixture's experts one by one, memory holds them stacked. Turned back here, for the check too.
            state = revert_weight_conversion(unwrapped, state)
            unwrapped.save_pretrained(
                partial, state_dict=dict(state), max_shard_size=config.max_shard_size, save_original_format=False
            )
        mend_config(partial / "config.json", config)
        save_tokenizer(config.model, partial)
        check_saved(partial, state)
        publish(partial, Path(config.output_dir))
    accelerator.wait_for_everyone()


def cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All floating-point weights in another dtype; names that share a tensor go on sharing one."""
    made: dict[int, torch.Tensor] = {}
    for tensor in state.values():
        if tensor.data_ptr() not in made:
            made[tensor.data_ptr()] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: made[tensor.data_ptr()] for name, tensor in state.items()}


def mend_config(path: Path, config: TrainConfig) -> None:
    """Have config.json tell the dtype of the files, and use a cache where the start model's does: training has none."""
    written = json.loads(path.read_text(encoding="utf-8"))
    written["use_cache"] = getattr(AutoConfig.from_pretrained(config_source(config.model)), "use_cache", True)
    if config.quantize:
        written.pop("quantization_config", None)  # of this run's memory; the files of the base are as they were
    if config.lora_r == 0 and config.save_dtype != "auto":
        written.pop("torch_dtype", None)
        written["dtype"] = config.save_dtype
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tokenizer(model: str, folder: Path) -> None:
    """Copy the start model's tokenizer beside the weights; a model without one is trained without one."""
    try:
        AutoTokenizer.from_pretrained(tokenizer_source(model)).save_pretrained(folder)
    except (OSError, ValueError) as error:
        print(
            f"easyctx: no tokenizer saved, since {model} has none that loads ({type(error).__name__})",
            flush=True,
        )


def check_saved(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """RuntimeError unless the safetensors in `folder` hold exactly the values of `state`, under its names.

    Tied weights may be left out of the files under all names but one.
    """
    seen = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                if name not in state or not torch.equal(tensors.get_tensor(name), state[name].cpu()):
                    raise RuntimeError(f"{file.name} does not hold the trained value of {name!r}")
                seen.add(state[name].data_ptr())
    missing = [name for name, tensor in state.items() if tensor.data_ptr() not in seen]
    if missing or not seen:
        raise RuntimeError(f"weights were not written: {', '.join(missing) or 'no safetensors file'}")


def publish(partial: Path, output_dir: Path) -> None:
    """Move finished files into place, each in one step, config.json last; an overwritten run's weights go."""
    (output_dir / "config.json").unlink(missing_ok=True)  # from here on the folder counts as incomplete
    new = sorted(partial.iterdir(), key=lambda path: path.name == "config.json")
    for stale in [*output_dir.glob("*.safetensors"), *output_dir.glob("*.safetensors.index.json")]:
        if stale.name not in {path.name for path in new}:
            stale.unlink()
    for path in new:
        path.chmod(readable())
        with path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(path, output_dir / path.name)
    partial.rmdir()


def readable() -> int:
    """The mode of a new file; safetensors makes ones that only their owner can read."""
    current = os.umask(0)
    os.umask(current)
    return 0o666 & ~current
