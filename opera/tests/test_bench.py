"""The benchmark's two forms take the same step, and it prints both."""

import pytest
import torch

from opera.tools import bench, reference

TOY = ["model=vit-tiny", "heads=small-vit", "optim=small-vit", "data.image_size=16"]


@pytest.mark.parametrize("network", ["resnet-small", "vit-tiny"])
def test_the_reference_has_our_objective_gradients_and_momentum_encoder(network):
    heads = "small-vit" if network.startswith("vit") else "small"
    overrides = [f"model={network}", f"heads={heads}", "data.image_size=16"]
    ours, reference_model = (bench.module_of(overrides).double().model for _ in range(2))
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 5, 9])
    wanted, actual = (ours(first, second, labels).total, reference.objective(reference_model, first, second, labels))
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=0)
    wanted.backward()
    actual.backward()
    for model in (ours, reference_model):
        with torch.no_grad():
            for parameter in model.online.parameters():
                parameter += 1 if parameter.grad is None else parameter.grad
    for mine, theirs in zip(ours.parameters(), reference_model.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-9, atol=1e-12)
    ours.update_momentum(0.9)
    reference.update_momentum(reference_model, 0.9)
    for mine, theirs in zip(ours.momentum.parameters(), reference_model.momentum.parameters(), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-9, atol=1e-12)


def test_reference_views_have_the_size_and_the_colours_of_ours():
    """Over many images both forms of a view have the same mean and deviation."""
    module = bench.module_of(["data.image_size=16"])
    batch = bench.images_of(module, 512)
    torch.manual_seed(0)
    views = reference.view_batch(reference.build_views(module.views.cfg), batch["images"])
    for theirs, ours in zip(views, module.both_views(batch), strict=True):
        assert theirs.shape == ours.shape == (512, 3, 16, 16) and theirs.dtype == ours.dtype
        assert float(theirs.mean() - ours.mean()) == pytest.approx(0, abs=0.05)
        assert float(theirs.std() / ours.std()) == pytest.approx(1, abs=0.05)


def test_the_table_has_both_forms_of_every_network_and_the_parts_of_ours(monkeypatch, capsys):
    monkeypatch.setattr(bench, "NETWORKS", {"toy": TOY})
    bench.main(["--batch", "8", "--steps", "1", "--threads", "1"])
    out = capsys.readouterr().out
    assert out.count("toy") == 3 and "reference" in out and "ours" in out and "backward" in out
