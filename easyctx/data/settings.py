"""What `easyctx data` was asked for, and what of it cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from easyctx.data.folder import check_output
from easyctx.data.mix import Source, check_sources, parse_inputs, read_mix
from easyctx.data.plan import Wishes
from easyctx.data.readers import OpenSource, open_sources

MAX_SOURCES = 1 << 16  # what the store's numbers hold


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The flags of `easyctx data`; `bos` and `eos` of None decide by the tokenizer, `num_proc` of None by the work."""

    inputs: tuple[str, ...]
    tokenizer: str
    seq_length: int
    output: str
    mix: str | None = None
    tokens: int | None = None
    long_from: int | None = None
    long_share: float | None = None
    validation: float = 0.0
    shuffle: bool = False
    seed: int = 0
    text_field: str = "text"
    pack: bool = False
    borders: bool = False
    sft: bool = False
    chat: bool = False
    unpacked: bool = False
    max_source_tokens: int | None = None
    max_target_tokens: int | None = None
    skip_bad: bool = False
    bos: bool | None = None
    eos: bool | None = None
    pad_last: bool = False
    overwrite: bool = False
    num_proc: int | None = None

    @property
    def packs(self) -> bool:
        """Whether documents go into rows whole; examples must, or their responses would be cut away."""
        return (self.pack or self.sft) and not self.unpacked

    def wishes(self, sources: list[Source]) -> Wishes:
        """What the plan of the documents is to follow."""
        weights = [source.weight for source in sources if source.weight is not None]
        return Wishes(
            weights=weights or None,
            tokens=self.tokens,
            long_from=self.long_from,
            long_share=self.long_share,
            validation=self.validation,
            shuffle=self.shuffle,
            seed=self.seed,
        )


def check_settings(settings: DataSettings) -> tuple[list[OpenSource], Path]:
    """The sources, opened, and the output folder's path; `ValueError` for whatever cannot be, before any work."""
    _check_numbers(settings)
    if settings.mix is not None and settings.inputs:
        raise ValueError(
            f"--mix {settings.mix} and {settings.inputs[0]} both name sources: put all of them into the file"
        )
    sources = parse_inputs(settings.inputs) if settings.mix is None else read_mix(settings.mix)
    check_sources(sources)
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"{len(sources)} sources, more than {MAX_SOURCES}: name a folder instead of its files")
    return open_sources(sources), check_output(settings.output, overwrite=settings.overwrite)


def _check_numbers(settings: DataSettings) -> None:
    if settings.seq_length < 2:
        raise ValueError(f"--seq-length {settings.seq_length}: a row needs 2 tokens at least to predict one")
    if settings.num_proc is not None and settings.num_proc < 1:
        raise ValueError(f"--num-proc {settings.num_proc}: at least 1 process is needed")
    if settings.tokens is not None and settings.tokens < settings.seq_length:
        raise ValueError(f"--tokens {settings.tokens} is less than one row of --seq-length {settings.seq_length}")
    if (settings.long_from is None) != (settings.long_share is None):
        raise ValueError(
            "--long-from N and --long-share S go together: documents of N tokens and more, share S of them"
        )
    if settings.long_from is not None and settings.long_from < 1:
        raise ValueError(f"--long-from {settings.long_from}: a length in tokens is needed")
    if settings.long_share is not None and not 0 < settings.long_share < 1:
        raise ValueError(f"--long-share {settings.long_share:g} is a share of the tokens, between 0 and 1")
    if not 0 <= settings.validation < 1:
        raise ValueError(f"--validation {settings.validation:g} is a share of the documents, from 0 to below 1")
    if settings.chat and not settings.sft:
        raise ValueError("--chat is for examples: give --sft too")
    _check_examples(settings)
    if settings.pad_last and (settings.pack or settings.sft):
        raise ValueError("--pad-last is for joined rows; packed ones are padded anyway: leave it out")


def _check_examples(settings: DataSettings) -> None:
    if settings.unpacked and not settings.sft:
        raise ValueError("--unpacked makes each example a row of its own length: give --sft too")
    if settings.unpacked and settings.pack:
        raise ValueError("--pack joins examples into rows and --unpacked does not: give one of them")
    limits = {"--max-source-tokens": settings.max_source_tokens, "--max-target-tokens": settings.max_target_tokens}
    for name, limit in limits.items():
        if limit is None:
            continue
        if not settings.sft:
            raise ValueError(f"{name} is for examples: give --sft too")
        if not 1 <= limit < settings.seq_length:
            raise ValueError(f"{name} is {limit}, outside 1 .. {settings.seq_length - 1} (below --seq-length)")
