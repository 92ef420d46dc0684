"""`easyctx merge ADAPTER --output DIR`: an adapter added to the weights it was trained beside.

On the CPU, in one copy of the model in the dtype that is written, and in float32 one layer at a time. The folder is
made whole or not at all.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from easyctx.adapters.settings import check_adapter_package

DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="folder of an adapter: adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--output", required=True, help="folder of the merged model, new or empty")
    parser.add_argument("--base", help="model to add it to (default: the one that the adapter names)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the base's)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from easyctx.adapters.folder import base_of, check_model, is_adapter, read_adapter_config
    from easyctx.training.card import read_run_card

    if not is_adapter(args.adapter):
        raise ValueError(f"{args.adapter} is no adapter: give a folder with an adapter_config.json")
    check_adapter_package(args.adapter)
    read_adapter_config(args.adapter)
    try:
        check_model(args.base or args.adapter)
    except ValueError as error:
        raise ValueError(str(error).replace("--model", "--base")) from None
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} holds something already: name a new folder")
    base = args.base or base_of(args.adapter)
    merge(args.adapter, base, output, args.dtype, args.max_shard_size)
    print(f"easyctx: {output} has the weights of {base} with {args.adapter} added to them", flush=True)
    if kind := read_run_card(Path(args.adapter)).get("config", {}).get("quantize"):
        print(
            f"easyctx: the adapter was trained beside weights in {kind}, and is merged into unquantised ones: its "
            "outputs differ a little from `easyctx eval --quantize`",
            flush=True,
        )
    return 0


def merge(adapter: str, base: str, output: Path, dtype: str, max_shard_size: str) -> None:
    """Write the merged model, its configuration (with the RoPE it was trained with), tokenizer and cards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from easyctx.adapters.folder import put_adapter, tokenizer_source
    from easyctx.training.saving import save_tokenizer

    own = Path(adapter) / "config.json"
    config = AutoConfig.from_pretrained(adapter if own.is_file() else base)
    in_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=in_dtype)
    put_adapter(model, adapter)
    add_to_weights(model)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer_source(adapter), partial)
    write_card(Path(adapter), partial, output.name)
    sync(partial)
    if output.is_dir():
        output.rmdir()
    os.replace(partial, output)


@torch.no_grad()
def add_to_weights(model: Any) -> None:
    """Add each adapter to the weight it stands beside, in float32, and take it away: a stock model is left.

    Raises:
        ValueError: an adapter of a weight that is embedding and head at once, and whose other use has no adapter.
    """
    from peft.tuners.lora import LoraLayer
    from tqdm import tqdm

    from easyctx.adapters.inject import ADAPTER

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    module: Any
    for name, module in tqdm(adapted[::-1], desc="merge", unit="layer"):  # a wrapper of a wrapper after what it is of
        layer = module.get_base_layer()
        weight = getattr(layer, getattr(module, "parameter_name", "weight"))  # or one of the stacks of all experts
        if model.config.get_text_config().tie_word_embeddings and weight is model.get_input_embeddings().weight:
            raise ValueError(
                f"the adapter changes {name} alone, and this model's embedding and output head are one weight: it "
                "cannot be merged; evaluate it as it is (--model ADAPTER)"
            )
        for matrices in (module.lora_A, module.lora_B):
            matrices.float()
        written = weight.dtype
        weight.data = weight.data.float()  # first, as peft gives what is added to experts in their dtype
        weight.data = (weight.data + module.get_delta_weight(ADAPTER)).to(written)
        model.set_submodule(name, layer)
    del model.peft_config


def write_card(adapter: Path, folder: Path, name: str) -> None:
    """Take the run's card over, where the adapter is one of ours, and say that it was merged."""
    from easyctx.training.card import RUN_CARD, read_run_card, write_model_card

    card = read_run_card(adapter)
    if card:
        card["merged_from"] = str(adapter.resolve())
        (folder / RUN_CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        write_model_card(folder, name)


def sync(folder: Path) -> None:
    """Have all files of a folder, and their names, on the disk, for others to read."""
    from easyctx.training.checkpoint_files import sync_folder
    from easyctx.training.saving import readable

    for path in folder.iterdir():
        path.chmod(readable())
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
