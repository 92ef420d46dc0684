"""An adapter of a mixture with dense layers, whose experts peft adapts as well: counted, trained on, merged."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from easyctx import cli, train
from easyctx.adapters.folder import load_frozen
from easyctx.adapters.inject import linear_names, put_lora
from easyctx.adapters.merge import add_to_weights
from easyctx.adapters.prepare import adopt_adapter
from easyctx.memory.adapters import shape_of_run, trained_parameters
from tests.models import VOCAB, tiny_model
from tests.train_helpers import flags, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("mixture"))
    tiny_model("qwen3_moe", torch.float32).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def adapter(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "adapter"
    assert train.main(flags(inputs, output, lora_r=4, learning_rate=0.1)) == 0
    return output


def settings(model: Path, **changes: object) -> SimpleNamespace:
    """What a run or a plan is asked, of adapters."""
    asked = dict(lora_r=0, lora_alpha=None, lora_targets=None, lora_train=[], quantize=None, double_quant=True)
    return SimpleNamespace(model=str(model), liger=False, **asked | changes)


def test_what_is_trained_is_counted(inputs: Path, adapter: Path, tmp_path: Path, capsys) -> None:
    """As many parameters as are in the file, those of experts among them; the flags of the run may be given again."""
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wanted = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    for asked in (settings(adapter), settings(adapter, lora_r=4, lora_targets=every)):
        adopt_adapter(asked)
        assert trained_parameters(shape_of_run(asked, AutoConfig.from_pretrained(adapter))) == wanted
    with pytest.raises(ValueError, match=r"is q_proj, and the adapter .* has down_proj gate_proj"):
        adopt_adapter(settings(adapter, lora_targets=["q_proj"]))
    capsys.readouterr()
    assert train.main(flags(inputs, tmp_path / "on", model=adapter, rope_theta=None, max_train_steps=1)) == 0
    assert f"{wanted:,} parameters are trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "targets"),
    [("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]), ("mixtral", ["v_proj", "w1", "w2", "w3"])],
)
def test_experts_of_a_model_without_dense_layers_are_counted(
    family: str, targets: list[str], inputs: Path, tmp_path: Path, capsys
) -> None:
    """No flag asks for them, as there are no linear layers of these names; peft does, and its adapter is trained on."""
    start, adapter = tmp_path / "model", tmp_path / "adapter"
    dense = {"mlp_only_layers": []} if family == "qwen3_moe" else {}
    tiny_model(family, torch.float32, **dense).save_pretrained(start)
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(start), config)
    made.save_pretrained(adapter)
    wanted = sum(p.numel() for p in made.parameters() if p.requires_grad)

    asked = settings(adapter)
    adopt_adapter(asked)
    assert asked.lora_targets == sorted(["down_proj", "gate_proj", targets[0], "up_proj"])
    assert trained_parameters(shape_of_run(asked, AutoConfig.from_pretrained(start))) == wanted
    assert train.main(flags(inputs, tmp_path / "on", model=adapter, rope_theta=None, max_train_steps=1)) == 0
    assert f"{wanted:,} parameters are trained" in capsys.readouterr().out

    with pytest.raises(ValueError, match="--lora-targets gate_proj cannot be planned for"):
        shape_of_run(settings(start, lora_r=4, lora_targets=["gate_proj"]), AutoConfig.from_pretrained(start))
    assert train.main(flags(inputs, tmp_path / "no", model=start, lora_r=4, lora_targets="gate_proj")) == 2


def test_merged_experts_equal_the_adapter(inputs: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    assert cli.main(["merge", str(adapter), "--output", str(output)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(output)
    wanted = logits_of(load_frozen(str(adapter), AutoConfig.from_pretrained(adapter), torch.float32, CPU))
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-4, atol=1e-4)
    stock, found = (load_file(folder / "model.safetensors") for folder in (inputs / "model", output))
    assert found.keys() == stock.keys()
    changed = {name for name in stock if not torch.equal(stock[name], found[name])}
    assert changed == {name for name in stock if "_proj" in name and ".1.mlp." not in name}  # the dense one has none


def test_what_is_added_to_experts_is_rounded_once() -> None:
    """Merged bfloat16 weights are those merged in float32, rounded."""
    narrow = tiny_model("qwen3_moe", torch.bfloat16)
    put_lora(narrow, LoraConfig(r=2, target_modules=linear_names(narrow), init_lora_weights=False), seed=0)
    wide = copy.deepcopy(narrow).float()
    for model in (narrow, wide):
        add_to_weights(model)
    merged = narrow.state_dict()
    assert all(torch.equal(merged[name], tensor.bfloat16()) for name, tensor in wide.state_dict().items())


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids).logits
