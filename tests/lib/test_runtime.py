import random
import types

import numpy as np
import pytest
import torch

from drs_lib import runtime


def _draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seed_everything_seeds_all_three_generators():
    runtime.seed_everything(7)
    first = _draws()
    _draws()
    runtime.seed_everything(7)
    assert _draws() == first
    runtime.seed_everything(8)
    assert all(a != b for a, b in zip(_draws(), first, strict=True))


@pytest.mark.parametrize(
    "call, what, values",
    [
        (runtime.seed_everything, "seed", [-1, 2**32, 1.5, "3", None, True]),
        (lambda n: runtime.threads(n).__enter__(), "threads", [0, -1, 1.0, "2", True]),
    ],
)
def test_what_is_no_seed_and_no_number_of_threads_is_refused(call, what, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{what} holds"):
            call(value)


def test_seeded_is_independent_of_the_past_and_invisible_to_the_future():
    runtime.seed_everything(1)
    undisturbed = _draws()
    runtime.seed_everything(1)
    with runtime.seeded(5):
        inside = _draws()
    with pytest.raises(KeyError), runtime.seeded(5):
        assert _draws() == inside
        raise KeyError
    assert _draws() == undisturbed


def test_threads_sets_and_restores():
    former = torch.get_num_threads()
    with pytest.raises(KeyError), runtime.threads(former + 1):
        assert torch.get_num_threads() == former + 1
        raise KeyError
    assert torch.get_num_threads() == former
    with runtime.threads(None):
        assert torch.get_num_threads() == former


def test_pick_device_order_name_environment_best(monkeypatch):
    monkeypatch.delenv("DRS_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runtime.pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.pick_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.pick_device() == torch.device("cuda")
    assert runtime.pick_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("DRS_DEVICE", "cpu")
    assert runtime.pick_device() == torch.device("cpu")
    assert runtime.pick_device("mps") == torch.device("mps")


def test_pick_device_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="'cuda:1'.*finds 1 cuda"):
        runtime.pick_device("cuda:1")
    with pytest.raises(ValueError, match="'gpu'.*expected cpu"):
        runtime.pick_device("gpu")
    with pytest.raises(ValueError, match="expected cpu"):
        runtime.pick_device("meta")
    monkeypatch.setenv("DRS_DEVICE", "nonsense")
    with pytest.raises(ValueError, match="DRS_DEVICE is 'nonsense'"):
        runtime.pick_device()


def test_autocast_changes_the_type_only_when_asked():
    x = torch.ones(2, 2)
    with runtime.autocast("cpu", "float32"):
        assert (x @ x).dtype == torch.float32
    with runtime.autocast("cpu", "bfloat16"):
        assert (x @ x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="precision is 'half'"):
        runtime.autocast("cpu", "half")


def test_memory_format():
    assert runtime.memory_format("cpu") is torch.channels_last
    assert runtime.memory_format("cuda") is torch.channels_last
    assert runtime.memory_format("mps") is torch.contiguous_format


def test_evaluating_restores_every_modules_own_mode():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Dropout())
    model[0].eval()
    with runtime.evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.ones(1, 1, 2, 2)).requires_grad
    assert [module.training for module in model.modules()] == [True, False, True]


def test_sampling_can_be_seeded_without_touching_an_accelerator(monkeypatch):
    def fail(*args):
        raise AssertionError("an accelerator was asked")

    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        monkeypatch.setattr(torch.mps, name, fail)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", fail)
    with runtime.seeded(5, accelerators=False):
        host = _draws()
    monkeypatch.undo()
    with runtime.seeded(5):
        assert _draws() == host


def test_only_a_cuda_device_is_not_waited_for():
    asked = []
    tensor = types.SimpleNamespace(to=lambda device, non_blocking: asked.append(non_blocking))
    for device in ("cuda", torch.device("cuda", 1), "mps", "cpu"):
        runtime.move(tensor, device)
    assert asked == [True, True, False, False]
