import pytest
import torch

from params import estimate_size, quantize_weight


def model(dtype=torch.float32, device="cpu"):
    return {
        "mlp": {"weight": torch.ones(1000, 500, dtype=dtype, device=device)},
        "norm": torch.ones(1000, dtype=dtype, device=device),
    }


N = 501_000
INT8 = (500_000 + 4 * 1000 + 2 * 1000) / 1e6  # matrix, its scales, the norm in fp16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_float_models(device):
    size = estimate_size(model(device=device))
    assert dict(size) == pytest.approx(
        {
            "parameters": N,
            "mb_now": 2.004,
            "mb_fp32": 2.004,
            "mb_fp16": 1.002,
            "mb_int8": INT8,
            "compression_ratio": 0.5,
        }
    )
    half = estimate_size(model(torch.bfloat16, device))
    assert half.mb_now == half.mb_fp16 == size.mb_fp16
    assert half.compression_ratio == 1


def test_a_quantised_model_is_as_big_as_was_foretold():
    params = model(torch.bfloat16)
    q, scale = quantize_weight(params["mlp"]["weight"])
    size = estimate_size({"mlp": {"weight_int8": q, "weight_scale": scale}, "norm": params["norm"]})
    before = estimate_size(params)
    assert size.mb_now == size.mb_int8 == before.mb_int8 == INT8
    assert (size.parameters, size.mb_fp16, size.mb_fp32) == (N, before.mb_fp16, before.mb_fp32)
    assert size.compression_ratio == pytest.approx(1.002 / INT8)


def test_what_counts():
    w = torch.ones(10, 10)
    assert estimate_size({"a": w, "b": {"tied": w}}).parameters == 100
    assert estimate_size({"logit_scale": torch.ones(3)}).parameters == 3  # nobody's scale
    size = estimate_size({"a": w, "ids": torch.zeros(50, dtype=torch.int64)})
    assert size.parameters == 100
    assert (size.mb_now, size.mb_fp16) == (800e-6, 600e-6)  # 400 bytes of integers in every format
    assert estimate_size({"conv": torch.ones(8, 3, 2, 2)}).mb_int8 == (96 + 32) / 1e6
    assert estimate_size({}).parameters == 0


def test_it_reads_like_a_dict_and_prints():
    size = estimate_size(model())
    assert size["mb_now"] == size.mb_now
    with pytest.raises(KeyError):
        size["keys"]
    assert str(size).startswith("501,000 parameters, 2.0 MB (2.00x larger than fp16)")
