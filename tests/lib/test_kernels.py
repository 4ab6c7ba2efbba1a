"""The compiled suppressor against Algorithm 1 and its gradients written out in numpy, in float64."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, current_thread, main_thread

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed

from drs_lib import kernels, runtime
from drs_lib.drs import DRS, suppress, suppress_plain

pytest.importorskip("numba")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's interpreter takes its place
MEMORY = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
# No multiple of 1/64 below 6 times this delta comes closer to a multiple of 1/64 than float32 can tell.
CONTROLLERS = pytest.mark.parametrize("delta", [0.5371, None], ids=["constant", "learnable"])
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (1, 1, 5, 7),
    (3, 1, 8, 8),
    (2, 5, 7, 3),
    (1, 16, 9, 4),
    (3, 19, 1, 70),
    (2, 33, 13, 11),
    (2, 40, 6, 32),
    (4, 8, 64, 64),
]


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr("drs_lib.kernels.cpu.SMALLEST_PART", 64)
    with runtime.threads(request.param):
        yield request.param


def maps(shape, memory_format, seed=0):
    """Multiples of 1/64, so that equal maxima occur; about half of them negative, one plane entirely."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).mul(64).round().div(64)
    if shape[0] > 1:
        x[0, 0] = -x[0, 0].abs()
    return x.contiguous(memory_format=memory_format)


def reference(x, g, control=None, weight=None):
    """y and the gradients to x, to the control values and to the controller's weight, in float64."""
    x, g = x.double().numpy(), g.double().numpy()
    n, k, h, w = x.shape
    features = np.where(x > 0, x, 0)
    average = features.mean(axis=(2, 3))
    if weight is not None:
        weight = weight.double().numpy()
        control = 1 / (1 + np.exp(-np.einsum("kj,nj->nk", weight, average)))
    control = np.broadcast_to(control, (n, k)).astype(np.float64)
    peak = features.max(axis=(2, 3))
    tau = (peak * control)[:, :, None, None]
    suppressed = (features > 0) & (features >= tau)
    y = np.where(suppressed, tau, features)

    g_tau = np.where(suppressed, g, 0).sum(axis=(2, 3))
    gx = np.where((features > 0) & ~suppressed, g, 0)
    for i, c in np.ndindex(n, k):
        if peak[i, c] > 0:
            first = np.unravel_index(features[i, c].argmax(), (h, w))
            gx[i, c][first] += g_tau[i, c] * control[i, c]
    g_control, g_weight = g_tau * peak, None
    if weight is not None:
        g_logit = g_control * control * (1 - control)
        g_weight = np.einsum("nk,nj->kj", g_logit, average)
        gx += np.where(features > 0, np.einsum("nk,kj->nj", g_logit, weight)[:, :, None, None] / (h * w), 0)
    return y, gx, g_control, g_weight


def assert_close(found, expected, tolerance=2e-6):
    scale = np.abs(expected).max(initial=1e-30)
    found = found.detach().cpu().double().numpy()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


def ran_compiled(y, name="SuppressBackward"):
    assert type(y.grad_fn).__name__ == name, "the compiled form did not run"


@MEMORY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@CONTROLLERS
def test_the_module_is_the_formula(delta, shape, memory_format, threads):
    torch.manual_seed(3)
    drs, weight = DRS(shape[1], delta), None
    if delta is None:
        weight = torch.nn.init.normal_(drs.controller.f.weight, std=0.5).detach()
    x = maps(shape, memory_format).requires_grad_()
    g = maps(shape, memory_format, seed=1)
    y = drs(x)
    y.backward(g)
    expected, gx, _, g_weight = reference(x.detach(), g, control=delta, weight=weight)
    assert y.is_contiguous(memory_format=memory_format)
    ran_compiled(y, "SuppressBackward" if delta else "SuppressLearnableBackward")
    assert_close(y, expected)
    assert_close(x.grad, gx)
    if delta is None:
        assert_close(drs.controller.f.weight.grad, g_weight)


