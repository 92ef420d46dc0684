"""Trains a tiny byte-level Llama from nothing, at a short context, until it finds needles there.

    python -m train_scripts.quickstart.pretrain --output DIR --seed 0

An ordinary loop on one device. Leaves in DIR: the model (`short/`), the rows for its extension (`long_rows/`), and
the held-out text that both evals read (`held_out/`), which neither training sees.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

from train_scripts.quickstart import folders
from train_scripts.quickstart.corpus import Text, load_topics, split_topics, unigram_perplexity
from train_scripts.quickstart.long_rows import save_long_rows
from train_scripts.quickstart.samples import short_rows
from train_scripts.quickstart.tokenizer import VOCAB_SIZE, save_tokenizer

SHORT_LENGTH = 256
ROPE_THETA = 1500.0  # 256 bytes do with 500, but from there the extension has further to go
TOKENS_PER_STEP = 2048
# Muon is for the layers' matrices: with AdamW alone, some seeds need more than twice the steps to find needles.
MATRIX_LEARNING_RATE, LEARNING_RATE = 5e-3, 2e-3
LAST_SHARE = 0.05  # of both learning rates, at the end
WARMUP_STEPS = 20
# Copying digits is what is hard to learn: text counts less at first, and digits no more where they are learned.
FIRST_TEXT_WEIGHT, LAST_TEXT_WEIGHT = 0.3, 1.0
# Answer losses (nats a digit, running mean over some 20 steps).
NEARLY_LEARNED = 0.05  # at which a stage ends early
LEARNED = 0.03  # at which only text is trained on
MOST_THREADS = 4  # more only get in each other's way in a model of this size


@dataclass(frozen=True)
class Stage:
    """So many steps at one length, fewer where it is learned sooner. A share `several` of the rows has more queries."""

    length: int
    most_steps: int
    several: float


# A needle is found far off only after it is found nearby. The last stage takes what steps are left.
NUM_STEPS = 900
LEAST_STEPS = 50
# Some initialisations are slow to tell the digits apart, and find needles badly to the end. The first rows show it:
# what others learn in under 200 steps they do not in these, and another initialisation is tried.
MOST_FIRST_STEPS, MOST_BEGINNINGS = 220, 3
STAGES = (
    Stage(48, MOST_FIRST_STEPS, 0.8),
    Stage(64, 300, 0.5),
    Stage(128, 300, 0.4),
    Stage(SHORT_LENGTH, NUM_STEPS, 0.3),
)


def make_model(seed: int, beginning: int = 0) -> LlamaForCausalLM:
    """Two layers, 0.4M parameters: what it takes to find the needle and then copy the digit after the last one."""
    torch.manual_seed(seed + 10**9 * beginning)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=SHORT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.1,  # the usual 0.02 is for wide models, and starts this one slowly
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest: embeddings, head and norms are not Muon's."""
    matrices = {name: p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    return [
        # As long steps as AdamW's, so that rates of the two are alike.
        torch.optim.Muon(matrices.values(), lr=MATRIX_LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_share(step: int, num_steps: int) -> float:
    """Share of the learning rates at a step: a cosine after a warm-up."""
    cosine = LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * step / num_steps)) / 2
    return cosine * min(1.0, (step + 1) / WARMUP_STEPS)


def text_weight(step: int, num_steps: int) -> float:
    """Weight of the text loss at a step: a straight line."""
    return FIRST_TEXT_WEIGHT + (LAST_TEXT_WEIGHT - FIRST_TEXT_WEIGHT) * step / num_steps


def losses(model: LlamaForCausalLM, ids: torch.Tensor, is_answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss over the answers' digits and over all other tokens; ids and is_answer are [B, S]."""
    logits = model(input_ids=ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    of_answer = is_answer[:, 1:].flatten()
    return loss[of_answer].mean(), loss[~of_answer].mean()


def train(text: Text, seed: int, num_steps: int = NUM_STEPS, stages: tuple[Stage, ...] = STAGES) -> LlamaForCausalLM:
    """The model after `num_steps` steps through the stages."""
    for beginning in range(MOST_BEGINNINGS):
        model = train_once(text, seed, beginning, num_steps, stages)
        if model is not None:
            break
        print("digits are not told apart yet: beginning again from another initialisation")
    assert model is not None, "the last beginning is not given up"
    return model


def train_once(
    text: Text, seed: int, beginning: int, num_steps: int, stages: tuple[Stage, ...]
) -> LlamaForCausalLM | None:
    """The trained model, or None if the first stage went by without being learned and another beginning is left."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(seed, beginning).to(device)
    optimizers = make_optimizers(model)
    schedules = [LambdaLR(optimizer, partial(rate_share, num_steps=num_steps)) for optimizer in optimizers]
    rng = np.random.default_rng(seed if beginning == 0 else [seed, beginning])
    place, steps_there = 0, 0  # in the stages
    recent = math.log(10)  # running mean of the answer loss, at first that of guessing digits
    progress = trange(num_steps, desc="training", unit="step", mininterval=1.0)
    for step in progress:
        if is_over(stages[place], steps_there, recent) and place + 1 < len(stages):
            if place == 0 and recent >= NEARLY_LEARNED and beginning + 1 < MOST_BEGINNINGS:
                progress.close()
                return None
            place, steps_there = place + 1, 0
        stage = stages[place]
        steps_there += 1
        rows = short_rows(text, rng, stage.length, TOKENS_PER_STEP // stage.length, stage.several)
        ids, is_answer = (torch.from_numpy(array).to(device) for array in rows)
        answer_loss, text_loss = losses(model, ids, is_answer)
        (text_weight(step, num_steps) * text_loss + (answer_loss if recent > LEARNED else 0.0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        recent += 0.05 * (float(answer_loss.detach()) - recent)
        if step % 25 == 24 or step + 1 == num_steps:
            progress.set_postfix_str(f"{stage.length} bytes, digits {recent:.3f}, text {text_loss:.2f}")
    return model


def is_over(stage: Stage, steps_there: int, answer_loss: float) -> bool:
    """Whether to go on to longer rows."""
    return steps_there >= stage.most_steps or (steps_there >= LEAST_STEPS and answer_loss < NEARLY_LEARNED)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(MOST_THREADS, cores))

    training, held_out = split_topics(load_topics())
    print(
        f"text: {len(training.ids):,} bytes to train on, {len(held_out.ids):,} held out, on which byte frequencies "
        f"alone have a perplexity of {unigram_perplexity(training, held_out):.1f}"
    )
    folders.write_text(args.output / folders.HELD_OUT, held_out.string)
    save_long_rows(training, args.seed, args.output / folders.LONG_ROWS)

    begin = time.monotonic()
    model = train(training, args.seed)
    folder = args.output / folders.SHORT_MODEL
    model.save_pretrained(folder)
    save_tokenizer(folder, SHORT_LENGTH)
    print(f"saved {folder} after {time.monotonic() - begin:.0f} s of training")


if __name__ == "__main__":
    main()
