"""Kept keys on a GPU: `EASYCTX_TEST_GPUS=0 bash tests/run.sh -m gpu`."""

from typing import Any

import pytest
import torch

from easyctx.evals.scoring import Scorer
from easyctx.evals.trunk import TrunkScorer
from easyctx.generation import Generator
from easyctx.generation.model import make_ranks
from easyctx.kernel import KERNELS, Workload
from easyctx.mesh import Mesh
from tests.generation_helpers import Letters
from tests.models import VOCAB, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; EASYCTX_TEST_GPUS names those to use"),
]
DEVICE = torch.device("cuda")
WIDE = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.1, "max_position_embeddings": 16384}


def prompts() -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """A trunk; prompts of three lengths with one insertion, and one that is the trunk to its end."""
    generator = torch.Generator().manual_seed(0)
    text, question = (torch.randint(3, VOCAB, (n,), generator=generator) for n in (6000, 20))
    found = [torch.cat([text[:2345], text[:17], text[2345:length], question]) for length in (6000, 4000, 2500)]
    found.append(torch.cat([text, question]))
    return text, found, [len(prompt) - 6 for prompt in found]


@pytest.mark.parametrize("keys", [{}, {"offload": True}, {"layer_by_layer": True}], ids=str)
@pytest.mark.parametrize(("family", "window"), [("llama", None), ("mistral", 512), ("gpt_oss", 512)])
@pytest.mark.parametrize("kernel", ["flash4", "cudnn", "torch_flash", "tiled"])
def test_logits_over_a_trunk_are_as_near_as_the_stock_models(
    kernel: str, family: str, window: int | None, keys: dict[str, Any]
) -> None:
    work = Workload(DEVICE, torch.bfloat16, 64, windowed=window is not None)
    if reason := KERNELS[kernel].refuses(work):
        pytest.skip(f"{kernel} {reason}")
    overrides = WIDE | ({"sliding_window": window} if window else {})
    text, whole, starts = prompts()
    exact = tiny_model(family, torch.float32, **overrides).eval().to(DEVICE)
    model = tiny_model(family, torch.float32, **overrides).eval().to(DEVICE, torch.bfloat16)
    scorer = TrunkScorer(model, make_ranks("data_parallel", None, model.config, kernel), DEVICE, chunk=1024, **keys)
    scorer.follow(text)
    got = scorer.answer_logits(whole, starts)
    for logits, prompt, start in zip(got, whole, starts, strict=True):
        want = Scorer(exact, "data_parallel", Mesh(), DEVICE).answer_logits(prompt, start)
        stock = Scorer(model, "data_parallel", Mesh(), DEVICE).answer_logits(prompt, start)
        assert (logits - want).norm() < 1.5 * (stock - want).norm() + 1e-2 * want.norm()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("family", "window"), [("llama", None), ("mistral", 512)])
def test_generated_tokens_are_those_of_transformers(family: str, window: int | None, offload: bool) -> None:
    overrides = WIDE | ({"sliding_window": window} if window else {})
    model = tiny_model(family, torch.float32, **overrides).eval().to(DEVICE)
    context = prompts()[0].tolist()
    questions = [[5, 6, 7], [8] * 40, []]
    answers = Generator(model, Letters(), prefill_chunk=1024, offload_cache=offload).answer(
        context, questions, max_new_tokens=20
    )
    for question, answer in zip(questions, answers, strict=True):
        ids = torch.tensor([context + question], device=DEVICE)
        want = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
        assert answer.token_ids == want


def test_more_keys_than_memory_are_refused_before_the_model_runs() -> None:
    model = tiny_model("llama", torch.float32, num_key_value_heads=4, num_hidden_layers=8, head_dim=256).to(DEVICE)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="offload_cache=True"):
        Generator(model.eval(), Letters()).answer([5] * 4_000_000, max_new_tokens=1)
