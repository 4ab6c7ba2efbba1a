"""Algorithm 1, its controllers and plug_drs, against values computed by hand and numerical gradients."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from drs_lib import kernels
from drs_lib.drs import DRS, ConstantController, LearnableController, suppress, suppress_plain
from drs_lib.plug import DRSCalls, plug_drs

BOTH = pytest.mark.parametrize("form", [suppress, suppress_plain])
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


@BOTH
def test_algorithm_1_by_hand(form):
    x = torch.tensor([[[[-1.0, 2.0], [6.0, 10.0]], [[4.0, 3.0], [1.0, -2.0]]]])
    y = form(x, 0.5)
    assert y.tolist() == [[[[0.0, 2.0], [5.0, 5.0]], [[2.0, 2.0], [1.0, 0.0]]]]
    y = form(x, torch.tensor([0.7, 0.25]))
    torch.testing.assert_close(y, torch.tensor([[[[0.0, 2.0], [6.0, 7.0]], [[1.0, 1.0], [1.0, 0.0]]]]))


@BOTH
def test_gradients_by_hand(form):
    x = torch.tensor([[[[-1.0, 2.0], [6.0, 10.0]]]], requires_grad=True)
    control = torch.tensor([0.5], requires_grad=True)
    form(x, control).backward(torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]]))
    # tau = 5 replaces 6 and 10: both gradients, 1100, go to tau = 0.5 * 10, half of it to the maximum.
    assert x.grad.tolist() == [[[[0.0, 10.0], [0.0, 550.0]]]]
    assert control.grad.tolist() == [11000.0]


@BOTH
def test_equal_maxima_send_the_gradient_to_the_first(form):
    x = torch.tensor([[[[1.0, 8.0], [8.0, 8.0]]]], requires_grad=True)
    form(x, 0.5).sum().backward()
    assert x.grad.tolist() == [[[[1.0, 1.5], [0.0, 0.0]]]]


@BOTH
def test_all_dead_maps_stay_dead(form):
    x = torch.full((1, 2, 3, 3), -1.0, requires_grad=True)
    y = form(x, 0.5)
    y.sum().backward()
    assert not y.any() and not x.grad.any()


@BOTH
@FORMATS
def test_delta_one_is_relu(form, memory_format):
    x = torch.randn(2, 5, 6, 7).round(decimals=1).contiguous(memory_format=memory_format)
    x[0, 0] = 2.0
    y, z, g = form(x.requires_grad_(), 1.0), F.relu(x), torch.randn(x.shape)
    assert y.equal(z) and torch.autograd.grad(y, x, g)[0].equal(torch.autograd.grad(z, x, g)[0])
    assert DRS(5, delta=1)(x).equal(z)


@BOTH
@pytest.mark.parametrize("value", [1.0, 0.999])
def test_the_gradient_at_control_one_continues_the_one_below(form, value):
    control = torch.tensor([value], requires_grad=True)
    form(torch.tensor([[[[1.0, 4.0]]]]), control).sum().backward()
    assert control.grad.item() == 4


@pytest.mark.parametrize("size", [(3,), (2, 3), (2, 3, 1, 1)], ids=str)
@FORMATS
def test_gradcheck_through_input_control_and_maximum(size, memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    control = (0.2 + 0.6 * torch.rand(size, dtype=torch.float64)).requires_grad_()
    assert gradcheck(suppress, (x, control))
    assert gradgradcheck(suppress, (x, control))
    assert gradcheck(lambda x: suppress(x, 0.55), (x,))


def test_gradcheck_of_the_learnable_module_and_its_weight():
    torch.manual_seed(0)
    drs = DRS(3).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda x, weight: torch.func.functional_call(drs, {"controller.f.weight": weight}, x), (x, weight)
    )


@BOTH
@FORMATS
def test_positively_homogeneous(form, memory_format):
    x = torch.randn(2, 5, 6, 7).contiguous(memory_format=memory_format)
    for scale in (0.25, 8.0):
        assert form(scale * x, 0.55).equal(scale * form(x, 0.55))
    torch.testing.assert_close(form(0.3 * x, 0.55), 0.3 * form(x, 0.55))


@BOTH
@FORMATS
@pytest.mark.parametrize("window", [(2,), (3, 2, 1)], ids=str)
def test_constant_control_commutes_with_max_pooling(form, memory_format, window):
    x = torch.randn(2, 5, 8, 6).contiguous(memory_format=memory_format).requires_grad_()
    y, z = form(F.max_pool2d(x, *window), 0.55), F.max_pool2d(form(x, 0.55), *window)
    assert y.equal(z)
    g = torch.arange(y.numel()).view_as(y).float()
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(z, x, g))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_keep_their_type(dtype):
    x = torch.randn(2, 3, 4, 4).to(dtype).requires_grad_()
    for control in (0.5, torch.rand(3), torch.rand(2, 3, dtype=torch.float64)):
        y = suppress(x, control)
        y.sum().backward()
        assert y.dtype == dtype and x.grad.dtype == dtype
    assert DRS(3).to(dtype)(x).dtype == dtype


@BOTH
def test_empty_batches(form):
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    form(x, 0.5).sum().backward()
    assert form(x, torch.rand(3)).shape == x.shape
    assert DRS(3)(x).shape == x.shape and x.grad.shape == x.shape


def test_controllers():
    torch.manual_seed(0)
    features = torch.rand(2, 200, 4, 5)
    controller = LearnableController(200)
    weight = controller.f.weight
    assert controller.f.bias is None and abs(weight.std() - 0.01) < 1e-3 and abs(weight.mean()) < 1e-3
    expected = torch.sigmoid(features.double().mean((2, 3)) @ weight.double().T)
    torch.testing.assert_close(controller(features).double(), expected, rtol=1e-6, atol=1e-6)
    average = features.mean((2, 3), keepdim=True)
    torch.testing.assert_close(controller(average), controller(features))
    assert ConstantController(0.55)(features) == 0.55
    assert "delta=0.55" in repr(DRS(3, 0.55)) and not list(DRS(3, 0.55).parameters())
    assert sum(p.numel() for p in DRS(3).parameters()) == 9


def test_another_controller_can_be_plugged_in():
    class Ramp(nn.Module):
        def forward(self, features):
            return torch.linspace(0.5, 1, features.shape[1])

    x = torch.randn(2, 3, 4, 4)
    drs = DRS(3)
    drs.controller = Ramp()
    assert drs(x).equal(suppress(x, torch.tensor([0.5, 0.75, 1])))


@pytest.mark.parametrize("delta", [0, -0.1, 1.01, float("nan"), float("inf"), True, "0.5"])
@pytest.mark.parametrize(
    "call",
    [
        lambda delta: suppress(torch.rand(1, 2, 3, 3), delta),
        lambda delta: suppress_plain(torch.rand(1, 2, 3, 3), delta),
        lambda delta: DRS(2, delta),
        lambda delta: plug_drs(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()), delta=delta),
    ],
    ids=["suppress", "plain", "DRS", "plug_drs"],
)
def test_impossible_delta(call, delta):
    with pytest.raises(ValueError, match="0 < delta <= 1"):
        call(delta)


@BOTH
def test_impossible_input(form):
    x = torch.rand(2, 3, 4, 4)
    for shape in ((), (1,), (2,), (3, 2), (1, 3), (2, 3, 4, 4), (2, 3, 1)):
        with pytest.raises(ValueError, match=r"\(3,\), \(2, 3\) or \(2, 3, 1, 1\)"):
            form(x, torch.ones(shape))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\); DRS works on feature maps"):
        form(x[..., 0], 0.5)
    with pytest.raises(ValueError, match="torch.int64"):
        form(x.long(), 0.5)
    with pytest.raises(ValueError, match="delta is None"):
        form(x, None)
    with pytest.raises(ValueError, match="control is on meta, x on cpu"):
        form(x, torch.ones(3, device="meta"))


def test_wrong_number_of_channels():
    for delta in (None, 0.5):
        with pytest.raises(ValueError, match="3 channels.*made for 4"):
            DRS(4, delta)(torch.rand(2, 3, 4, 4))
        with pytest.raises(ValueError, match="feature maps"):
            DRS(4, delta)(torch.rand(2, 4))


NETWORKS = {
    # name: (ReLUs on feature maps, ReLU calls left alone)
    "vgg16": (13, 2),
    "vgg16_bn": (13, 2),
    "resnet18": (17, 0),
    "mobilenet_v3_small": (5, 9),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A torchvision network in eval mode: convolutions at random, large linear layers filled, not drawn."""
    with torch.device("meta"):
        model = torchvision.models.get_model(request.param)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 1 / module.in_features)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return request.param, model.eval()


