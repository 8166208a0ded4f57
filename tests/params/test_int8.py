import pytest
import torch

from params import dequantize_weight, quantize_weight

EPS = 2.0**-23  # of fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 33), (1, 1), (64, 7)])
def test_error_is_at_most_half_a_step(dtype, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, scale = quantize_weight(w)
    assert (q.dtype, q.shape) == (torch.int8, w.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (shape[0], 1))
    assert q.min() >= -127
    assert torch.all(q.abs().amax(1) == 127)  # the whole range is used
    error = (q.double() * scale.double() - w.double()).abs()
    # half a step, and the rounding of w to fp32, of the scale and of the quotient (127 of them)
    assert torch.all(error <= scale.double() * (0.5 + 3 * 127 * EPS))


def test_exact_where_it_can_be():
    w = torch.tensor([[127.0, -127.0, 64.0, 0.5, 1.5, 2.5, -0.5], [0, 0, 0, 0, 0, 0, 0]])
    q, scale = quantize_weight(w)
    assert q.tolist() == [[127, -127, 64, 0, 2, 2, 0], [0] * 7]  # half to even
    assert scale.tolist() == [[1.0], [1.0]]
    # powers of two scale exactly, so a second pass changes nothing
    w = dequantize_weight(q, torch.tensor([[0.25], [1.0]]))
    again, scale = quantize_weight(w)
    assert torch.equal(again, q)
    assert torch.equal(dequantize_weight(again, scale), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_rounds_the_fp32_product_once(dtype):
    q = torch.arange(-127, 128, dtype=torch.int8).view(5, 51)
    scale = torch.rand(5, 1, generator=torch.Generator().manual_seed(0)) + 0.01
    out = dequantize_weight(q, scale, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, (q.double() * scale.double()).float().to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_row_never_comes_back_as_numbers(bad):
    w = torch.ones(3, 4)
    w[1, 2] = bad
    out = dequantize_weight(*quantize_weight(w))
    assert not torch.isfinite(out[1]).any()
    torch.testing.assert_close(out[[0, 2]], w[[0, 2]])


def test_the_smallest_numbers_do_not_become_nan():
    w = torch.tensor([[1e-44, -1e-45], [1e-38, 3e-39]])
    q, scale = quantize_weight(w)
    assert torch.all(scale > 0)
    assert (dequantize_weight(q, scale) - w).abs().max() <= 1e-40
    # 190 / 127 steps of the smallest subnormal make a scale of one: 190 must not wrap to -66
    assert quantize_weight(torch.tensor([[190 * 2.0**-149, -190 * 2.0**-149]]))[0].tolist() == [
        [127, -127]
    ]


def test_vmap_and_compile_give_the_same():
    w = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    one_by_one = [quantize_weight(x) for x in w]
    for got, want in zip(
        torch.vmap(quantize_weight)(w), zip(*one_by_one, strict=True), strict=True
    ):
        assert torch.equal(got, torch.stack(want))
    compiled = torch.compile(quantize_weight, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(w[0]), one_by_one[0]))


@pytest.mark.parametrize("w", [torch.ones(3), torch.ones(2, 2).int()])
def test_only_floating_point_matrices(w):
    with pytest.raises(ValueError, match="floating-point matrix"):
        quantize_weight(w)
