"""Tokenizers, text, a saved tiny model and rank jobs for the eval tests."""

import pydoc_data.topics
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

from easyctx.evals.encoding import TextEncoder
from easyctx.evals.models import load_config, load_scorer
from easyctx.evals.needle_settings import Cell, NeedleSettings
from easyctx.evals.scoring import Scorer
from easyctx.evals.session import Session
from easyctx.mesh import Mesh, make_mesh
from easyctx.modes import make_mode_mesh
from easyctx.patch import apply_seq_parallel_monkey_patch

SPECIALS = ["<unk>", "<s>", "</s>"]


@cache
def english() -> str:
    """Some 50K characters of English that every CPython carries."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics))[:50_000]


class CharacterTokenizer(PreTrainedTokenizer):
    """A slow tokenizer without offsets: one token a character, <s> in front."""

    def __init__(self, **kwargs: Any) -> None:
        characters = sorted(set(english()) | set("0123456789<>/\n"))
        self._ids = {text: number for number, text in enumerate([*SPECIALS, *characters])}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._ids)[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        return [1, *token_ids_0]


def _with_bos(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _byte_bpe(merges: bool) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if merges:
        trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([english()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _metaspace_bpe() -> PreTrainedTokenizerFast:
    """As Llama 2: BPE over the whole text as one word, BOS, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = SPECIALS + [f"<0x{byte:02X}>" for byte in range(256)]
    digits = list("0123456789")
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=specials, initial_alphabet=digits, show_progress=False
    )
    tokenizer.train_from_iterator([english()], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_bos(tokenizer)


def _unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=800,
        special_tokens=SPECIALS,
        unk_token="<unk>",
        initial_alphabet=[*"0123456789<>\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([english()[:30_000]], trainer)
    return _with_bos(tokenizer)


def _gemma() -> PreTrainedTokenizerFast:
    """As Gemma: BPE over the whole text, spaces replaced but none put in front, digits apart, BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    specials = SPECIALS + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=specials, initial_alphabet=list("0123456789"), show_progress=False
    )
    tokenizer.train_from_iterator([english()], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_bos(tokenizer)


TOKENIZERS = {
    "bytes": lambda: _byte_bpe(merges=False),
    "byte_bpe": lambda: _byte_bpe(merges=True),
    "metaspace_bpe": _metaspace_bpe,
    "unigram": _unigram,
    "gemma": _gemma,
    "slow": CharacterTokenizer,
}


@cache
def tokenizer(name: str) -> Any:
    return TOKENIZERS[name]()


@cache
def encoder(name: str) -> TextEncoder:
    return TextEncoder(tokenizer(name))


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A float32 byte-level Llama of two layers whose context is 256."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


def save_tiny_model(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    tiny_llama(seed, **overrides).save_pretrained(folder)
    tokenizer("bytes").save_pretrained(folder)
    return folder


def one_process_scorer(model: torch.nn.Module) -> Scorer:
    return Scorer(model, "data_parallel", Mesh(), torch.device("cpu"))


def score_on_ranks(rank: int, world: int, mode: str, sp_degree: int, length: int, fsdp2: bool) -> tuple[Any, Any]:
    """(logprob, predicted) of a ragged batch under `mode`; every rank holds the whole answer."""
    mesh = make_mode_mesh(mode, sp_degree, 2 if mode == "usp_attn" else None)
    model = tiny_llama()
    apply_seq_parallel_monkey_patch(mode, model, mesh=mesh)
    if fsdp2:  # in the units that accelerate makes
        for unit in (*model.model.layers, model.model.embed_tokens, [model.model.norm, model.lm_head], model):
            fully_shard(unit)
    scored = Scorer(model, mode, mesh, torch.device("cpu")).score_targets(*ragged_targets(length))
    return scored.logprob.numpy(), scored.predicted.numpy()


def ragged_targets(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and targets [2, length]; most are not scored, and some ranks hold no scored token at all."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 256, (2, length), generator=generator)
    targets = torch.full_like(ids, -100)
    targets[:, -4:-1] = ids[:, -3:]
    targets[1, -2] = -100
    return ids, targets


def run_needle_on_ranks(rank: int, world: int, mode: str, sp_degree: int, model: str, folder: str) -> None:
    """The needle eval of five cells without a launcher."""
    from easyctx.evals.needle import run_model

    session = Session(mode, make_mesh(sp_degree), torch.device("cpu"), torch.float32, force=True)
    cells = [Cell(300, depth, 0) for depth in (0.0, 25.0, 50.0, 75.0, 100.0)]
    settings = NeedleSettings(digits=4)
    run_model(session, model, "tiny", Path(folder), settings, cells, english(), overwrite=False)


def share_on_ranks(rank: int, world: int, sp_degree: int, num_items: int) -> tuple[list[Any], list[Any]]:
    """The items of this rank, and what all ranks gather from those that count."""
    session = Session("data_parallel", make_mesh(sp_degree), torch.device("cpu"), torch.float32)
    shared = list(session.share(range(num_items)))
    return shared, session.gather([item for item, counts in shared if counts])


def mistake_on_main(rank: int, world: int) -> str:
    """What each rank gets of a mistake that only the first one sees."""
    session = Session("data_parallel", make_mesh(1), torch.device("cpu"), torch.float32)

    def refuse() -> None:
        raise ValueError(f"rank {rank} says no")

    try:
        session.on_main(refuse)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def run_perplexity_on_ranks(rank: int, world: int, mode: str, sp_degree: int, model: str, folder: str) -> None:
    """The perplexity eval of three documents without a launcher."""
    from easyctx.evals.documents import Document
    from easyctx.evals.perplexity_windows import PREFIX, Window, score_document
    from easyctx.evals.results import append_rows

    session = Session(mode, make_mesh(sp_degree), torch.device("cpu"), torch.float32, force=True)
    rng = np.random.default_rng(0)
    documents = [Document(f"{number}", rng.integers(0, 256, 101)) for number in range(3)]
    scorer = load_scorer(session, model, load_config(session, model))
    for document, counts in session.share(documents):
        rows = session.gather([score_document(scorer, document, [50, 101], Window(PREFIX), 4)] if counts else [])
        if session.is_main:
            append_rows(Path(folder) / "rows.jsonl", rows)


def tokens_of(ids: np.ndarray) -> list[int]:
    return [int(token) for token in ids]


def nll_of(ids: np.ndarray) -> np.ndarray:
    """Brute force: NLL of ids[1:] from one forward over exactly these tokens."""
    tokens = torch.from_numpy(ids)[None]
    with torch.no_grad():
        logprob = tiny_llama()(tokens).logits.double().log_softmax(-1)
    return -logprob[0, :-1].gather(-1, tokens[0, 1:, None]).squeeze(-1).numpy()


def perplexity_arguments(model: str, folder: Path) -> list[str]:
    """The flags of a run over three texts of 900 characters and a short one, which are written here."""
    (folder / "texts").mkdir()
    for number in range(3):
        (folder / "texts" / f"{number}.txt").write_text(english()[5000 * number :][:900])
    (folder / "texts" / "short.txt").write_text("too short")
    data, out = str(folder / "texts"), str(folder / "out")
    return ["--model", model, "--data", data, "--lengths", "64", "300", "--force", "--output", out]
