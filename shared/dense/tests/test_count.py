"""What autograd keeps of a call, against a hand count; whole models are in tests/test_dense_counts.py."""

import pytest
import torch
from torch import nn

from shared.dense.count import kept_bytes


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("images", [1, 3])
def test_kept_bytes_are_those_of_a_hand_count(device, images):
    network = small().to(device)
    inputs = torch.zeros(images, 3, 5, 7, device=device)
    # The images, the ReLU's result, which the next convolution keeps too, and the input of the last convolution.
    assert kept_bytes(network, lambda: network(inputs)) == 4 * images * 5 * 7 * (3 + 8 + 4)


def test_a_frozen_part_keeps_nothing():
    network = small().to("meta")
    network[:3].requires_grad_(False)
    assert kept_bytes(network, lambda: network(torch.zeros(2, 3, 5, 7, device="meta"))) == 4 * 2 * 5 * 7 * 4


def test_a_view_keeps_its_whole_storage_and_once():
    wide, network = torch.zeros(6, 4, device="meta"), nn.Linear(4, 4, device="meta")
    kept = kept_bytes(network, lambda: network(wide[:2]) + network(wide[2:4]))
    assert kept == wide.nbytes
