"""The fixtures of the tests of both packages."""

import pytest
import released
import torch
from tiny import TinyDataset, write_voc_tree

torch.set_num_threads(1)


@pytest.fixture
def tiny_dataset():
    return TinyDataset()


@pytest.fixture(scope="session")
def voc_tree(tmp_path_factory):
    """The VOC2012 folder of a tiny tree: train (= trainaug) 6 images, val 3, the classes of VOC. Don't
    change it."""
    return write_voc_tree(tmp_path_factory.mktemp("voc"))


@pytest.fixture
def thin_resnet101(monkeypatch):
    released.thin_resnet101(monkeypatch.setattr)


@pytest.fixture
def thin_vgg16(monkeypatch):
    released.thin_vgg16(monkeypatch.setattr)