@MEMORY
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("size", [(5,), (3, 5), (3, 5, 1, 1)], ids=str)
def test_tensor_control_is_the_formula(size, needs, memory_format):
    x, g = (maps((3, 5, 9, 6), memory_format, seed) for seed in (0, 1))
    control = torch.rand(size, generator=torch.Generator().manual_seed(2))
    x.requires_grad_(needs[0])
    control.requires_grad_(needs[1])
    y = suppress(x, control)
    y.backward(g)
    values = control.detach().double().numpy().reshape(-1, 5)
    expected, gx, g_control, _ = reference(x.detach(), g, control=values)
    assert_close(y, expected)
    if needs[0]:
        assert_close(x.grad, gx)
    if needs[1]:
        assert_close(control.grad.reshape(-1, 5), g_control if len(size) > 1 else g_control.sum(0)[None])


@MEMORY
@pytest.mark.parametrize("zero", [0.0, 1e-45])
def test_a_bound_of_zero_keeps_its_gradient(zero, memory_format):
    """The control value is 0, or its product with a maximum below 1 is too small for float32."""
    x, g = (maps((2, 3, 4, 5), memory_format, seed) for seed in (0, 1))
    x[:, 0] *= 0.1
    control = torch.tensor([zero, 0.4, 1.0], requires_grad=True)
    y = suppress(x, control)
    ran_compiled(y)
    assert (y[:, 0] == 0).all()
    y.backward(g)
    expected, _, g_control, _ = reference(x, g, control=torch.tensor([0, 0.4, 1.0]).double().numpy())
    assert_close(y, expected)
    assert_close(control.grad[None], g_control.sum(0, keepdims=True))


@MEMORY
def test_a_controller_that_shuts_a_map_passes_its_gradient_on(memory_format):
    drs = DRS(3)
    drs.controller.f.weight.data = torch.diag(torch.tensor([-1e4, 0.1, 0.2]))
    x, g = (maps((2, 3, 4, 5), memory_format, seed) for seed in (0, 1))
    x.requires_grad_()
    y = drs(x)
    ran_compiled(y, "SuppressLearnableBackward")
    with kernels.disabled():
        expected = torch.autograd.grad(drs(x), (x, drs.controller.f.weight), g)
    torch.testing.assert_close(torch.autograd.grad(y, (x, drs.controller.f.weight), g), expected)
    assert (y[1, 0] == 0).all()


NOT_DENSE = {
    "sliced": lambda whole: whole[:, 2:8, 3:11, 1:9],
    "strided": lambda whole: whole[:, ::2, ::2, ::2],
    "transposed": lambda whole: whole[:, :6].transpose(2, 3),
}


@pytest.mark.parametrize("how", NOT_DENSE)
@pytest.mark.parametrize("gradient", ["expanded", "transposed"])
@CONTROLLERS
def test_memory_that_is_not_dense(delta, gradient, how):
    torch.manual_seed(0)
    drs = DRS(6, delta)
    leaf = NOT_DENSE[how](maps((2, 12, 14, 10), torch.contiguous_format)).detach().requires_grad_()
    y = drs(leaf)
    g = torch.ones(()).expand(y.shape)
    if gradient == "transposed":
        g = maps(y.mT.shape, torch.contiguous_format, seed=1).mT
    y.backward(g)
    weight = None if delta else drs.controller.f.weight.detach()
    expected, gx, _, _ = reference(leaf.detach(), g, control=delta, weight=weight)
    assert_close(y, expected)
    assert_close(leaf.grad, gx)


@MEMORY
def test_the_average_of_a_large_map_is_accurate(memory_format):
    """A running float32 sum over 512 * 513 elements would be off by more than this."""
    x = torch.rand((1, 2, 512, 513), generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=memory_format)
    *_, total = kernels.for_input(x).extracted(x)
    assert_close(total / (512 * 513), x.double().mean(dim=(2, 3)).numpy(), tolerance=1e-7)


@MEMORY
@pytest.mark.parametrize("place", [0, 37, -1])
def test_nan_stays_visible(memory_format, place):
    x = torch.rand(2, 3, 7, 9).add(0.1).contiguous(memory_format=memory_format)
    x[1, 2].view(-1)[place] = float("nan")
    y = suppress(x, 0.5)
    assert y[1, 2].isnan().all() and not y[0].isnan().any() and not y[1, :2].isnan().any()
    assert suppress_plain(x, 0.5).isnan().equal(y.isnan())
    learned = DRS(3)(x)
    assert learned[1].isnan().all() and not learned[0].isnan().any()


