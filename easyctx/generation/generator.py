"""Generation over long contexts: a context's keys are computed once, sharded, and any number of questions use them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from easyctx.generation.calls import Branch, Call
from easyctx.generation.context import PREFILL_CHUNK, Context, cache_bytes, free_bytes
from easyctx.generation.model import make_ranks, our_attention, run, shards_weights
from easyctx.generation.store import KeyStore
from easyctx.generation.tails import Tail, make_tails
from easyctx.generation.text import Answer, Sampling, Writer, end_tokens
from easyctx.head import inner_model
from easyctx.mesh import Mesh, num_processes
from easyctx.rope import needs_global_length, switch_length

BATCH_SIZE = 16


class Generator:
    """Generates with a Hugging Face causal LM under any mode. All ranks must make the same calls.

    The context goes through the model in chunks, each sharded over the ranks as in training; a rank keeps the keys of
    its tokens. Questions, and what is generated, are computed by all ranks alike: a query attends to every rank's
    keys, and the partial results are merged by their log-sum-exps. A rank holds 1 / P of the context's keys, and all
    of the few that follow it.

    Args:
        model: stock or patched, on its device, in evaluation mode; alone or as DeepSpeed or FSDP2 wrapped it.
        tokenizer: decodes answers and names the end of a text.
        mode: a mode of `easyctx.modes.MODES`; data_parallel is one process to a context.
        mesh: from `make_mesh`; default: one process.
        prefill_chunk: tokens of a rank that go through the model at a time.
        offload_cache: keep the context's keys in host memory; a layer's come to the device as it is called.
        batch_size: questions that are answered at the same time, if together they are no longer than a chunk.
        use_cache: False keeps no keys: every new token computes its whole text again, all at once, one question after
            the other. That takes the memory of one layer's activations, and the time of a prefill for each token.

    Raises:
        ValueError: for what is not computed exactly (families, dropout, head counts, a mode with one process).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        mode: str = "data_parallel",
        mesh: Mesh | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        offload_cache: bool = False,
        *,
        batch_size: int = BATCH_SIZE,
        use_cache: bool = True,
    ) -> None:
        for name, value in (("prefill_chunk", prefill_chunk), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1")
        if offload_cache and not use_cache:
            raise ValueError("offload_cache is True and use_cache False, which keeps nothing to put there: choose one")
        self.model, self.tokenizer, self.use_cache = model, tokenizer, use_cache
        self._largest_position = 0  # of the text that is in the model
        self.config = inner_model(model).config
        self.ranks = make_ranks(mode, mesh, self.config, one_length=True)
        self._in_step = num_processes() > self.ranks.size and shards_weights(model)
        self.prefill_chunk, self.offload_cache, self.batch_size = prefill_chunk, offload_cache, batch_size

    @property
    def device(self) -> torch.device:
        """Of the model, asked for late: an engine may move it."""
        return torch.device(getattr(self.model, "device", "cpu"))

    @torch.no_grad()  # in inference mode FSDP2 would make buffers that training cannot use afterwards
    def answer(
        self,
        context_ids: Sequence[int],
        questions: Sequence[Sequence[int]] = ((),),
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Answer]:
        """One answer for each question, each as if `context_ids + question` had been the whole prompt.

        The context is computed once. Short prompts are questions without a context.

        Args:
            context_ids: token ids, special tokens included; nothing is added to them. May be empty.
            questions: token ids that follow the context; an empty one continues the context itself.
            max_new_tokens: of each answer.
            stop: strings that end an answer as soon as they are in its text, wherever token borders fall.
            temperature, top_p, seed: 0 is greedy. Otherwise answers depend on the seed and on the question's number.

        Raises:
            ValueError: for token ids outside the vocabulary, a prompt without tokens, and settings out of range.
        """
        sampling = Sampling(temperature, top_p, seed)
        context = _token_ids("context_ids", context_ids)
        asked = [_token_ids(f"questions[{number}]", question) for number, question in enumerate(questions)]
        self._check(context, asked, max_new_tokens, stop)
        ends = end_tokens(inner_model(self.model), self.tokenizer)
        writers = [Writer(self.tokenizer, ends, stop, max_new_tokens) for _ in asked]
        alone = [i for i, question in enumerate(asked) if self._is_alone(context, question)]
        together = [i for i in range(len(asked)) if i not in alone]
        with our_attention(self.model, lambda: self._largest_position):
            if not self.use_cache:
                for i, question in enumerate(asked):
                    self._write_again(i, context + question, writers[i], sampling)
                alone, together = [], []
            for i in alone:
                prompt = context + asked[i]
                before = self.prefill(prompt)
                self._write(before, {i: prompt[before.length :]}, writers, sampling)
            if together:
                before = self.prefill(context)
                rest = context[before.length :]
                for batch in self._batches({i: rest + asked[i] for i in together}):
                    self._write(before, batch, writers, sampling)
            self._wait_for_others()
        return [writer.answer for writer in writers if writer.answer is not None]

    def _is_alone(self, context: list[int], question: list[int]) -> bool:
        """Whether a question has its context computed for itself.

        Keys may depend on how long the text is (`easyctx.rope`); and of a question that is long itself, and no shorter
        than its context, a rank should not compute and keep all.
        """
        return needs_global_length(self.config) or len(question) > max(self.prefill_chunk, len(context))

    def _batches(self, questions: dict[int, list[int]]) -> Iterator[dict[int, list[int]]]:
        """As many questions as are answered at the same time, and as are one chunk of tokens."""
        batch: dict[int, list[int]] = {}
        for number, ids in questions.items():
            tokens = sum(map(len, batch.values())) + len(ids)
            if batch and (len(batch) == self.batch_size or tokens > self.prefill_chunk):
                yield batch
                batch = {}
            batch[number] = ids
        if batch:
            yield batch

    def prefill(self, context: Sequence[int]) -> Context:
        """The keys of all of the context but a few tokens, the last one at least."""
        ids = torch.tensor(context[:-1], dtype=torch.int64)
        found = Context(
            lambda call: self._run(call, []), self.ranks, ids, self.prefill_chunk, offload=self.offload_cache
        )
        self._check_memory(len(found.ids))
        self._largest_position = len(context) - 1
        found.compute(len(found.ids))
        return found

    def _write(self, before: Context, coming: dict[int, list[int]], writers: list[Writer], sampling: Sampling) -> None:
        """Answer a batch of questions: `coming` holds, by their numbers, the tokens that the model has yet to see."""
        start = before.length
        tails = make_tails(start, {n: len(ids) + writers[n].max_new_tokens for n, ids in coming.items()})
        coming = {n: coming[n] for n in tails}
        step = 0
        while coming:
            branches = [Branch(ids, start, tails[n]) for n, ids in coming.items()]
            call = Call(self.ranks, before.store, branches=branches)
            last = [where.stop - 1 for where in call.branch_slices()]
            logits = self._run(call, last)
            self._largest_position = max(tail.start + tail.length for tail in tails.values())
            tokens = self._agreed(sampling.draw(logits, list(coming), step))
            for number, token in zip(list(coming), tokens, strict=True):
                writers[number].add(token)
                coming[number] = [token]
                if writers[number].answer is not None:
                    del coming[number], tails[number]
            step += 1

    def _write_again(self, number: int, ids: list[int], writer: Writer, sampling: Sampling) -> None:
        """Answer one question without keeping keys: `ids` is its whole prompt."""
        step = 0
        while writer.answer is None:
            body = (len(ids) - 1) // self.ranks.multiple * self.ranks.multiple
            rest = Branch(ids[body:], body, Tail(body))
            call = Call(self.ranks, KeyStore(0), body_ids=torch.tensor(ids[:body], dtype=torch.int64), branches=[rest])
            self._largest_position = len(ids) - 1
            logits = self._run(call, [call.branch_slices()[0].stop - 1])
            (token,) = self._agreed(sampling.draw(logits, [number], step))
            writer.add(token)
            ids, step = [*ids, token], step + 1

    def _run(self, call: Call, rows: list[int]) -> torch.Tensor:
        if self._in_step:
            self._is_anyone_at_work(True)
        return run(self.model, call, rows, self.device)

    def _wait_for_others(self) -> None:
        """Where an engine gathers weights for all ranks together, call the model until the last of them is done."""
        while self._in_step and self._is_anyone_at_work(False):
            run(self.model, Call(self.ranks, KeyStore(0), branches=[Branch([0], 0, Tail(0))]), [], self.device)

    def _is_anyone_at_work(self, am_i: bool) -> bool:
        at_work = torch.tensor(int(am_i), device=self.device)
        dist.all_reduce(at_work)
        return bool(at_work)

    def _agreed(self, tokens: list[int]) -> list[int]:
        """The first rank's tokens: the last bit of a logit may differ between devices."""
        mesh = self.ranks.mesh
        if mesh.sp_size == 1:
            return tokens
        shared = torch.tensor(tokens, device=self.device)
        dist.broadcast(shared, group_src=0, group=mesh.sp_group)
        return shared.tolist()

    def _check_memory(self, length: int) -> None:
        """ValueError if the keys of a rank's share of `length` tokens do not fit into what the GPU has left."""
        if self.device.type != "cuda" or self.offload_cache:
            return
        needed = cache_bytes(self.config, length // self.ranks.size, next(self.model.parameters()).dtype)
        free = free_bytes(self.device, self.ranks.mesh)
        if needed > free:
            raise ValueError(
                f"the keys of {length} tokens take {needed / 2**30:.1f} GiB on each of {self.ranks.size} ranks, and "
                f"{free / 2**30:.1f} GiB are free: set offload_cache=True, or share the context among more ranks"
            )

    def _check(self, context: list[int], questions: list[list[int]], max_new_tokens: int, stop: Sequence[str]) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1")
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop is {stop!r}; give a list of strings, none of them empty")
        vocabulary = self.config.get_text_config().vocab_size
        for number, question in enumerate(questions):
            if not context and not question:
                raise ValueError(f"question {number} and the context are both empty: there is nothing to go on from")
        self._check_rope([len(context) + len(question) for question in questions], max_new_tokens)
        for name, ids in (("context_ids", context), *((f"questions[{i}]", q) for i, q in enumerate(questions))):
            if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
                raise ValueError(
                    f"{name} holds token ids from {min(ids)} to {max(ids)}, but the model's vocabulary is 0 to "
                    f"{vocabulary - 1}: take the tokenizer that belongs to the model"
                )

    def _check_rope(self, lengths: list[int], max_new_tokens: int) -> None:
        """Refuse answers during which longrope would change its factors, for which all keys would have to be new."""
        switch = switch_length(self.config)
        for length in lengths:
            if switch is not None and length <= switch < length + max_new_tokens:
                raise ValueError(
                    f"a prompt of {length} tokens and {max_new_tokens} new ones cross {switch} tokens, where this "
                    "model's longrope changes all keys: ask for fewer new tokens, or give a longer prompt"
                )


def _token_ids(name: str, given: Any) -> list[int]:
    """A list of whole numbers from any sequence of them; ValueError for text, and for a batch."""
    try:
        if isinstance(given, str):
            raise TypeError
        return [int(token) for token in (given.tolist() if hasattr(given, "tolist") else given)]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is to be a sequence of token ids, such as tokenizer(text)['input_ids'], not {type(given).__name__}"
            f"{' of shape ' + str(tuple(given.shape)) if hasattr(given, 'shape') else ''}"
        ) from None
