"""The GPU's kernels against Algorithm 1 written out in numpy, in float64: on the device where there is one,
else in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kernels import GPU, MEMORY, assert_close, maps, reference

from drs_lib import kernels
from drs_lib.drs import DRS, LearnableController, suppress, suppress_plain

pytest.importorskip("triton", reason="Triton comes with PyTorch for Linux")
cuda = pytest.importorskip("drs_lib.kernels.cuda")
REGISTERS = Path(__file__).resolve().parents[2] / "benchmarks" / "registers.py"
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
    x, g = (maps(shape, memory_format, seed).to(GPU, dtype) for seed in (0, 1))
    return x.to(memory_format=memory_format).requires_grad_(), g


def exactly(x, g, control, dtype):
    """`reference`, with tau rounded to the maps' type: who is suppressed is decided on rounded numbers."""
    features = x.detach().cpu().clamp(min=0).double().numpy()
    peak = features.max((2, 3))
    tau = torch.as_tensor(peak * control).to(dtype).double().numpy()
    share = np.divide(tau, peak, out=np.ones_like(tau), where=peak > 0)
    y, gx, g_control, _ = reference(x.detach().cpu(), g.cpu(), control=share)
    # What passes through the maximum is G times the gradient, and G is the control value itself.
    g_tau = np.divide(g_control, peak, out=np.zeros_like(tau), where=peak > 0)
    for i, c in np.argwhere(peak > 0):
        first = np.unravel_index(features[i, c].argmax(), features.shape[2:])
        gx[i, c][first] += g_tau[i, c] * (control[i, c] - share[i, c])
    return y, gx, g_control


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@MEMORY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_suppress_is_the_formula(shape, memory_format, dtype, tiles):
    x, g = tensors(shape, dtype, memory_format)
    generator = torch.Generator().manual_seed(2)
    # Of the maps' precision: Triton's interpreter cuts tau off where a GPU rounds it.
    control = (0.1 + 0.85 * torch.rand(shape[:2], generator=generator)).to(dtype).float().to(GPU)
    control.requires_grad_()
    y = cuda.suppress(x, control)
    y.backward(g)
    expected, gx, g_control = exactly(x, g, control.detach().cpu().double().numpy(), dtype)
    assert y.dtype == x.grad.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    assert_close(y, expected, TOLERANCE[dtype])
    assert_close(x.grad, gx, 2 * TOLERANCE[dtype])
    assert_close(control.grad, g_control, 2 * TOLERANCE[dtype])


@MEMORY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_learnable_controller_is_the_formula(shape, memory_format, tiles):
    torch.manual_seed(3)
    controller = LearnableController(shape[1]).to(GPU)
    torch.nn.init.normal_(controller.f.weight, std=0.5)
    x, g = tensors(shape, torch.float32, memory_format)
    y = cuda.suppress_learnable(x, controller.f.weight)
    y.backward(g)
    weight = controller.f.weight.detach().cpu()
    expected, gx, _, g_weight = reference(x.detach().cpu(), g.cpu(), weight=weight)
    assert_close(y, expected, 2e-6)
    assert_close(x.grad, gx, 4e-6)
    assert_close(controller.f.weight.grad, g_weight, 4e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@MEMORY
def test_a_bound_of_zero_keeps_its_gradient(memory_format, dtype, tiles):
    """The control value is 0, or its product with the maximum is too small for the type."""
    x, g = tensors((2, 3, 4, 5), dtype, memory_format)
    small = 1e-8 if dtype == torch.float16 else 0.0
    control = torch.tensor([[0.0, small, 0.4]], device=GPU).expand(2, 3).contiguous().requires_grad_()
    y = cuda.suppress(x, control)
    y.backward(g)
    values = torch.tensor([[0.0, 0.0, 0.4]]).double().expand(2, 3).numpy()
    _, _, g_control = exactly(x, g, values, dtype)
    assert (y[:, :2] == 0).all() and control.grad[:, :2].any()
    assert_close(control.grad, g_control, 2 * TOLERANCE[dtype])
    # A controller's value that is 0.
    weight = torch.diag(torch.tensor([-1e4, 0.1, 0.2])).to(GPU).requires_grad_()
    y = cuda.suppress_learnable(x, weight)
    expected = suppress_plain(x, torch.sigmoid(x.relu().mean((2, 3), dtype=torch.float32) @ weight.T))
    found, expected = ((y, *torch.autograd.grad(y, (x, weight), g)) for y in (y, expected))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b.detach().cpu().double().numpy(), 4 * TOLERANCE[dtype])


