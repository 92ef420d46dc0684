"""Optimizer steps of models with adapters, for the jobs of `engine_jobs`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from easyctx.adapters.fused import fuse_lora
from easyctx.adapters.inject import lora_config, put_lora, set_adapter_dtype, train_whole
from easyctx.adapters.quantise import quantised
from easyctx.adapters.settings import AdapterSettings
from easyctx.mesh import Mesh
from tests.engine_jobs import Step

RANK = 4


@dataclass
class AdapterStep(Step):
    """A step of adapters, all of whose values are random, beside a frozen model."""

    train: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None
    quantize: str | None = None
    fuses: bool = False  # as the train loop does but under engines that shard; never the one process's

    def model(self) -> PreTrainedModel:
        model = in_4_bits(super().model(), self.dtype) if self.quantize else super().model()
        return with_adapters(model, AdapterSettings(RANK, 8.0, lora_targets=self.targets, lora_train=self.train))

    def patched_model(self, mesh: Mesh) -> PreTrainedModel:
        model = super().patched_model(mesh)
        if self.fuses:
            assert fuse_lora(model)
        return model


def with_adapters(model: PreTrainedModel, settings: AdapterSettings) -> PreTrainedModel:
    """B starts as zero, which would leave A without a gradient."""
    put_lora(model, lora_config(model, settings), seed=0)
    set_adapter_dtype(model, model.dtype, casts_inputs=True)
    train_whole(model, settings.lora_train, model.dtype)
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.data.normal_(0, 0.3, generator=generator)
    return model


def in_4_bits(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    torch._dynamo.config.disable = True  # bitsandbytes compiles what it computes on a CPU, which takes half a minute
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        save_file(model.state_dict(), Path(folder) / "model.safetensors")  # save_pretrained writes on rank 0 alone
        keywords = quantised("nf4", True, dtype, torch.device("cpu"))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, config=model.config, **keywords)
