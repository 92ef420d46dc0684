"""Which kernel takes a few queries over kept keys, and blocks of few keys."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from easyctx.generation import prefix
from easyctx.generation.calls import Ranks
from easyctx.generation.prefix import Keys, attend_sharded
from easyctx.kernel import KERNELS, Score
from easyctx.kernel.reference import Reference
from easyctx.layout import Run
from easyctx.mesh import Mesh
from easyctx.modes import get_mode

NUM_KEYS = 50


class Sharing(Reference):
    """In place of a GPU's kernel that shares out keys."""

    calls = 0

    def forward(self, *given: Any) -> Any:
        self.calls += 1
        return super().forward(*given)


def attended(kernel: str, *, queries: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, heads, 16, generator=generator) for n, heads in ((queries, 4), (NUM_KEYS, 2), (NUM_KEYS, 2))
    )
    how = Ranks(get_mode("ring_attn"), Mesh(), kernel).attention(q, Score(0.25), None)
    where = (slice(0, queries), Run(NUM_KEYS, queries), NUM_KEYS)
    return attend_sharded(q, [where], [Keys(k, v, (Run(0, NUM_KEYS),))], how)[0]


def test_a_kernel_that_was_named_takes_a_few_queries_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sharing, named = Sharing(), Sharing()
    monkeypatch.setattr(prefix, "_SPLITTING", sharing)
    monkeypatch.setitem(KERNELS, "tiled", named)
    want = attended("auto")
    assert (sharing.calls, named.calls) == (1, 0)
    torch.testing.assert_close(attended("tiled"), want)
    assert (sharing.calls, named.calls) == (1, 1)


def test_the_kernel_that_shares_out_keys_does_so_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sharing = Sharing()
    monkeypatch.setattr(prefix, "_SPLITTING", sharing)
    monkeypatch.setitem(KERNELS, "torch_flash", sharing)
    monkeypatch.setattr(prefix, "_attend_in_pieces", lambda *_: pytest.fail("taken in pieces"))
    attended("torch_flash")
    assert sharing.calls == 1


def test_another_kernel_for_few_keys_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    few: Any = SimpleNamespace(is_cuda=True, shape=(1, prefix.FEW_KEYS - 1, 2, 16))
    prefix._say_few_keys.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name, want in (("reference", "reference"), ("torch_flash", "torch_flash"), ("cudnn", "tiled")):
            call: Any = SimpleNamespace(kernel=KERNELS[name], forced=True)
            assert prefix._kernel(call, few).name == want
            assert prefix._kernel(call, few).name == want
    assert caplog.messages == ["easyctx: blocks of fewer than 64 keys go to the tiled kernel instead of cudnn"]
