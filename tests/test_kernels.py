"""Packed codes and the quantized layer: nothing is lost in packing, and the layer is the dense one."""

import copy
import pickle
from itertools import product

import pytest
import torch
from conftest import random_codes, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.algorithm import QuantizedMatrix, quantize_matrix
from quip.errors import QuipError
from quip.kernels import QuantizedLinear, linear_op, linear_torch, pack, packed_width, unpack
from quip.models import quantize_model

BITS = (2, 3, 4)
HALF = (torch.float16, torch.bfloat16)


def naive_pack(codes, bits):
    """Bit by bit: a stream of whole codes, or at 3 bits one of their bits 0 and 1, and then one of their bits 2."""
    m, n = codes.shape
    groups = -(-n // 64)
    packed = torch.zeros(m, groups * 8 * bits, dtype=torch.uint8)
    low = 4 if bits == 4 else 2
    for row, j, i in product(range(m), range(n), range(bits)):
        place = low * j + i if i < low else 64 * groups * low + j
        packed[row, place // 8] |= (codes[row, j].item() >> i & 1) << place % 8
    return packed


def quantized(m=24, n=40, bits=2, rescale=False, seed=0) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(seed)
    W, X = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for rows in (m, 2 * n))
    X *= torch.linspace(0.5, 2, n)
    return quantize_matrix(W, X.T @ X, bits, rescale=rescale, seeds=(seed, seed + 1))


def random_layer(**kwargs) -> tuple[QuantizedLinear, torch.nn.Linear]:
    """A quantized layer with a bias, and the dense layer of its dequantized weights in float64."""
    q = quantized(**kwargs)
    m, n = q.codes.shape
    bias = torch.randn(m, generator=torch.Generator().manual_seed(9))
    dense = torch.nn.Linear(n, m, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(q.dequantize())
        dense.bias.copy_(bias)
    return QuantizedLinear.from_matrix(q, bias), dense


def inputs(n, *shape, seed=5):
    return torch.randn(*shape, n, generator=torch.Generator().manual_seed(seed))


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


# packing


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 35) | st.integers(60, 140), st.sampled_from(BITS), st.integers(0, 99))
def test_pack_equals_the_naive_packer_and_unpack_inverts_it(m, n, bits, seed):
    codes = random_codes(m, n, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (m, packed_width(n, bits))
    assert torch.equal(packed, naive_pack(codes, bits))
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_and_the_smallest_codes_survive(bits):
    codes = torch.tensor([2**bits - 1, 0] * 9)[None].repeat(2, 1)
    assert torch.equal(unpack(pack(codes, bits), bits, 18).long(), codes)
    assert torch.equal(unpack(pack(codes.flip(1), bits), bits, 18).long(), codes.flip(1))


@pytest.mark.parametrize(
    ("bits", "codes", "octets"),
    [
        (2, [0, 1, 2, 3, 3], {0: 0b11100100, 1: 0b11}),
        (3, range(8), {0: 0b11100100, 1: 0b11100100, 16: 0b11110000}),
        (4, range(1, 9), {0: 0x21, 1: 0x43, 2: 0x65, 3: 0x87}),
    ],
)
def test_the_format_is_fixed(bits, codes, octets):
    packed = pack(torch.tensor([list(codes)]), bits)
    assert {i: octet for i, octet in enumerate(packed[0].tolist()) if octet} == octets and packed.shape == (1, 8 * bits)


@pytest.mark.parametrize("code", [-1, 4])
def test_codes_out_of_range_are_an_error(code):
    with pytest.raises(QuipError, match="2-bit codes lie in 0 … 3"):
        pack(torch.tensor([[0, code, 1]]), 2)


# the layer is the dense one


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40) | st.just(97),
    st.integers(1, 40) | st.just(97),
    st.sampled_from(BITS),
    st.booleans(),
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(0, 99),
)
def test_layer_equals_the_dense_layer(m, n, bits, rescale, shape, seed):
    layer, dense = random_layer(m=m, n=n, bits=bits, rescale=rescale, seed=seed)
    x = inputs(n, *shape)
    y, exact = layer(x), dense(x.double())
    assert y.dtype == torch.float32
    assert y.shape == exact.shape
    scale = dense.weight.norm() * x.norm() / m**0.5 + dense.bias.norm()
    assert (y.double() - exact).abs().max() < 2e-4 * scale
    exactly = layer(x.double())  # float64, for which there is no kernel
    assert (exactly - exact).abs().max() < 1e-6 * scale