@MEMORY
def test_infinite_maximum(memory_format):
    x = torch.rand(1, 2, 4, 4).contiguous(memory_format=memory_format)
    x[0, 1, 2, 2] = float("inf")
    assert suppress(x, 0.5).equal(suppress_plain(x, 0.5))


def test_what_needs_no_gradient_gets_none():
    drs = DRS(4)
    drs.requires_grad_(False)
    x = maps((2, 4, 5, 5), torch.channels_last)
    assert not drs(x).requires_grad
    y = drs(x.requires_grad_())
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    y.sum().backward()
    assert x.grad.equal(2 * first) and drs.controller.f.weight.grad is None
    with torch.inference_mode():
        assert drs(x).equal(y)
    with torch.no_grad():
        assert drs(x).equal(y) and not drs(x).requires_grad


def test_other_inputs_go_to_the_plain_form():
    x = torch.rand(2, 3, 4, 5)
    assert kernels.for_input(x) is not None
    others = [x.double(), x.half(), x.to("meta"), x[:, :, ::2], x[:0], x.to_sparse()]
    assert [kernels.for_input(other) for other in others] == [None] * len(others)
    with kernels.disabled():
        assert kernels.for_input(x) is None
        with ThreadPoolExecutor(1) as other_thread:
            assert other_thread.submit(kernels.for_input, x).result() is not None
    assert kernels.for_input(x) is not None


def test_forms_lists_what_for_input_picks(monkeypatch):
    forms = kernels.forms()
    assert [form.name for form in forms] == ["numba", "triton"][: 1 + torch.cuda.is_available()]
    for form in forms:
        assert kernels.for_input(torch.ones(1, 1, 1, 1, device=form.device)) is form.module
    monkeypatch.setitem(kernels._checked, (torch.device("cpu"), torch.float32), None)
    assert "numba" not in [form.name for form in kernels.forms()] and not kernels.available()


def python(code, **environment):
    environment = os.environ | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def _work(x, weight):
    drs = DRS(x.shape[1])
    drs.controller.f.weight.data = weight
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = drs(x)
    y.square().sum().backward()
    return y.detach(), x.grad, drs.controller.f.weight.grad


@pytest.fixture
def job():
    torch.manual_seed(0)
    return torch.randn(4, 16, 48, 48).contiguous(memory_format=torch.channels_last), 0.1 * torch.randn(16, 16)


def test_threads_share_the_work_where_it_pays(threads):
    from drs_lib.kernels import cpu

    together = Barrier(threads, timeout=30)  # a thread that did both parts would wait here in vain
    parts = []

    def loop(rows):
        together.wait()
        parts.append((current_thread(), len(rows)))

    cpu._run(loop, np.zeros((7, 64)))
    assert sum(rows for _, rows in parts) == 7 and len({thread for thread, _ in parts}) == threads
    assert (main_thread() in dict(parts)) == (threads == 1)
    parts.clear()
    together = Barrier(1)
    cpu._run(loop, np.zeros((7, 9)))  # fewer than 64 elements: too few to split
    assert parts == [(main_thread(), 7)]


def test_what_a_loop_raises_in_a_thread_is_raised(threads):
    from drs_lib.kernels import cpu

    def interrupted(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cpu._run(interrupted, np.zeros((8, 64)))


def test_python_threads_may_call_at_once(job, threads):
    expected = _work(*job)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: _work(*job), range(40)):
            assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_its_own_threads(monkeypatch):
    monkeypatch.setattr("drs_lib.kernels.cpu.SMALLEST_PART", 64)
    with runtime.threads(2):
        x = torch.randn(4, 16, 12, 12)
        expected = suppress(x, 0.5)
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(30)  # a child that waits for the parent's threads waits for ever
            try:
                code = 0 if suppress(x, 0.5).equal(expected) else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_joblib_workers(job):
    expected = _work(*job)
    (found,) = Parallel(n_jobs=2, backend="loky", timeout=120)([delayed(_work)(*job)])
    torch.testing.assert_close(found, expected)


