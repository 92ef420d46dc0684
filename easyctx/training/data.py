"""The train loop's batches: whole sequences, drawn by data-parallel rank."""

from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from easyctx.adapters.folder import tokenizer_source
from easyctx.backend import OWN
from easyctx.data.load import check_rows, check_targets, load_tokenised, row_lengths
from easyctx.data.packed import BORDER_COLUMNS, check_borders, collate
from easyctx.data.readers import card_of
from easyctx.data.tokenised import check_models_tokenizer
from easyctx.documents import Documents
from easyctx.inputs import IGNORE_INDEX, shift_labels
from easyctx.mesh import Mesh
from easyctx.training.buckets import Buckets
from easyctx.training.config import TrainConfig
from easyctx.training.order import GlobalOrder
from easyctx.training.pose import check_pose

LOSS_COLUMNS = ("labels", "loss_mask")  # each is one way to record which tokens are to be learnt


def load_rows(config: TrainConfig, vocab_size: int) -> Any:
    """The dataset, checked, with the columns that training takes."""
    rows = checked_rows(config, load_tokenised(config.dataset), config.dataset, config.seq_length, vocab_size)
    check_pose(config, [name for name in BORDER_COLUMNS if name in rows.column_names])
    return rows


def checked_rows(config: TrainConfig, dataset: Any, name_of_it: str, seq_length: int, vocab_size: int) -> Any:
    """Ids, labels and borders of a dataset, as tensors.

    Raises:
        ValueError: rows too short or without anything to learn, token ids beyond the vocabulary, borders that are wrong
            or would be ignored, another tokenizer than the model's.
    """
    check_tokenizer(name_of_it, config.model)
    check_rows(dataset, seq_length, vocab_size, own_lengths=bool(config.buckets))
    borders = [] if config.ignore_borders else [name for name in BORDER_COLUMNS if name in dataset.column_names]
    if len(borders) > 1:
        raise ValueError(
            f"{name_of_it} records document borders twice ({', '.join(borders)}): remove one of these columns, "
            "or give --ignore-borders to attend across documents"
        )
    if borders and config.attn_backend != OWN:
        raise ValueError(
            f"{name_of_it} records document borders ({borders[0]}), and attention backend {config.attn_backend} "
            "has none: leave the backend out, or give --ignore-borders to attend across documents"
        )
    for name in borders:
        check_borders(dataset, name)
    of_loss = [name for name in LOSS_COLUMNS if name in dataset.column_names]
    for name in of_loss:
        check_targets(dataset, name, seq_length, row_lengths(dataset) if config.buckets else None)
    columns = ["input_ids", *of_loss, *borders]
    return dataset.select_columns(columns).with_format("torch")


def check_tokenizer(dataset: str, model: str) -> None:
    """ValueError for a dataset of `easyctx data` whose ids mean other tokens to the model's tokenizer."""
    if card_of(dataset) is None:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(model))
    except (OSError, ValueError):  # a model without one: saving says so
        return
    check_models_tokenizer(dataset, dataset, tokenizer, model)


def make_loader(rows: Any, config: TrainConfig, mesh: Mesh, seen: int = 0) -> DataLoader:
    """Batches of whole rows without end, after the first `seen` samples; the ranks of a sequence draw the same."""
    order = GlobalOrder(len(rows), config.seed, config.batch_size, mesh.dp_rank, mesh.dp_size, start=seen)
    padded = Buckets(config, row_lengths(rows), mesh).padded if config.buckets else None
    # The token after the sequence is its last target.
    collated = partial(collate, most=config.seq_length + 1, padded=padded)
    # A generator of its own, so that making an iterator draws nothing from the run's.
    return DataLoader(rows, batch_sampler=order, collate_fn=collated, generator=torch.Generator())


def inputs_and_targets(batch: dict[str, Any], seq_length: int) -> tuple[torch.Tensor, torch.Tensor, Documents | None]:
    """ids and shifted targets, int64 `[B, S]` with S at most `seq_length`, of a batch of rows, and their documents.

    A row's token after the sequence serves as the last target where the row has one, in the same document. Tokens with
    the label -100 or a `loss_mask` of 0 are no targets.
    """
    labels = batch.get("labels", batch["input_ids"])
    if "loss_mask" in batch:
        labels = labels.masked_fill(batch["loss_mask"] == 0, IGNORE_INDEX)
    documents: Documents | None = batch.get("documents")
    targets = shift_labels(labels, documents)[:, :seq_length]
    return batch["input_ids"][:, :seq_length], targets, None if documents is None else documents.cut(seq_length)


def counted_tokens(batch: dict[str, Any], rows: int, length: int) -> tuple[torch.Tensor, int]:
    """int64 `[rows]`, how many tokens of each row are not the padding of its batch, and their common length."""
    own = batch.get("row_lengths", torch.full((rows,), length))
    return own.clamp(max=length), length