def test_layer_without_bias():
    q, x = quantized(), inputs(40, 7)
    layer = QuantizedLinear.from_matrix(q)
    assert layer.bias is None
    assert relative_error(layer(x), x.double() @ q.dequantize().T) < 2e-4


@pytest.mark.parametrize("cast", [False, True], ids=["float32 layer", "cast layer"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_16_bit_error_is_a_small_multiple_of_the_dense_layers(dtype, bits, rescale, cast):
    layer, dense = random_layer(m=96, n=120, bits=bits, rescale=rescale)
    x = inputs(120, 64).to(dtype)
    exact = dense(x.double())
    y = (layer.to(dtype) if cast else layer)(x)
    assert y.dtype == dtype
    assert relative_error(y, exact) < 4 * relative_error(dense.to(dtype)(x), exact)


def test_float16_holds_the_sums_of_large_inputs():
    layer, dense = random_layer(m=8, n=512, bits=4)
    x = inputs(512, 4)
    x[:, 0] = 12000  # a massive activation: the output still fits
    exact = dense(x.double())
    assert exact.abs().max() < 65504
    assert relative_error(layer(x.half()), exact) < 0.01


def test_gradients_reach_the_input():
    layer, dense = random_layer(rescale=True)
    x = inputs(40, 3).requires_grad_()
    layer(x).sum().backward()
    exact = dense.weight.detach().sum(0).expand(3, -1)
    assert relative_error(x.grad, exact) < 1e-5


# copies, types, files


def test_deepcopy_runs_and_is_independent():
    layer, _ = random_layer()
    x = inputs(40, 3)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    twin.qweight.zero_()
    assert not torch.equal(twin(x), before)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [*HALF, torch.float64], ids=str)
def test_to_changes_no_integer(dtype):
    layer, _ = random_layer(rescale=True)
    before = {name: layer.state_dict()[name].clone() for name in ("qweight", "transforms")}
    after = layer.to(dtype).state_dict()
    assert all(torch.equal(after[name], x) and after[name].dtype == x.dtype for name, x in before.items())
    assert layer(inputs(40, 3).to(dtype)).dtype == dtype


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_loaded_state_gives_the_same_outputs(bits, rescale, bias):
    q, x = quantized(bits=bits, rescale=rescale), inputs(40, 3)
    layer = QuantizedLinear.from_matrix(q, torch.randn(24) if bias else None)
    loaded = QuantizedLinear(40, 24, bits, bias=bias, rescale=rescale)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.build()(x), layer(x))


def test_stored_are_codes_scale_and_seeds_and_no_matrix():
    def nbytes(**kwargs):
        return sum(x.nbytes for x in QuantizedLinear(1535, 576, 3, **kwargs).state_dict().values())

    assert nbytes() == 576 * 192 * 3 + 4 + 32
    assert nbytes(rescale=True) - nbytes() == 4 * 1535
    layer, _ = random_layer()
    assert set(layer.state_dict()) == {"qweight", "scale", "transforms", "bias"}  # built, and still no V and U


@pytest.mark.parametrize("change", [1, -1000, 2**32], ids=["another seed", "negative", "too large"])
@pytest.mark.parametrize("row", [0, 1], ids="VU")
def test_an_altered_seed_is_an_error_that_names_the_layer(row, change):
    layer, _ = random_layer()
    layer.transforms[row, 0] += change
    with pytest.raises(QuipError, match=r"model\.layers\.3\.mlp\.up_proj: the transform of seed"):
        layer.build("model.layers.3.mlp.up_proj")


def test_an_altered_fingerprint_is_an_error():
    layer, _ = random_layer()
    layer.transforms[0, 1] += 1000
    with pytest.raises(QuipError, match="is not the one this checkpoint was made with"):
        layer.build()


def test_running_before_build_is_an_error():
    with pytest.raises(QuipError, match=r"call build\(\)"):
        QuantizedLinear(8, 8, 2)(torch.ones(8))


@pytest.mark.parametrize("bits", [0, 1, 5, 8, "2", None])
def test_other_widths_are_an_error(bits):
    with pytest.raises(QuipError, match=f"bits must be 2, 3 or 4, got {bits!r}"):
        QuantizedLinear(8, 8, bits)


