"""A byte-level BPE tokenizer, and a Llama with random weights to train from nothing.

    python -m train_scripts.proof.start --texts output/proof/texts/train --output output/proof/start

Digits and line breaks are always tokens of their own, so a number is spelled the same wherever it stands, and a text
can be put together from pieces that were tokenised alone.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from easyctx.evals.needle_settings import ANSWER_STUB, NEEDLE, PREFIX, QUESTION
from easyctx.evals.numbers import CITIES
from easyctx.evals.tasks.longchat_prompts import LINES
from easyctx.evals.tasks.words import ADJECTIVES, NOUNS
from train_scripts.proof.tasks import FORMS

END = "<|end|>"
HEAD_DIM = 64
WORD_TIMES = 400  # so often the tasks' words are shown to the tokenizer, so that each becomes one token


def task_texts() -> Iterator[str]:
    """The words of the tasks, without numbers."""
    rng = random.Random(0)
    templates = [PREFIX, NEEDLE, QUESTION, ANSWER_STUB, *LINES.values(), *(text for form in FORMS for text in form)]
    for _ in range(WORD_TIMES):
        words = [*CITIES, *ADJECTIVES, *NOUNS]
        rng.shuffle(words)
        yield " ".join(words) + "\n" + "-".join(words) + "\n"
        yield "\n".join(template.replace("{key}", "").replace("{city}", "") for template in templates)


def train_tokenizer(texts: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trained on the .txt files of a folder and on the tasks' words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def everything() -> Iterator[str]:
        for file in sorted(texts.glob("*.txt")):
            yield from file.read_text(encoding="utf-8").splitlines(keepends=True)
        yield from task_texts()

    tokenizer.train_from_iterator(everything(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def make_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head_dim,
        num_key_value_heads=args.hidden // args.head_dim,
        head_dim=args.head_dim,
        max_position_embeddings=args.length,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        initializer_range=0.6 / args.hidden**0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--texts", type=Path, help="folder of .txt to train the tokenizer on")
    tokens.add_argument("--tokenizer", type=Path, help="folder of one that was trained before, of its vocabulary")
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer and model")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM)
    parser.add_argument("--length", type=int, default=2048, help="of the first training")
    parser.add_argument("--rope-theta", type=float, default=1e4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.hidden % args.head_dim:
        parser.error(f"--hidden {args.hidden} is no multiple of --head-dim {args.head_dim}")
    if args.tokenizer is None:
        tokenizer = train_tokenizer(args.texts, args.vocabulary)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    torch.manual_seed(args.seed)
    # As the proof's models are saved; training goes on in float32.
    model = LlamaForCausalLM(make_config(args, tokenizer)).to(torch.bfloat16)
    tokenizer.save_pretrained(args.output)
    model.save_pretrained(args.output)
    print(f"proof: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens, in {args.output}")


if __name__ == "__main__":
    main()
