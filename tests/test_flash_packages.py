"""The kernels over flash-attn 2's and flash-attn-3's packages, on functions with the packages' own parameters.

The packages themselves are not here. What is held: which parameter gets what, that a package which is wrong or has
other parameters is refused by name, and that the small problems it must solve first find what could be wrong.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from easyctx.band import Block
from easyctx.kernel import KERNELS, Workload, flash_packages, torch_cuda
from easyctx.kernel.flash_packages import TOLERANCE, Flash2, Flash3
from easyctx.kernel.small_check import disagreement
from tests import flash_interfaces

CPU, EVERYTHING = torch.device("cpu"), dict(windowed=True, softcapped=True, packed=True)
KINDS = [{}, *({kind: True} for kind in EVERYTHING), EVERYTHING]


@pytest.fixture(autouse=True)
def interfaces(monkeypatch) -> dict[str, object]:
    """Modules by the names under which the kernels look for them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from attention_parts import flash_attn_stand_in

    found = {Flash2.module: flash_attn_stand_in, Flash3.module: flash_interfaces.NEWER}
    monkeypatch.setattr(flash_packages, "_interface", found.__getitem__)
    monkeypatch.setattr(flash_packages, "_installed", lambda distribution: "9.9")
    flash_packages._unusable.cache_clear()
    flash_packages._wrong_results.cache_clear()
    return found


def with_changes(interface: object, **changes) -> SimpleNamespace:
    names = [*flash_packages.DENSE, *flash_packages.PACKED]
    return SimpleNamespace(**{n: getattr(interface, n) for n in names if hasattr(interface, n)} | changes)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("form", ["flash-attn 2", "older", "newer", "operators"])
def test_they_are_exact(interfaces, form, kind):
    forms = {"older": flash_interfaces.OLDER, "newer": flash_interfaces.NEWER}
    if form == "operators":
        if kind != EVERYTHING:
            pytest.skip("once is enough")
        forms[form] = flash_interfaces.as_operators()
    kernel = Flash2() if form == "flash-attn 2" else Flash3()
    if form in forms:
        interfaces[Flash3.module] = forms[form]
    assert flash_packages._unusable(kernel) is None
    assert disagreement(kernel, CPU, torch.float64, **kind) < 1e-12
    assert disagreement(kernel, CPU, torch.bfloat16, **kind) < TOLERANCE / 2
    assert flash_packages._wrong(kernel, Workload(CPU, torch.bfloat16, 64, **kind)) is None


def wrong_functions(function, backward):
    """Ways in which a library could be other than it is taken for."""

    def changed(**changes):
        return lambda **given: function(**given | {n: change(given) for n, change in changes.items()})

    def spoilt(**given):
        result = function(**given)
        given["dk"].copy_(given["dv"])
        return result

    yield "scale", changed(softmax_scale=lambda given: given["softmax_scale"] * 1.1), {}
    yield "sides", changed(window_size_left=lambda g: g["window_size_right"]), {"windowed": True}
    yield "one more", changed(window_size_left=lambda g: g["window_size_left"] + 1), {"windowed": True}
    yield "no softcap", changed(softcap=lambda given: 0.0), {"softcapped": True}
    if backward:
        yield "own lse", changed(softmax_lse=lambda given: given["softmax_lse"] - 0.5), {}
        yield "dk is dv", spoilt, {}
    else:
        yield "no mask", changed(causal=lambda given: False), {}


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_wrong_is_refused(interfaces, backward):
    right, name = interfaces[Flash2.module], flash_packages.DENSE[backward]
    for what, function, kind in wrong_functions(getattr(right, name), backward):
        interfaces[Flash2.module] = with_changes(right, **{name: function})
        flash_packages._wrong_results.cache_clear()
        reason = flash_packages._wrong(Flash2(), Workload(CPU, torch.bfloat16, 64, **kind))
        assert reason is not None, what
        assert "(flash-attn 9.9) is wrong: off float64 by" in reason


