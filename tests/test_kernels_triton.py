"""The GPU's kernels against Algorithm 1 written out in numpy, in float64: on the device where there is one,
else in Triton's interpreter."""

import numpy as np
import pytest
import torch
from test_kernels import maps, reference

from drs_lib import kernels
from drs_lib.drs import DRS, LearnableController, suppress

pytest.importorskip("triton", reason="Triton comes with PyTorch for Linux")
cuda = pytest.importorskip("drs_lib.kernels.cuda")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 3), (2, 17, 1, 70), (1, 33, 13, 11)]
# What a result may be off by, relative to the largest: rounding to the type, once for y and once for gx.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(params=["one_tile", "parts"])
def tiles(request, monkeypatch):
    """Whole maps in a tile; or tiny tiles, so that every map is cut into parts."""
    if request.param == "parts":
        monkeypatch.setattr(cuda, "TILE", 32)
        monkeypatch.setattr(cuda, "PART", 32)
    return request.param


def tensors(shape, dtype, memory_format):
    x, g = (maps(shape, memory_format, seed).to(DEVICE, dtype) for seed in (0, 1))
    return x.to(memory_format=memory_format).requires_grad_(), g


def rounded(values, dtype):
    return torch.as_tensor(values).to(dtype).double().numpy()


def assert_close(found, expected, tolerance):
    scale = np.abs(expected).max(initial=1e-30)
    found = found.detach().cpu().double().numpy()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


def exactly(x, g, control, dtype):
    """`reference`, with tau rounded to the maps' type: who is suppressed is decided on rounded numbers."""
    features = x.detach().cpu().clamp(min=0).double().numpy()
    peak = features.max((2, 3))
    tau = rounded(peak * control, dtype)
    share = np.divide(tau, peak, out=np.ones_like(tau), where=peak > 0)
    y, gx, g_control, _ = reference(x.detach().cpu(), g.cpu(), control=share)
    # What passes through the maximum is G times the gradient, and G is the control value itself.
    g_tau = np.divide(g_control, peak, out=np.zeros_like(tau), where=peak > 0)
    for i, c in np.argwhere(peak > 0):
        first = np.unravel_index(features[i, c].argmax(), features.shape[2:])
        gx[i, c][first] += g_tau[i, c] * (control[i, c] - share[i, c])
    return y, gx, g_control


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_suppress_is_the_formula(shape, memory_format, dtype, tiles):
    x, g = tensors(shape, dtype, memory_format)
    generator = torch.Generator().manual_seed(2)
    control = (0.1 + 0.85 * torch.rand(shape[:2], generator=generator)).to(DEVICE, dtype).requires_grad_()
    y = cuda.suppress(x, control)
    y.backward(g)
    expected, gx, g_control = exactly(x, g, control.detach().cpu().double().numpy(), dtype)
    assert y.dtype == x.grad.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    assert_close(y, expected, TOLERANCE[dtype])
    assert_close(x.grad, gx, 2 * TOLERANCE[dtype])
    assert_close(control.grad, g_control, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_learnable_controller_is_the_formula(shape, memory_format, tiles):
    torch.manual_seed(3)
    controller = LearnableController(shape[1]).to(DEVICE)
    torch.nn.init.normal_(controller.f.weight, std=0.5)
    x, g = tensors(shape, torch.float32, memory_format)
    y = cuda.suppress_by(x, controller)
    y.backward(g)
    weight = controller.f.weight.detach().cpu()
    expected, gx, _, g_weight = reference(x.detach().cpu(), g.cpu(), weight=weight)
    assert_close(y, expected, 2e-6)
    assert_close(x.grad, gx, 4e-6)
    assert_close(controller.f.weight.grad, g_weight, 4e-6)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_nan_spreads_over_its_own_map_only(memory_format, tiles):
    x, _ = tensors((1, 3, 5, 9), torch.float32, memory_format)
    with torch.no_grad():
        x[0, 1, 2, 4] = float("nan")
        y = cuda.suppress(x, torch.full((1, 3), 0.5, device=DEVICE))
    assert not y[0, [0, 2]].isnan().any()
    assert y[0, 1][x[0, 1] > 0].isnan().all() and (y[0, 1][x[0, 1] <= 0] == 0).all()


def test_what_is_not_dense_is_laid_out_first(tiles):
    x, g = tensors((2, 3, 6, 8), torch.float32, torch.contiguous_format)
    cut = x.detach()[:, :, ::2, 1:7].requires_grad_()
    control = torch.full((2, 3), 0.5, device=DEVICE)
    y = cuda.suppress(cut, control)
    y.backward(g[:, :, ::2, 1:7].expand_as(y))
    expected, gx, _, _ = reference(cut.detach().cpu(), g[:, :, ::2, 1:7].cpu(), control=0.5)
    assert_close(y, expected, 2e-6)
    assert_close(cut.grad, gx, 4e-6)


def test_the_same_input_gives_the_same_bits(tiles):
    results = []
    for _ in range(2):
        x, g = tensors((2, 5, 8, 9), torch.float32, torch.channels_last)
        y = cuda.suppress(x, torch.full((2, 5), 0.4, device=DEVICE))
        y.backward(g)
        results.append((y.detach().clone(), x.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_the_result_and_numbers_per_channel_are_saved():
    x, _ = tensors((2, 4, 8, 8), torch.float32, torch.contiguous_format)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = cuda.suppress(x, torch.full((2, 4), 0.5, device=DEVICE))
    large = [t for t in saved if t.numel() > 8]
    assert len(large) == 1 and large[0].data_ptr() == y.data_ptr()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_check_before_use_can_say_no(dtype, monkeypatch):
    cuda.check(DEVICE, dtype)
    whole = cuda.gradients
    monkeypatch.setattr(cuda, "gradients", lambda *args: (whole(*args)[0] * 1.1, whole(*args)[1]))
    with pytest.raises(RuntimeError, match="not those of the plain one"):
        cuda.check(DEVICE, dtype)


def test_the_check_is_none_of_the_caller_s_mode():
    with torch.inference_mode():
        cuda.check(DEVICE)


def test_no_map_has_more_parts_than_a_grid_can_have():
    for positions in (100 * 100, 4000 * 4000):
        x = torch.empty(1, 64, positions, 1, device="meta").to(memory_format=torch.channels_last)
        cut = cuda._Cut(x)
        assert cut.last and max(cut.grid[1:]) < 2**16 and cut.parts * cut.rows >= positions


@pytest.mark.parametrize("trouble", [RuntimeError("no such target"), ImportError("no triton")])
def test_a_gpu_on_which_it_does_not_work_gets_the_plain_form(trouble, monkeypatch, caplog):
    def fails(device, dtype):
        if dtype == torch.bfloat16:
            raise trouble

    monkeypatch.setattr(cuda, "check", fails)
    gpu = torch.device("cuda", 1)
    assert kernels._gpu_module.__wrapped__(gpu, torch.float32) is cuda and not caplog.text
    assert kernels._gpu_module.__wrapped__(gpu, torch.bfloat16) is None
    assert "uncompiled on cuda:1 in torch.bfloat16" in caplog.text and str(trouble) in caplog.text


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_drs_takes_this_form_on_the_device():
    x = torch.randn(2, 8, 16, 16, device="cuda", requires_grad=True)
    for y in (suppress(x, 0.5), DRS(8).cuda()(x)):
        y.sum().backward()
        assert y.grad_fn.loops is cuda
