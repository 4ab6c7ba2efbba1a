"""DRS inside other people's code: wrappers, hooks, threads, tracers, compilers, defaults."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnx
import pytest
import torch
import torch.distributed as dist
import torchvision
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.func import functional_call, grad, vmap
from torchvision.models.feature_extraction import create_feature_extractor

from drs_lib import kernels
from drs_lib.drs import DRS, LearnableController, suppress
from drs_lib.networks import classifier, deeplab, refinement_network
from drs_lib.plug import plug_drs

DELTAS = pytest.mark.parametrize("delta", [None, 0.5], ids=["learnable", "constant"])


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))


def gradients(module, x, call=None):
    """Of x and of the module's parameters."""
    x = x.clone().requires_grad_()
    y = module(x) if call is None else call(x)
    return torch.autograd.grad(y.square().sum(), [x, *module.parameters()])


def strong(module):
    """Controllers whose values are far from 0.5, so that a wrong one shows."""
    torch.manual_seed(1)
    for m in module.modules():
        if isinstance(m, LearnableController):
            nn.init.normal_(m.f.weight, std=1.0)
    return module


assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def test_controllers_train_where_a_wrapper_replaces_parameters(x, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = strong(nn.Sequential(nn.Conv2d(3, 4, 3), DRS(4)))
    with kernels.disabled():
        expected = torch.cat([g.flatten() for g in gradients(model, x)[1:]])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = FSDP(copy.deepcopy(model), device_id=torch.device("cpu"))
        wrapped(x).square().sum().backward()
        (flat,) = wrapped.parameters()
        assert_close(flat.grad, expected)
    finally:
        dist.destroy_process_group()


def parametrized(controller):
    nn.utils.parametrizations.weight_norm(controller.f)


def shifted(controller):
    controller.f.bias = nn.Parameter(torch.ones(controller.f.out_features))


def halved(controller):
    controller.f.register_forward_hook(lambda module, args, output: output / 2)


def halved_from_outside(controller):
    forward = controller.forward
    controller.forward = lambda features: forward(features) / 2


def adapted(controller):
    inner = controller.f
    controller.f = nn.Sequential(inner, nn.Tanh())
    controller.f.weight = inner.weight


@pytest.mark.parametrize("change", [parametrized, shifted, halved, halved_from_outside, adapted])
def test_what_becomes_of_a_controller_is_computed_and_trained(change, x):
    drs = strong(DRS(3))
    change(drs.controller)
    y, found = drs(x), gradients(drs, x)
    with kernels.disabled():
        assert_close((y, *found), (drs(x), *gradients(drs, x)))
    assert all(gradient.any() for gradient in found)


@pytest.mark.parametrize("loss", [lambda y, g: y.sum() + g.mean(), lambda y, g: g.mean()], ids=["both", "g"])
def test_a_loss_on_what_the_controller_returns(loss, x):
    drs, seen = strong(DRS(3)), []
    drs.controller.register_forward_hook(lambda *call: seen.append(call[-1]))
    found = gradients(drs, x, lambda x: loss(drs(x), seen.pop()))
    with kernels.disabled():
        assert_close(found, gradients(drs, x, lambda x: loss(drs(x), seen.pop())))
    assert all(gradient.any() for gradient in found)


def test_hooks_on_all_modules_see_the_controller(x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        drs = DRS(3)
        drs(x)
    finally:
        handle.remove()
    assert drs.controller in seen and drs.controller.f in seen


def test_threads_share_a_plugged_network():
    torch.manual_seed(0)
    model = plug_drs(small_resnet()).eval()
    images = torch.randn(24, 1, 3, 32, 32)
    expected = [model(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(model, images), expected))


@pytest.mark.parametrize("default", ["meta", "bfloat16"])
@DELTAS
def test_defaults_of_device_and_type_are_the_caller_s(default, delta, x):
    drs = strong(DRS(3, delta))
    expected = gradients(drs, x)
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.bfloat16)
        kernels._checked.clear()
        found = gradients(drs, x)
        y = suppress(x, 0.5)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert type(y.grad_fn) is type(None) and y.device.type == "cpu" and y.dtype == torch.float32
    assert_close(found, expected)
    assert kernels.available()


def test_control_values_have_more_than_eight_bits(x):
    controller = strong(DRS(3)).controller
    found = controller(x.relu().bfloat16())
    torch.testing.assert_close(found, torch.sigmoid(controller.f(x.bfloat16().float().relu().mean((2, 3)))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = controller(x.relu())
    torch.testing.assert_close(found, torch.sigmoid(controller.f(x.relu().mean((2, 3)))))


def test_the_upper_bound_is_rounded_once():
    """A control value rounded to bfloat16 first, 0.5039 instead of 0.502, would give another tau."""
    x, control = torch.tensor([[[[1.0, 0.75]]]], dtype=torch.bfloat16), torch.tensor([0.5019])
    assert suppress(x, control).tolist() == [[[[0.5, 0.5]]]]


def small_resnet():
    """Its blocks call one ReLU twice."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 0, 0], num_classes=3)


NETWORKS = {
    "learnable": lambda: strong(classifier("mini", 6)),
    "plugged": lambda: plug_drs(small_resnet(), delta=0.5),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(2))


def test_symbolic_trace(network, images):
    traced = torch.fx.symbolic_trace(network)
    assert_close(traced(images), network(images))
    y = traced(images)
    assert {node.target for node in traced.graph.nodes} & {suppress} or "_suppress_learnable" in traced.code
    y.sum().backward()
    with pytest.raises(ValueError, match="this DRS was made for"):
        torch.fx.symbolic_trace(nn.Sequential(DRS(4)))(images)


@pytest.mark.parametrize("make", [lambda: refinement_network("mini", 6), lambda: deeplab("aspp", "mini", 7)])
def test_the_other_networks_are_traced_too(make, images):
    network = make().eval()
    assert_close(torch.fx.symbolic_trace(network)(images), network(images))


def test_feature_extractor(images):
    network = strong(classifier("mini", 6)).eval()
    extractor = create_feature_extractor(network, ["layers.layer6"])
    assert_close(extractor(images)["layers.layer6"], network.layer_outputs(images)[-1])


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(network, images):
    traced = torch.jit.trace(network, images)
    other = torch.randn(2, 3, 48, 40)
    assert_close(traced(other), network(other))


def test_export(network, images):
    program = torch.export.export(network, (images,))
    assert_close(program.module()(images), network(images))


def test_compile_without_a_break(network, images):
    """The compiler's front end is what can fail on our code; "aot_eager" spares its back end's minute."""
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert_close(compiled(images), network(images))
    pairs = zip(gradients(network, images, compiled), gradients(network, images), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@DELTAS
def test_functional_call_under_vmap_and_grad(delta, x):
    drs = strong(DRS(3, delta))
    expected = torch.stack([drs(image[None])[0] for image in x])
    found = vmap(lambda image: functional_call(drs, dict(drs.named_parameters()), (image[None],))[0])(x)
    assert_close(found, expected)
    found = vmap(grad(lambda image: drs(image[None]).square().sum()))(x)
    assert_close(found, gradients(drs, x)[0])


def test_functional_call_uses_the_parameters_it_is_given(x):
    drs, other = DRS(3), strong(DRS(3))
    assert_close(functional_call(drs, dict(other.named_parameters()), (x,)), other(x))


@pytest.mark.filterwarnings("ignore")
def test_onnx(network, images):
    program = torch.onnx.export(network, (images,), dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    session = ReferenceEvaluator(program.model_proto)
    (found,) = session.run(None, {session.input_names[0]: images.numpy()})
    np.testing.assert_allclose(found, network(images).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_checkpointed_layers_are_recomputed_alike(x):
    """The comparison before the first use must not be seen by the checkpoint that counts saved tensors."""
    from torch.utils.checkpoint import checkpoint

    drs = strong(DRS(3))
    expected = gradients(drs, x)
    kernels._checked.clear()
    assert_close(gradients(drs, x, lambda leaf: checkpoint(drs, leaf, use_reentrant=False)), expected)
