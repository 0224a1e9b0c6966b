"""Layers as files: what is read is what was written, up to float16."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from quip import QuipError
from quip.layers import load_layers, save_layers


def layer(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * n, n, generator=g, dtype=torch.float64) * torch.logspace(-2, 2, n)
    return torch.randn(m, n, generator=g, dtype=torch.float64), X.T @ X / len(X)


@pytest.mark.parametrize("m,n", [(1, 1), (3, 2), (7, 40)])
def test_round_trip(tmp_path, m, n):
    layers = {"b": layer(m, n), "a": layer(n, m, 1)}
    save_layers(tmp_path / "x.safetensors", layers)
    read = load_layers(tmp_path / "x.safetensors")
    assert list(read) == ["a", "b"]
    for name, (W, H) in layers.items():
        W_, H_ = read[name]
        assert W_.dtype == H_.dtype == torch.float64
        assert torch.allclose(W_, W, rtol=1e-3, atol=1e-6)
        scale = H.diagonal().sqrt()
        assert ((H_ - H).abs() <= 2e-3 * scale * scale[:, None]).all()
        assert (torch.linalg.eigvalsh(H_) > 0).all()


def test_what_cannot_be_written(tmp_path):
    W, H = layer(2, 5)
    with pytest.raises(QuipError, match="some\\.layer: H is not positive definite"):
        save_layers(tmp_path / "x", {"some.layer": (W, H - H.trace() * torch.eye(5))})
    with pytest.raises(QuipError, match="some\\.layer: entries too large for float16"):
        save_layers(tmp_path / "x", {"some.layer": (1e6 * W, H)})
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(QuipError, match="cannot read layers"):
        load_layers(path)
    save_layers(path, {"a": layer(2, 5)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(QuipError, match="cannot read layers"):
        load_layers(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file({"a.W": tensors["a.W"], "a.L": tensors["a.L"][:-1]}, path)
    with pytest.raises(QuipError, match="is damaged: a has no"):
        load_layers(path)
    save_file({"a.W": tensors["a.W"]}, path)
    with pytest.raises(QuipError, match="is damaged: a has no"):
        load_layers(path)
    save_file({"other": tensors["a.W"]}, path)
    with pytest.raises(QuipError, match="holds no layers"):
        load_layers(path)