def small_copy(model):
    """A copy that shares the weights: DRS adds its own and changes none of the others."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_plugged_into_torchvision(network, images, caplog):
    name, model = network
    places, alone = NETWORKS[name]
    same = plug_drs(small_copy(model), delta=1)
    with torch.no_grad():
        expected = model(images)
        assert same(images).equal(expected)
        assert not plug_drs(small_copy(model), delta=0.5)(images).allclose(expected)
    assert len([m for m in same.modules() if isinstance(m, DRS)]) == places
    assert not any(m.training for m in same.modules())
    assert [call.position for call in same.drs_report.plugged] == list(range(1, places + 1))
    assert len(same.drs_report.calls) == places + alone
    if name.startswith("vgg16"):
        assert "classifier.1, classifier.4: on a tensor of 2 dimensions" in caplog.text
    if name == "mobilenet_v3_small":
        assert "on 1x1 maps" in caplog.text and "19 Hardswish: not a ReLU" in caplog.text
        assert sum(isinstance(m, nn.ReLU) for m in same.modules()) == alone
    if name == "resnet18":
        assert not caplog.records


def test_learnable_controllers_in_torchvision(network, images):
    name, model = network
    plugged, other = plug_drs(small_copy(model)), plug_drs(small_copy(model))
    modules = [m for m in plugged.modules() if isinstance(m, DRS)]
    expected_channels = [call.shape[1] for call in plugged.drs_report.plugged]
    assert sorted(m.channels for m in modules) == sorted(expected_channels)
    gradients = torch.autograd.grad(plugged(images).square().sum(), [m.controller.f.weight for m in modules])
    assert len(gradients) == NETWORKS[name][0] and all(gradient.any() for gradient in gradients)
    other.load_state_dict(plugged.state_dict())
    with torch.no_grad():
        assert other(images).equal(plugged(images))


def test_only_some_layers(network, images):
    name, model = network
    last = NETWORKS[name][0]
    plugged = plug_drs(small_copy(model), layers=[2, last], delta=0.5)
    assert [call.position for call in plugged.drs_report.plugged] == [2, last]
    assert sum(isinstance(m, DRS) for m in plugged.modules()) == 2
    with torch.no_grad():
        assert not plugged(images).allclose(model(images))
        both = plug_drs(plugged, layers=range(1, last - 1), delta=0.5)
        assert both(images).equal(plug_drs(small_copy(model), delta=0.5)(images))


def test_layers_that_are_not_there():
    model = torchvision.models.resnet18(num_classes=2)
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"\[0, 18\] are not [\s\S]*17 layer4.1.relu, call 2 \(512x7x7\)"):
        plug_drs(model, layers=[0, 1, 18])
    assert list(model.modules()) == before


class Block(nn.Module):
    """Calls one in-place ReLU three times, on different numbers of channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, stop=False):
        x = self.relu(self.a(x))
        if stop:
            raise KeyboardInterrupt
        return self.relu(self.c(self.relu(self.b(x))))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


