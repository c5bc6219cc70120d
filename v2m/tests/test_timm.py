"""timm's names: every row is registered and builds, timm's arguments count, stages come from the pyramids."""

import pytest
import timm
import torch

from shared.claims.compose import row_config, row_names
from shared.claims.protocol import load_paper
from shared.environment import repository_root
from shared.errors import UserError
from v2m.tools import timm_models
from v2m.vim import Vim
from v2m.vmamba import VMamba

TINY = {"depth": 1, "embed_dim": 16, "backend": "chunked"}
TINY_PYRAMID = {"depths": [1, 1, 1, 1], "dims": 8, "backend": "chunked"}


def test_every_network_of_the_imagenet_table_has_a_name_of_this_package():
    names = timm.list_models("v2m_*")
    assert set(names) == set(timm_models.ROWS)
    assert all(timm.models.model_entrypoint(name).__module__ == "v2m.tools.timm_models" for name in names)
    assert set(timm_models.ROWS.values()) <= set(row_names(load_paper(repository_root(), "v2m")))


@pytest.mark.parametrize("name", timm_models.ROWS)
def test_a_name_gives_the_network_of_its_row(name):
    with torch.device("meta"):
        network = timm.create_model(name)
    expected = Vim if name in timm_models.PLAIN else VMamba
    assert isinstance(network, expected) and network.num_classes == 1000
    for key in ("first_conv", "classifier"):
        assert hasattr(network.get_submodule(network.pretrained_cfg[key]), "weight")
    model = row_config("v2m", timm_models.ROWS[name], 0).model.network
    blocks = model.depth if name in timm_models.PLAIN else sum(model.depths)
    mixers = [n for n, _ in network.named_modules() if n.endswith((".mixer", ".op"))]
    assert len(mixers) == blocks


@pytest.mark.parametrize("name", ["v2m_t", "v2m_vim_t", "v2m_local_vim_t", "v2m_t_lw"])
def test_timm_s_own_arguments_change_a_plain_network(name):
    arguments = {"num_classes": 7, "img_size": (64, 96), "in_chans": 1, "drop_path_rate": 0.3}
    network = timm.create_model(name, **arguments, **TINY | {"depth": 2}).eval()
    assert network.grid_size == (4, 6) and network.layers[1].drop_path.drop_prob == pytest.approx(0.3)
    assert network(torch.randn(2, 1, 64, 96)).shape == (2, 7)
    assert network.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["v2m_t", "v2m_local_vim_t"])
def test_a_plain_network_takes_images_of_another_size_than_it_was_made_for(name):
    network = timm.create_model(name, num_classes=7, **TINY).eval()
    images = torch.randn(1, 3, 48, 80)
    assert network(images).shape == (1, 7) and network.forward_features(images).shape == (1, 16, 3, 5)


@pytest.mark.parametrize("name", ["v2m_s_star", "v2m_vmamba_t"])
def test_timm_gives_the_stages_of_a_pyramid(name):
    features = timm.create_model(name, features_only=True, out_indices=(1, 3), **TINY_PYRAMID)
    assert features.feature_info.channels() == [16, 64] and features.feature_info.reduction() == [8, 32]
    assert [f.shape for f in features(torch.randn(1, 3, 64, 96))] == [(1, 16, 8, 12), (1, 64, 2, 3)]


def test_timm_refuses_the_stages_of_a_plain_network():
    with pytest.raises(UserError, match="features_only is for the pyramids"):
        timm.create_model("v2m_t", features_only=True)
