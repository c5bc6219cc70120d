"""Mixtures inside the objective."""

import pytest
import torch

from idml.objective import mixture, mixup_lambda, mixup_pairs, objective
from shared.testing.gloo import on_ranks


def network(images):
    return images.flatten(1)


def record(calls):
    def loss(embeddings, labels):
        calls.append((embeddings, labels))
        return (embeddings.sum(1) * labels).sum()

    return loss


IMAGES = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2).clone()
LABELS = torch.tensor([0, 1, 2, 5])


def test_the_objective_is_the_loss_on_images_and_on_mixtures_with_either_label():
    calls = []
    value = objective(network, record(calls), IMAGES, LABELS, 0.25)
    (plain, first), (mixed, second), (again, third) = calls
    assert plain.equal(network(IMAGES)) and first.equal(LABELS) and second.equal(LABELS)
    expected = torch.tensor([0.25 * 0 + 0.75 * 2, 0.25 * 1 + 0.75 * 3, 0.25 * 2, 0.25 * 3 + 0.75])
    assert mixed.equal(again) and mixed[:, 0].equal(expected)
    assert third.tolist() == [2, 5, 0, 1]
    losses = [(x.sum(1) * y).sum() for x, y in calls]
    torch.testing.assert_close(value, losses[0] + 0.25 * losses[1] + 0.75 * losses[2])


def test_without_a_share_the_images_alone_are_trained_on():
    calls = []
    objective(network, record(calls), IMAGES, LABELS, None)
    assert len(calls) == 1


def test_pairs_stay_on_one_rank():
    """Each of two ranks takes every second image of a batch; its own pairs are those of the whole batch."""
    batch = torch.randn(8, 3, 2, 2)
    whole = mixture(batch, 0.3)
    for rank in range(2):
        assert mixture(batch[rank::2], 0.3).equal(whole[rank::2])


@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_the_share_is_a_function_of_the_step_and_has_the_beta_distribution(alpha):
    shares = torch.tensor([mixup_lambda(0, step, alpha) for step in range(2000)])
    assert mixup_lambda(0, 7, alpha) == shares[7] and mixup_lambda(1, 7, alpha) != shares[7]
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() / variance - 1) < 0.1


def test_partners_are_those_of_the_other_half():
    assert mixup_pairs(torch.arange(6)).tolist() == [3, 4, 5, 0, 1, 2]


def pairs_of_a_rank(number: int, ranks: int, size: int) -> torch.Tensor:
    return mixup_pairs(torch.arange(size)[number::ranks])


@pytest.mark.slow
@pytest.mark.parametrize("ranks, size", [(8, 120), (3, 31)])
def test_pairs_are_those_of_one_process_where_a_rank_has_half_of_one(ranks, size, tmp_path):
    """The paper's batch on its 8 GPUs: 15 images each."""
    parts = on_ranks(ranks, pairs_of_a_rank, tmp_path, ranks, size)
    whole = mixup_pairs(torch.arange(size))
    assert [part.tolist() for part in parts] == [whole[number::ranks].tolist() for number in range(ranks)]