# in torch


def arguments(**kwargs):
    layer, _ = random_layer(**kwargs)
    return (inputs(40, 3), *layer.tensors())


@pytest.mark.parametrize("rescale", [False, True])
def test_the_operation_is_registered_soundly(rescale):
    x, *tensors = arguments(rescale=rescale)
    torch.library.opcheck(linear_op, (x, *tensors))
    torch.library.opcheck(linear_op, (x.clone().requires_grad_(), *tensors), test_utils="test_aot_dispatch_static")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_model_compiles_without_a_break(dtype):
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    quantize_model(model, torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0)), 2, progress=False)
    model = model.to(dtype)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(ids, use_cache=False).logits, expected.double()) < 0.02


@pytest.mark.parametrize("change", ["codes in place", "other codes", "another bias", "a moved buffer", "type"])
def test_a_prepared_call_is_made_anew_when_a_tensor_is_another(change):
    layer, _ = random_layer()
    x = inputs(40, 3)
    layer(x)
    before = layer(x)
    if change == "codes in place":
        layer.qweight.fill_(0b01010101)
    elif change == "other codes":
        layer.qweight = torch.full_like(layer.qweight, 0b01010101)
    elif change == "another bias":
        layer.bias = layer.bias + 1
    elif change == "a moved buffer":
        layer.qweight.data = torch.full_like(layer.qweight, 0b01010101)
    else:
        layer.to(torch.bfloat16)
        assert layer.bias.dtype == torch.bfloat16 and layer.scale.dtype == torch.float32
    y = layer(x)
    expected = linear_torch(x, *layer.tensors())
    assert relative_error(y, expected.double()) < 2e-4
    assert not torch.equal(y, before)


def test_a_layer_that_has_run_can_be_pickled():
    layer, _ = random_layer()
    x = inputs(40, 3)
    layer(x)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), layer(x))


def test_inputs_of_any_strides():
    layer, _ = random_layer()
    x = inputs(3, 40).T
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_inputs_of_another_width_are_an_error():
    layer, _ = random_layer()
    layer(inputs(40, 3))
    with pytest.raises(QuipError, match=r"x \(3, 41\) does not fit a layer of 40 inputs"):
        layer(inputs(41, 3))


def test_scale_and_rescale_stay_float32_in_a_half_precision_layer():
    layer, dense = random_layer(m=96, n=120, rescale=True)
    x = inputs(120, 5)
    before = {name: layer.state_dict()[name].clone() for name in ("scale", "rescale")}
    layer.half()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert relative_error(layer.float()(x), dense(x.double())) < 2e-3  # only the bias was rounded


def test_tensors_on_different_devices_are_an_error():
    layer, _ = random_layer()
    for _ in range(2):
        with pytest.raises(QuipError, match="x is on cpu, and the layer on meta"):
            copy.deepcopy(layer).to("meta")(inputs(40, 3))


@pytest.fixture
def prepared():
    """A layer that has run, its call ready, and an input."""
    layer, _ = random_layer()
    x = inputs(40, 3)
    layer(x)
    return layer, x


def test_a_tracer_sees_the_operation(prepared):
    layer, x = prepared
    traced = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    assert any("quip.linear" in str(node.target) for node in traced.graph.nodes)
    other = inputs(40, 3, seed=8)
    assert torch.equal(traced(other), layer(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_functional_transforms_see_through_the_layer(prepared):
    layer, x = prepared
    without = layer(x) - layer(torch.zeros_like(x))
    with torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, x)))
        assert relative_error(y.tangent, without.double()) < 1e-3
    assert relative_error(torch.func.jvp(layer, (x,), (x,))[1], without.double()) < 1e-3
    assert relative_error(torch.vmap(layer)(x), layer(x).double()) < 1e-3


def test_export_with_any_number_of_inputs(prepared):
    layer, x = prepared
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    more = inputs(40, 7)
    assert torch.equal(exported.module()(more), layer(more))


def test_a_bias_moved_behind_the_layers_back(prepared):
    layer, x = prepared
    layer.bias.data = layer.bias + 5
    assert relative_error(layer(x), linear_torch(x, *layer.tensors()).double()) < 2e-4