@MEMORY
def test_nan_spreads_over_its_own_map_only(memory_format, tiles):
    x, _ = tensors((1, 3, 5, 9), torch.float32, memory_format)
    with torch.no_grad():
        x[0, 1, 2, 4] = float("nan")
        y = cuda.suppress(x, torch.full((1, 3), 0.5, device=GPU))
    assert not y[0, [0, 2]].isnan().any()
    assert y[0, 1][x[0, 1] > 0].isnan().all() and (y[0, 1][x[0, 1] <= 0] == 0).all()


def test_what_is_not_dense_is_laid_out_first(tiles):
    x, g = tensors((2, 3, 6, 8), torch.float32, torch.contiguous_format)
    cut = x.detach()[:, :, ::2, 1:7].requires_grad_()
    control = torch.full((2, 3), 0.5, device=GPU)
    y = cuda.suppress(cut, control)
    y.backward(g[:, :, ::2, 1:7].expand_as(y))
    expected, gx, _, _ = reference(cut.detach().cpu(), g[:, :, ::2, 1:7].cpu(), control=0.5)
    assert_close(y, expected, 2e-6)
    assert_close(cut.grad, gx, 4e-6)


def test_the_same_input_gives_the_same_bits(tiles):
    results = []
    for _ in range(2):
        x, g = tensors((2, 5, 8, 9), torch.float32, torch.channels_last)
        y = cuda.suppress(x, torch.full((2, 5), 0.4, device=GPU))
        results.append((y, *torch.autograd.grad(y, x, g)))
    assert all(map(torch.equal, *results))


def test_only_the_result_and_numbers_per_channel_are_saved():
    x, _ = tensors((2, 4, 8, 8), torch.float32, torch.contiguous_format)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = cuda.suppress(x, torch.full((2, 4), 0.5, device=GPU))
    large = [t for t in saved if t.numel() > 8]
    assert len(large) == 1 and large[0].data_ptr() == y.data_ptr()


def test_no_program_spills_registers_or_needs_more_than_there_are():
    """Compiled ahead of time for Turing, Ampere, Hopper; the first row shows that a spill would be seen."""
    code = f"""if True:
        import importlib.util, json
        spec = importlib.util.spec_from_file_location("registers", {str(REGISTERS)!r})
        registers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(registers)
        launch = registers.launches((5, 128, 96, 96), torch.float32, torch.contiguous_format)["constant"][0]
        *kinds, warps = registers.specialised(*launch)
        rows = [registers.usage(*kinds, 4, 90)]
        rows += registers.register_table([75], 5, ["float32", "float16"])  # which has no bfloat16
        rows += registers.register_table([80, 90], 5, ["float32", "bfloat16"])
        print(json.dumps(rows))
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import torch\n" + code
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    spilling, *rows = json.loads(found.stdout)
    assert spilling["spilled"] > 0
    assert len({row["kernel"] for row in rows}) == 5 and {row["sm"] for row in rows} == {75, 80, 90}
    assert [row for row in rows if row["spilled"] > 0] == []
    # A multiprocessor has 65,536 registers; a block that needs more can't start.
    assert [row for row in rows if row["registers"] * row["warps"] * 32 > 65_536] == []


def test_no_map_has_more_parts_than_a_grid_can_have():
    for positions in (100 * 100, 4000 * 4000):
        x = torch.empty(1, 64, positions, 1, device="meta").to(memory_format=torch.channels_last)
        cut = cuda._Cut(x)
        assert cut.last and max(cut.grid[1:]) < 2**16 and cut.parts * cut.rows >= positions


@pytest.mark.parametrize("trouble", [RuntimeError("no such target"), ImportError("no triton")])
def test_a_gpu_on_which_it_does_not_work_gets_the_plain_form(trouble, monkeypatch, caplog):
    def fails(form, device, dtype):
        if dtype == torch.bfloat16:
            raise trouble

    monkeypatch.setattr(kernels, "_checked", {})
    monkeypatch.setattr(kernels, "check", fails)
    gpu = torch.device("cuda", 1)
    assert kernels._form_for(gpu, torch.float32) is cuda and not caplog.text
    assert kernels._form_for(gpu, torch.bfloat16) is None
    assert "uncompiled on cuda:1 in torch.bfloat16" in caplog.text and str(trouble) in caplog.text


@pytest.mark.skipif(GPU == "cpu", reason="no CUDA device")
def test_drs_takes_this_form_on_the_device():
    x = torch.randn(2, 8, 16, 16, device="cuda", requires_grad=True)
    for y in (suppress(x, 0.5), DRS(8).cuda()(x)):
        y.sum().backward()
        assert y.grad_fn.loops is cuda
