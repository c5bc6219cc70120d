"""The networks under timm's names: ``import v2m.tools.timm_models``, then ``timm.create_model("v2m_t")``.

Each is the model of an ImageNet-1K experiment: the YAML is the whole truth. ``num_classes``, ``img_size``, ``in_chans``
and ``drop_path_rate`` change it as in timm, ``features_only=True`` gives the stage outputs of a pyramid. There are
no pretrained weights; ``v2m.tools.convert`` reads official ones.
"""

from timm.models import generate_default_cfgs

from shared.claims.compose import row_config
from v2m.model import build_network
from v2m.model_base import CHANNELS
from v2m.tools.timm_registration import register, settings

PLAIN = {
    "v2m_t": "v2m-in1k-t",
    "v2m_s": "v2m-in1k-s",
    "v2m_t_lw": "v2m-in1k-t-lw",
    "v2m_s_lw": "v2m-in1k-s-lw",
    "v2m_vim_t": "v2m-in1k-vim-t",
    "v2m_vim_s": "v2m-in1k-vim-s",
    "v2m_local_vim_t": "v2m-in1k-localvim-t",
    "v2m_local_vim_s": "v2m-in1k-localvim-s",
}
PYRAMIDS = {
    "v2m_s_star": "v2m-in1k-sstar",
    "v2m_b_star": "v2m-in1k-bstar",
    "v2m_vmamba_t": "v2m-in1k-vmamba-t",
    "v2m_vmamba_s": "v2m-in1k-vmamba-s",
}
ROWS = PLAIN | PYRAMIDS


def _settings(name: str) -> dict:
    # Positions are resized, pyramids have none.
    return settings(plain=name in PLAIN, fixed_input_size=False, first_conv="patch_embed.proj")


default_cfgs = generate_default_cfgs({name: _settings(name) for name in ROWS})


def network_of(
    row: str,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = CHANNELS,
    drop_path_rate: float | None = None,
    backend: str = "auto",
    **changes,
):
    """Build the network of an experiment with timm's arguments; img_size is a side or (height, width)."""
    if drop_path_rate is not None:
        changes["drop_path"] = drop_path_rate
    model = row_config("v2m", row, 0).model
    return build_network(model, image_size=img_size, channels=in_chans, classes=num_classes, backend=backend, **changes)


for _name, _row in ROWS.items():
    register(_name, _row, network_of, plain=_name in PLAIN, module=__name__)
