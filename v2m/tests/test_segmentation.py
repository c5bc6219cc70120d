"""Rates that decay with the layers of a plain network: those of mmseg's rule for BEiT, which Vim's authors name."""

from types import SimpleNamespace

import pytest
from torch import nn

from shared.dense import libraries
from shared.dense.module import parameter_groups
from v2m.model import build_network
from v2m.segmentation import plain_maps
from v2m.tests.small import small_config

CHANNELS, DECAY, RATE, WEIGHT_DECAY = 3, 0.92, 1e-4, 0.05


class BEiTLike(nn.Module):
    """A network and a head under the names, of class and parameters, by which mmseg knows where its layers are."""

    def __init__(self, network: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.decode_head = network, head
        network.__class__ = type("BEiTLike", (type(network),), {})


class Segmenter(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.decode_head = backbone, head


def by_parameter(groups: list[dict]) -> dict[int, tuple[float, float]]:
    return {id(p): (part["lr"], part["weight_decay"]) for part in groups for p in part["params"]}


@pytest.mark.slow
@pytest.mark.skipif(
    bool(libraries.missing_modules()), reason="the extra for segmentation is not here: make setup-dense"
)
@pytest.mark.parametrize("resize", [False, True])
def test_rates_and_decays_of_a_plain_network_are_those_of_mmsegs_rule(resize, tmp_path):
    # mmseg's float power and ours are the same operation.
    tolerance = 1e-12
    library = libraries.segmentation()
    from mmengine.optim import build_optim_wrapper

    cfg = small_config(tmp_path, "model.network.depth=4")
    network = build_network(cfg.model, image_size=8, channels=CHANNELS, classes=0, backend="chunked", drop_path=0.0)
    head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = Segmenter(plain_maps(network, [0, 1, 2, 3], resize), head)
    optim = SimpleNamespace(lr=RATE, weight_decay=WEIGHT_DECAY, layer_decay=DECAY, no_decay=["pos_embed", "cls_token"])
    ours = by_parameter(parameter_groups(model, optim))
    depth = len(network.layers)
    described = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": RATE, "weight_decay": WEIGHT_DECAY},
        "constructor": "LearningRateDecayOptimizerConstructor",
        "paramwise_cfg": {"num_layers": depth, "decay_rate": DECAY, "decay_type": "layer_wise"},
    }
    with library.scope():
        theirs = by_parameter(build_optim_wrapper(BEiTLike(network, head), described).param_groups)
    rates = set()
    for name, parameter in [*network.named_parameters(), *head.named_parameters()]:
        rate, decay = ours[id(parameter)]
        assert rate == pytest.approx(theirs[id(parameter)][0], rel=tolerance), name
        # mmseg asks for "pos_embed" where the name is "backbone.pos_embed", and so decays it, against its own purpose.
        expected = 0.0 if name in ("pos_embed", "cls_token") else theirs[id(parameter)][1]
        assert decay == expected, name
        rates.add(rate)
    assert len(rates) == depth + 2
    # What our backbone adds behind the layers, norms and transposed convolutions, has the whole rate.
    added = [p for p in model.backbone.parameters() if id(p) not in theirs]
    assert added and {ours[id(p)][0] for p in added} == {RATE}
    assert all(ours[id(p)][1] == (0.0 if p.dim() == 1 else WEIGHT_DECAY) for p in added)