def test_importing_costs_nothing_and_the_environment_can_switch_it_off():
    code = (
        "import sys, torch; from drs_lib import drs, kernels; drs.DRS(2)(torch.rand(1, 2, 3, 3)); "
        "print('numba' in sys.modules, kernels.for_input(torch.rand(1, 2, 3, 3)))"
    )
    assert python(code, DRS_LIB_KERNELS="0").stdout.split() == ["False", "None"]


def test_nowhere_to_write_the_compiled_code():
    from drs_lib.kernels import cpu

    namespace = {}
    exec(compile("def increment(x):\n    return x + 1", "<no file>", "exec"), namespace)
    assert cpu._compiled(namespace["increment"])(1) == 2


def test_without_numba_the_plain_form_runs_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_checked", {})
    monkeypatch.setitem(sys.modules, "drs_lib.kernels.cpu", None)
    monkeypatch.delattr(kernels, "cpu", raising=False)
    x = torch.rand(1, 2, 3, 3)
    assert not kernels.available() and kernels.for_input(x) is None
    assert suppress(x, 0.5).equal(suppress_plain(x, 0.5))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install numba" in caplog.text


def test_what_numba_stored_is_damaged(tmp_path):
    """A file of its cache that was cut off made every call raise; now the plain form runs, with a warning."""
    code = """if True:
        from pathlib import Path
        import torch
        from drs_lib.drs import DRS
        from drs_lib.kernels import cpu
        index = Path(cpu.suppress_planes._cache._cache_file._index_path)
        index.parent.mkdir(parents=True, exist_ok=True)
        index.write_bytes(b"")
        print(DRS(2)(torch.ones(1, 2, 3, 3)).shape)
        import drs_doctor as doctor
        [found] = [found for found in doctor.examine() if found.what == "compiled DRS"]
        print(found.status, found.remedy)
    """
    found = python(code, NUMBA_CACHE_DIR=str(tmp_path))
    shape, finding = found.stdout.splitlines()
    assert shape == "torch.Size([1, 2, 3, 3])"
    assert finding.startswith("optional pip install numba; if it is there, delete what it stored")
    assert "EOFError" in found.stderr and "delete what it stored" in found.stderr


WRONG = {
    "gradients": lambda right: lambda g, *rest: right(1.1 * g, *rest),
    "extracted": lambda right: lambda x: right(1.1 * x),
    "clamped": lambda right: lambda x, peak, control: right(x, peak, 1.1 * control),
    "suppressed": lambda right: lambda x, control: right(x, 1.1 * control),
    "average_gradient": lambda right: lambda y, share, gx: right(y, 1.1 * share, gx),
}
TYPES = {torch.float32: "cpu cuda", torch.float16: "cuda", torch.bfloat16: "cuda"}


@pytest.mark.parametrize("form, dtype", [(form, dtype) for dtype in TYPES for form in TYPES[dtype].split()])
@pytest.mark.parametrize("part", WRONG)
def test_the_check_before_use_compares_every_part(part, form, dtype, monkeypatch):
    """Also on the larger maps alone, which a GPU cuts into parts."""
    device = torch.device("cpu" if form == "cpu" else GPU)
    form = pytest.importorskip(f"drs_lib.kernels.{form}")
    kernels.check(form, device, dtype)
    right = getattr(form, part)
    wrong = WRONG[part](right)
    monkeypatch.setattr(form, part, lambda x, *rest: (right if x.shape[2] < 100 else wrong)(x, *rest))
    with pytest.raises(RuntimeError, match="gives other results than the plain one"):
        kernels.check(form, device, dtype)


def test_a_failure_that_passes_is_not_remembered(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_checked", {})
    check, errors = kernels.check, [torch.OutOfMemoryError("full"), MemoryError("full")]

    def full(*args):
        if errors:
            raise errors.pop()
        check(*args)

    monkeypatch.setattr(kernels, "check", full)
    x = torch.rand(1, 2, 3, 3)
    assert [kernels.for_input(x) is None for _ in range(3)] == [True, True, False]
    assert caplog.text.count("the next call tries again") == 2