def test_windows_over_few_keys_are_tried(interfaces, monkeypatch):
    """In one piece, the library would take an open side for as wide as there are keys."""

    def in_one_piece(num_queries, num_keys, band):
        return [Block(slice(0, num_queries), slice(0, num_keys), band)]

    assert disagreement(Flash2(), CPU, torch.float64, windowed=True) < 1e-12
    monkeypatch.setattr(torch_cuda, "blocks_of_rows", in_one_piece)
    assert disagreement(Flash2(), CPU, torch.float64, windowed=True) > TOLERANCE


def test_what_fails_is_refused(interfaces):
    def fails(**_):
        raise RuntimeError("this build has no softcap")

    interfaces[Flash3.module] = with_changes(flash_interfaces.OLDER, _flash_attn_backward=fails)
    reason = flash_packages._wrong(Flash3(), Workload(CPU, torch.bfloat16, 64))
    assert reason == "fails on a small problem: RuntimeError (this build has no softcap)"


def test_other_parameters_are_named(interfaces):
    def older_than_2_7(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax):
        raise AssertionError

    def wants_more(
        q,
        k,
        v,
        new,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
        softcap,
    ):
        raise AssertionError

    def reason(kernel, interface):
        interfaces[kernel.module] = interface
        flash_packages._unusable.cache_clear()
        return flash_packages._unusable(kernel)

    old = with_changes(interfaces[Flash2.module], _flash_attn_forward=older_than_2_7)
    assert reason(Flash2(), old) == (
        "has another interface in flash-attn 9.9 (_flash_attn_forward takes no window_size_left, window_size_right): "
        "it should be 2.7 or newer, below 3"
    )
    other_package = reason(Flash2(), flash_interfaces.NEWER)
    assert "_flash_attn_forward takes no alibi_slopes, dropout_p, return_softmax" in other_package
    assert "(no _flash_attn_forward)" in reason(Flash3(), SimpleNamespace())
    newer = with_changes(flash_interfaces.OLDER, _flash_attn_forward=wants_more)
    assert "(_flash_attn_forward wants new)" in reason(Flash3(), newer)


def test_what_is_not_there(interfaces, monkeypatch):
    def broken(module):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(flash_packages, "_interface", broken)
    assert flash_packages._unusable(Flash3()) == (
        "does not import: flash-attn-3 9.9 gives ImportError (undefined symbol: _ZN3c10)"
    )
    monkeypatch.setattr(flash_packages, "_installed", {}.get)
    flash_packages._unusable.cache_clear()
    assert "is not installed: it is the package flash-attn (2.7 or newer" in flash_packages._unusable(Flash2())
    assert Flash2().refuses(Workload(CPU, torch.bfloat16, 64)) == "runs on CUDA only, not on cpu"
    assert "multiples of 8" in Flash3().refuses(Workload(torch.device("cuda"), torch.bfloat16, 100))


def test_auto_prefers_what_has_been_run():
    order = list(KERNELS)
    assert order.index("flash4") < order.index("cudnn") < order.index("flash3") < order.index("torch_flash")
    assert order.index("torch_flash") < order.index("flex") < order.index("flash2") < order.index("tiled")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_that_are_right_pass_on_a_gpu(interfaces):
    """Ours that are run daily, and flash2 over PyTorch's FlashAttention 2, are well within the tolerance."""
    gpu = torch.device("cuda")
    for kernel in (KERNELS["flash4"], KERNELS["cudnn"], KERNELS["torch_flash"], Flash2()):
        for kind in KINDS:
            work = Workload(gpu, torch.bfloat16, 64, **kind)
            refused = kind.get("softcapped") if kernel.name == "flash2" else kernel.refuses(work)
            if not refused:
                assert disagreement(kernel, gpu, torch.bfloat16, **kind) < TOLERANCE / 2, (kernel.name, kind)
