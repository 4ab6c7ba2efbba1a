"""The shipped weights: they fit, they know something, and the command that makes them works."""

import pytest
import torch
from safetensors.torch import load_file

from drs_course import pretrain
from drs_course.__main__ import main
from drs_lib import Critters, networks
from drs_lib.data import normalize
from drs_lib.data.saliency import SaliencyNetwork
from drs_lib.weights import SHIPPED


@pytest.fixture
def quick(monkeypatch):
    """The command on a few small images and one epoch."""
    monkeypatch.setattr(pretrain, "Critters", lambda split, length=16: Critters(split, size=128, length=16))
    monkeypatch.setattr(pretrain, "CLASSIFY", pretrain.CLASSIFY.replace(epochs=1, batch=8))
    monkeypatch.setattr(pretrain, "SALIENCY", pretrain.SALIENCY.replace(epochs=1, batch=8))


@pytest.mark.parametrize("name", list(pretrain.NETWORKS))
def test_the_command_makes_weights_of_the_shipped_form(quick, tmp_path, capsys, name):
    assert main(["pretrain", "--only", name, "--out", str(tmp_path)]) == 0
    made, shipped = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path, SHIPPED))
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in shipped.items()}
    assert any(not torch.equal(made[k], shipped[k]) for k in made)
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.safetensors"]
    assert "held out" in capsys.readouterr().out


def test_the_same_seed_trains_the_same_weights(quick):
    (one, _), (two, _) = (pretrain.pretrain_backbone("mini", progress=False) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(
    ("name", "size"), [("mini", 1_000_000), ("mini_resnet", 1_000_000), ("saliency", 300_000)]
)
def test_shipped_weights_are_trained_and_of_a_size_to_ship(name, size):
    path = SHIPPED / f"{name}.safetensors"
    assert path.stat().st_size < size
    # A trained batch norm has seen data; a fresh one has running means of exactly 0 and variances of 1.
    state = load_file(path)
    for key, tensor in state.items():
        assert torch.isfinite(tensor).all()
        if key.endswith("running_mean"):
            assert tensor.abs().min() > 0
    if name == "saliency":
        network = SaliencyNetwork()
        network.load_state_dict(state)
        assert sum(p.numel() for p in network.parameters()) < 50_000


def test_the_shipped_body_beats_a_random_one_at_telling_other_species_apart():
    """A linear read-out of average features, fitted on 150 images, tried on 60 others."""
    train, test = Critters("pretrain", length=150), Critters("pretrain_val", length=60)

    def features(weights):
        torch.manual_seed(0)
        model = networks.classifier("mini", 12, drs_layers=(), weights=weights).eval()
        with torch.inference_mode():
            return [
                torch.cat([model.layers(normalize(d[i][0][None])).mean((2, 3)) for i in range(len(d))])
                for d in (train, test)
            ]

    def error(weights):
        x, x_test = features(weights)
        mean, std = x.mean(0), x.std(0) + 1e-6
        x, x_test = (x - mean) / std, (x_test - mean) / std
        y, y_test = (torch.stack([d[i][1] for i in range(len(d))]) for d in (train, test))
        ridge = x.T @ x + 10 * torch.eye(x.shape[1])
        w = torch.linalg.solve(ridge, x.T @ (y - y.mean(0)))
        return float(((x_test @ w + y.mean(0) - y_test) ** 2).mean())

    assert error("pretrained") < 0.6 * error(None)
