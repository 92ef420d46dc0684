"""What the tests of `easyctx data` share: small tokenizers, a small corpus, and one way to run it."""

import gzip
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from easyctx import cli
from easyctx.data.load import load_tokenised

TEXTS = ["The cat sat on the mat. ", "Ünïcode, 123 numbers\r\nand lines\n", "A third one; it's longer than both. " * 9]
DOCUMENTS = [TEXTS[0], TEXTS[1], "\u2028" + TEXTS[0], TEXTS[2]]


def byte_bpe(pattern: str | None = None, special_tokens: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def save_plain_tokenizer(folder: Path) -> str:
    """Byte-level BPE with no special token at all."""
    PreTrainedTokenizerFast(tokenizer_object=byte_bpe()).save_pretrained(folder)
    return str(folder)


def save_marked_tokenizer(folder: Path) -> str:
    """Byte-level BPE that adds BOS itself and has EOS."""
    tokenizer = byte_bpe(special_tokens=("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)  # as left in many a tokenizer.json: must not cut documents
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return str(folder)


def make_corpus(folder: Path) -> Path:
    """DOCUMENTS as a text file, a JSONL file and a gzipped text file in a folder below."""
    (folder / "z").mkdir(parents=True)
    (folder / "a.txt").write_bytes(DOCUMENTS[0].encode())
    lines = "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in DOCUMENTS[1:3])
    (folder / "m.jsonl").write_bytes(lines.encode())
    (folder / "z" / "b.txt.gz").write_bytes(gzip.compress(DOCUMENTS[3].encode()))
    (folder / "notes.md").write_text("not read")
    return folder


def run(source: Path, tokenizer: str, output: Path, *more: str, length: int = 16, also: str = "") -> int:
    """Exit status of `easyctx data source [also] ...`."""
    command = ["data", str(source), *([also] if also else []), "--tokenizer", tokenizer]
    return cli.main([*command, "--output", str(output), "--seq-length", str(length), *more])


def summary_of(output: Path) -> dict:
    return json.loads((output / "easyctx_data.json").read_text(encoding="utf-8"))


def stream(output: Path, column: str = "input_ids") -> list[int]:
    return [value for row in load_tokenised(output)[column] for value in row]


def left_behind(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if "partial" in entry.name]
