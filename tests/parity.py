"""Jobs that run on every rank and compare a sharded model with one process on the whole sequence."""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from easyctx import (
    apply_seq_parallel_monkey_patch,
    gather_sequence,
    make_mesh,
    prepare_seq_parallel_inputs,
    shift_labels,
)
from easyctx.check.float64 import float64_throughout
from easyctx.documents import Documents
from easyctx.loss import num_targets, token_loss_sum
from easyctx.mesh import Mesh
from easyctx.modes import get_mode
from tests.models import ragged_batch, tiny_model
from tests.reference_attention import use_reference


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def worst_gradient_error(got: torch.nn.Module, want: torch.nn.Module) -> float:
    """The largest relative error over parameters. A gradient that is zero but for rounding (of q and k where no
    token with a loss has a choice of keys, say) is measured against 1e-4 of the whole gradient's norm."""
    wanted = {name: p.grad.double() for name, p in want.named_parameters()}
    floor = 1e-4 * torch.stack([g.norm() for g in wanted.values()]).norm()
    return max(
        float((p.grad.double() - wanted[name]).norm() / wanted[name].norm().clamp_min(floor))
        for name, p in got.named_parameters()
    )


@dataclass
class Case:
    """One cell of the matrix: which model on which batch, how it is packed, padded and patched."""

    mode: str
    family: str = "llama"
    length: int = 37
    batch: int = 1
    dtype: torch.dtype = torch.float64
    overrides: dict = field(default_factory=dict)
    by: str = "instance"
    ring_degree: int | None = None
    packed: str | None = None  # "positions", "documents", "cu_seqlens": how the model learns of the borders
    padded: int = 0  # tokens of padding at the right end of the first row, with an attention mask
    rope: dict | None = None

    def model(self) -> PreTrainedModel:
        overrides = self.overrides | ({"rope_parameters": self.rope} if self.rope else {})
        return tiny_model(self.family, self.dtype, **overrides)

    def batch_of_rows(self) -> tuple[torch.Tensor, torch.Tensor, Documents | None]:
        """ids, targets and documents."""
        ids, labels = ragged_batch(self.batch, self.length)
        if self.padded:
            labels[0, -self.padded :] = -100
        documents = None
        if self.packed:
            cuts = [0, 1, self.length // 5, self.length // 2, self.length // 2 + 3]
            rows = [tuple(c + (row if c > 1 else 0) for c in cuts) for row in range(self.batch)]
            documents = Documents(self.length, tuple(rows))
        return ids, shift_labels(labels, documents), documents


Oracle = tuple[PreTrainedModel, torch.Tensor, torch.Tensor]  # after a backward: model, mean loss, logits
_oracles: dict[str, Oracle] = {}  # of this process


def one_process(case: Case) -> Oracle:
    """The oracle of a case, made once for all modes and all ways to tell a model of its borders."""
    key = repr(replace(case, mode="", by="", ring_degree=None, packed="packed" if case.packed else None))
    if key not in _oracles:
        _oracles[key] = _one_process(case)
    return _oracles[key]


def _one_process(case: Case) -> Oracle:
    """Packed rows are run document by document."""
    ids, targets, documents = case.batch_of_rows()
    model = use_reference(case.model())
    if documents is None:
        mask = None
        if case.padded:
            mask = torch.ones_like(ids)
            mask[0, -case.padded :] = 0
        logits = model(ids, attention_mask=mask).logits
    else:
        rows = []
        for row, starts in enumerate(documents.starts):
            stops = (*starts[1:], documents.length)
            parts = [model(ids[row : row + 1, a:b]).logits for a, b in zip(starts, stops, strict=True)]
            rows.append(torch.cat(parts, dim=1))
        logits = torch.cat(rows)
    loss = token_loss_sum(logits, targets) / num_targets(targets)
    loss.backward()
    return model, loss.detach(), logits.detach()


def sharded_call(case: Case, model: PreTrainedModel, mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's logits and targets, the borders and padding being told as the case wants."""
    ids, targets, documents = case.batch_of_rows()
    positions = documents.position_ids() if documents and case.packed == "positions" else None
    local = prepare_seq_parallel_inputs(
        case.mode,
        ids,
        positions,
        targets,
        mesh.sp_rank,
        mesh.sp_size,
        "cpu",
        documents=documents if case.packed in ("documents", "cu_seqlens") else None,
        ring_degree=case.ring_degree,
    )
    arguments = {"input_ids": local["local_input_ids"], "position_ids": local["local_position_ids"]}
    if case.packed == "documents":
        arguments["documents"] = local["documents"]
    elif case.packed == "cu_seqlens":
        arguments["cu_seq_lens_q"] = torch.tensor([*local["documents"].starts[0], local["documents"].length])
    if case.padded:
        layout = get_mode(case.mode).shard_layout(mesh.sp_size, mesh.ring_degree)
        length = local["local_input_ids"].shape[1] * mesh.sp_size
        whole = (torch.arange(length) < case.length - case.padded)[None].expand(case.batch, -1).clone()
        whole[1:] = torch.arange(length) < case.length
        arguments["attention_mask"] = layout.shard(whole.long(), mesh.sp_size, mesh.sp_rank)
    return model(**arguments).logits, local["local_target_ids"]


def model_parity(rank: int, world: int, case: Case) -> dict[str, float]:
    """Loss, logits and gradients of one batch: the case's mode over all ranks against one process."""
    with float64_throughout():
        stock, want, want_logits = one_process(case)
        sharded = case.model()
        mesh = make_mesh(ring_degree=case.ring_degree)
        target = sharded if case.by == "instance" else case.family
        with apply_seq_parallel_monkey_patch(case.mode, target, mesh=mesh):
            logits, targets = sharded_call(case, sharded, mesh)
            loss = token_loss_sum(logits, targets) / num_targets(case.batch_of_rows()[1])
            loss.backward()
    for parameter in sharded.parameters():
        dist.all_reduce(parameter.grad)
    total = loss.detach().clone()
    dist.all_reduce(total)
    gathered = gather_sequence(case.mode, logits, mesh, case.length)
    if case.padded:  # nothing is asked of the padding's logits
        gathered[0, -case.padded :] = want_logits[0, -case.padded :]
    return {
        "loss": relative_error(total, want),
        "logits": relative_error(gathered, want_logits),
        "gradients": worst_gradient_error(sharded, stock),
    }
