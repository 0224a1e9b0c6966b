"""Packed weights in huge pages: the same numbers elsewhere."""

import copy
import io
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import random_codes

from quip import cpu, pages
from quip.incoherence import make_transform
from quip.kernels import QuantizedLinear, pack

huge = pytest.mark.skipif(not pages.page_size(), reason="no huge pages here")
kernel = pytest.mark.skipif(cpu.library() is None, reason="no CPU kernel here")


@huge
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_large_tensor_is_copied(dtype):
    size = pages.page_size()
    t = torch.randint(256, (3, size // 2 + 5)).to(dtype)
    moved = pages.in_huge_pages(t)
    assert torch.equal(moved, t) and moved.data_ptr() % size == 0 and moved.dtype == dtype
    assert moved.untyped_storage().nbytes() == t.nbytes and moved.is_contiguous()
    assert pages.in_huge_pages(moved) is moved


@huge
def test_small_and_shared_tensors_stay():
    small = torch.zeros(pages.page_size() - 1, dtype=torch.uint8)
    shared = torch.zeros(pages.page_size() + 1, dtype=torch.uint8).share_memory_()
    assert pages.in_huge_pages(small) is small and pages.in_huge_pages(shared) is shared


@pytest.mark.parametrize("enabled", ["always madvise [never]", None, "always [madvise] never"])
def test_systems_without_them(monkeypatch, tmp_path, enabled):
    monkeypatch.setattr(pages, "LINUX", tmp_path)
    if enabled:
        (tmp_path / "enabled").write_text(enabled)
        (tmp_path / "hpage_pmd_size").write_text("4096" if "never]" in enabled else "rubbish")
    pages.page_size.cache_clear()
    try:
        t = torch.zeros(2**22, dtype=torch.uint8)
        assert pages.page_size() == 0 and pages.in_huge_pages(t) is t
    finally:
        pages.page_size.cache_clear()


def test_systems_that_do_not_know_them(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    pages.page_size.cache_clear()
    try:
        assert pages.page_size() == 0
    finally:
        pages.page_size.cache_clear()


@huge
def test_without_memory_nothing_moves(monkeypatch):
    def none(*args, **kinds):
        raise OSError(12, "Cannot allocate memory")

    t = torch.zeros(pages.page_size() + 1, dtype=torch.uint8)
    monkeypatch.setattr(mmap, "mmap", none)
    assert pages.in_huge_pages(t) is t


@huge
@kernel
def test_first_calls_of_several_threads():
    # each may move the codes while another multiplies by them
    m, n = 4096, 8192
    for seed in range(3):
        layer = QuantizedLinear(n, m, 2)
        layer.qweight.copy_(pack(random_codes(m, n, 2, seed), 2))
        layer.V, layer.U = make_transform(n, 1), make_transform(m, 2)
        x, start = torch.randn(1, n), threading.Barrier(4)

        def call(i, layer=layer, x=x, start=start):
            start.wait()
            return layer(x)

        with ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(call, range(4))
        assert all(torch.equal(y, first) for y in others) and torch.equal(layer(x), first)


@huge
@kernel
def test_a_layer_moves_its_codes_once():
    m, n = 4096, 4096 + 64
    layer = QuantizedLinear(n, m, 2)
    layer.qweight.copy_(pack(random_codes(m, n, 2), 2))
    layer.transforms = torch.tensor([[1, 0], [2, 0]])
    plain = copy.deepcopy(layer)
    for x in (layer, plain):
        x.V, x.U = (make_transform(width, seed) for width, seed in ((n, 1), (m, 2)))
    with torch.inference_mode():  # as whoever calls it may have it
        layer(torch.ones(1, n))
    assert not layer.qweight.is_inference()
    before, x = layer.qweight, torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert layer.qweight is before and before.data_ptr() % pages.page_size() == 0
    call = layer.call
    assert torch.equal(layer(x), y) and layer.call is call
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "page_size", lambda: 0)
        assert torch.equal(plain(x), y)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    assert len(saved.getvalue()) < layer.qweight.nbytes + 10_000
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), y) and again.qweight.data_ptr() != layer.qweight.data_ptr()
