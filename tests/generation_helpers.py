"""A tokenizer, cases and rank jobs for the generation tests."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from easyctx.generation import Generator
from easyctx.mesh import Mesh
from easyctx.modes import make_mode_mesh
from easyctx.patch import apply_seq_parallel_monkey_patch
from tests.models import VOCAB, tiny_model

EOS = 2  # of the tiny models


class Letters:
    """A tokenizer of one character a token; the end of a text is a special token, written <eos>."""

    eos_token_id = EOS

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(("" if skip_special_tokens else "<eos>") if i == EOS else chr(64 + i) for i in ids)


@dataclass
class Case:
    """A model, a context, and questions of different lengths."""

    family: str = "llama"
    context: int = 37
    questions: tuple[int, ...] = (1, 5, 0)
    mode: str = "data_parallel"
    prefill_chunk: int = 7
    offload: bool = False
    batch_size: int = 16
    use_cache: bool = True
    new_tokens: int = 12
    dtype: torch.dtype = torch.float64
    overrides: dict[str, Any] = field(default_factory=dict)

    def model(self) -> PreTrainedModel:
        return tiny_model(self.family, self.dtype, **self.overrides).eval()

    def prompt(self) -> tuple[list[int], list[list[int]]]:
        generator = torch.Generator().manual_seed(self.context)

        def some(length: int) -> list[int]:
            return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

        return some(self.context), [some(length) for length in self.questions]


def by_transformers(case: Case) -> list[list[int]]:
    """What `model.generate` gives for each question behind the context."""
    model, (context, questions) = case.model(), case.prompt()
    answers = []
    for question in questions:
        ids = torch.tensor([context + question])
        out = model.generate(ids, max_new_tokens=case.new_tokens, do_sample=False)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def generate_on_ranks(rank: int, world: int, case: Case, patched: bool = False, **settings: Any) -> list[Any]:
    """The answers, on all ranks."""
    mesh = make_mode_mesh(case.mode, None, 2 if case.mode == "usp_attn" else None) if world > 1 else Mesh()
    model = case.model()
    if patched:
        apply_seq_parallel_monkey_patch(case.mode, model, mesh=mesh)
    generator = Generator(
        model,
        Letters(),
        case.mode,
        mesh,
        case.prefill_chunk,
        case.offload,
        batch_size=case.batch_size,
        use_cache=case.use_cache,
    )
    context, questions = case.prompt()
    answers = generator.answer(context, questions, max_new_tokens=case.new_tokens, **settings)
    return [(answer.text, answer.token_ids, answer.stopped_by) for answer in answers]


def generate_after_scoring(rank: int, world: int, case: Case) -> list[Any]:
    """The answers of a patched model that had another, shorter text before."""
    mesh = make_mode_mesh(case.mode)
    model = case.model()
    apply_seq_parallel_monkey_patch(case.mode, model, mesh=mesh)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    answers = Generator(model, Letters(), case.mode, mesh, case.prefill_chunk).answer(
        *case.prompt(), max_new_tokens=case.new_tokens
    )
    return [(answer.text, answer.token_ids, answer.stopped_by) for answer in answers]


def generate_with_fsdp2(rank: int, world: int, cases: list[Case]) -> list[Any]:
    """The answers to this rank's case, with weights that FSDP2 shards over all ranks."""
    case = cases[rank]
    model = case.model()
    for unit in (*model.model.layers, model.model.embed_tokens, [model.model.norm, model.lm_head], model):
        fully_shard(unit)
    mesh = make_mode_mesh(case.mode)
    answers = Generator(model, Letters(), case.mode, mesh, case.prefill_chunk).answer(
        *case.prompt(), max_new_tokens=case.new_tokens
    )
    return [(answer.text, answer.token_ids, answer.stopped_by) for answer in answers]