def test_every_call_of_a_shared_relu_has_its_own_drs(block):
    expected = x = torch.randn(2, 2, 5, 5)
    for convolution in (block.a, block.b, block.c):
        expected = suppress(convolution(expected), 0.5)
    plug_drs(block, delta=0.5)
    assert isinstance(block.relu, DRSCalls) and [drs.channels for drs in block.relu] == [3, 4, 2]
    for twin in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin(x).equal(expected)
        with pytest.raises(KeyboardInterrupt):
            twin(x, stop=True)
        assert twin(x).equal(expected)


def test_some_calls_of_a_shared_relu(block):
    x = torch.randn(2, 2, 5, 5)
    expected = F.relu(block.c(suppress(block.b(F.relu(block.a(x))), 0.5)))
    assert plug_drs(block, layers=(2,), delta=0.5)(x).equal(expected)


def test_one_relu_in_several_places():
    relu, c = nn.ReLU(), [nn.Conv2d(2, 2, 3) for _ in range(3)]
    expected = x = torch.randn(1, 2, 9, 9)
    for convolution in c:
        expected = suppress(convolution(expected), 0.5)
    model = plug_drs(nn.Sequential(c[0], relu, c[1], relu, nn.Sequential(c[2], relu)), delta=0.5)
    assert model(x).equal(expected)
    assert [call.name for call in model.drs_report.calls] == ["1, call 1", "1, call 2", "4.1"]


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.inner(x))


