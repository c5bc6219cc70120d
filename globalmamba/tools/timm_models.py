"""The networks under timm's names, registered by ``import globalmamba.tools.timm_models``.

Each is the model of an ImageNet-1K experiment: the YAML is the whole truth. ``num_classes``, ``img_size``, ``in_chans``
and ``drop_path_rate`` change it as in timm, ``features_only=True`` gives the stage outputs of a pyramid. There are
no pretrained weights; ``globalmamba.tools.convert`` reads the official ones of the bases.
"""

from timm.models import generate_default_cfgs

from globalmamba.model import build_network
from globalmamba.model_base import CHANNELS
from globalmamba.tools.timm_registration import register, settings
from shared.claims.compose import row_config
from shared.errors import UserError

ROWS = {
    "globalmamba_m_vim": "gm-in1k-m",
    "globalmamba_t_vim": "gm-in1k-tstar",
    "globalmamba_t": "gm-in1k-t",
    "globalmamba_s": "gm-in1k-s",
    "globalmamba_b": "gm-in1k-b",
    "vim_tiny": "in1k-vim-t",
    "vim_small": "in1k-vim-s",
    "vmamba_tiny": "in1k-vmamba-t",
    "vmamba_small": "in1k-vmamba-s",
    "vmamba_base": "in1k-vmamba-b",
}


def is_plain(name: str) -> bool:
    """Say whether a network is of one resolution."""
    return "vim" in name


def _settings(name: str) -> dict:
    plain = is_plain(name)
    return settings(plain=plain, fixed_input_size=plain, first_conv="tokens.proj")


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
    """Build the network of an experiment with timm's arguments; UserError for sides that differ."""
    sides = {img_size} if isinstance(img_size, int) else set(img_size)
    if len(sides) != 1:
        raise UserError(f"img_size {tuple(img_size)} is not square: give one number")
    if drop_path_rate is not None:
        changes["drop_path"] = drop_path_rate
    model = row_config("globalmamba", row, 0).model
    return build_network(
        model, image_size=sides.pop(), channels=in_chans, classes=num_classes, backend=backend, **changes
    )


for _name, _row in ROWS.items():
    register(_name, _row, network_of, plain=is_plain(_name), module=__name__)