class Widen(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], dim=1)


def test_a_block_that_runs_twice_keeps_one_drs():
    model = plug_drs(Twice(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())))
    assert isinstance(model.inner[1], DRS) and len(model.drs_report.calls) == 1
    with pytest.raises(ValueError, match="on 2 and on 4 channels"):
        plug_drs(Twice(nn.Sequential(nn.ReLU(), Widen())), example=torch.rand(1, 2, 8, 8))


class Functional(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.convolution, self.module, self.unused = nn.Conv2d(1, 2, 3), module, nn.ReLU()

    def forward(self, x):
        return torch.relu(F.relu(self.module(self.convolution(x)), inplace=True)).relu()


def test_relu_functions_are_counted_and_said(caplog):
    model = plug_drs(Functional(nn.Sequential(nn.ReLU(), nn.ReLU6())), delta=0.5)
    assert model.drs_report.functional == 3 and model.drs_report.never_called == ("unused",)
    assert model.drs_report.other_activations == {"ReLU6": 1}
    assert "3 call(s) of a ReLU function" in caplog.text and "unused: not called" in caplog.text
    with pytest.raises(ValueError, match=r"no nn.ReLU on feature maps[\s\S]*3 call\(s\) of a ReLU function"):
        plug_drs(Functional(nn.Identity()))


CONVOLUTION = nn.Conv2d(3, 2, 1)
UNFIT = [
    ([CONVOLUTION], ValueError, "no activation at all"),
    ([nn.Flatten(), nn.Linear(192, 3), nn.ReLU()], ValueError, "on a tensor of 2 dimensions"),
    ([CONVOLUTION, nn.ReLU(), nn.Flatten(), nn.Linear(10, 2)], RuntimeError, "example="),
    ([nn.LazyConv2d(2, 1), nn.ReLU()], ValueError, "0.weight of Sequential is lazy"),
    ([CONVOLUTION, nn.LazyBatchNorm2d(), nn.ReLU()], ValueError, "run the model on a"),
]


@pytest.mark.parametrize("modules, error, message", UNFIT, ids=[message for *_, message in UNFIT])
def test_models_that_cannot_be_plugged(modules, error, message):
    model = nn.Sequential(*modules)
    before = [{**m._forward_hooks, **m._forward_pre_hooks} for m in model.modules()]
    with pytest.raises(error, match=message):
        plug_drs(model, example=torch.rand(1, 3, 8, 8))
    assert [{**m._forward_hooks, **m._forward_pre_hooks} for m in model.modules()] == before
    assert all(m.training for m in model.modules())


def test_a_relu_alone_cannot_be_plugged():
    with pytest.raises(ValueError, match="itself an nn.ReLU"):
        plug_drs(nn.ReLU())


class Elsewhere(nn.Module):
    """Calls a ReLU that another module holds."""

    def __init__(self):
        super().__init__()
        self.holder = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())

    def forward(self, x):
        return self.holder[1](self.holder(x))


def test_a_relu_called_from_outside_its_block_is_left_alone():
    model = plug_drs(Elsewhere(), delta=0.5)
    assert [call.plugged for call in model.drs_report.calls] == [True, False]
    assert "does not hold it" in model.drs_report.left_alone()[0]


def test_the_dry_run_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)).double()
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    weight = model[0].weight
    plug_drs(model)
    assert [m.training for m in model] == [True, True, True, False]
    assert model[0].weight is weight and model[2].controller.f.weight.dtype == torch.float64
    assert all(model.state_dict()[key].equal(value) for key, value in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("form", [kernels.disabled, nullcontext], ids=["plain", "compiled"])
@pytest.mark.parametrize("delta", [None, 0.55], ids=["learnable", "constant"])
def test_a_step_of_gradient_descent_lowers_the_loss(delta, form):
    torch.manual_seed(0)
    head = nn.Conv2d(8, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(nn.Conv2d(2, 8, 3), DRS(8, delta), *head)
    x, target = torch.randn(8, 2, 12, 12), (torch.rand(8, 3) < 0.5).float()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(5):
        with form():
            losses.append(F.binary_cross_entropy_with_logits(model(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
