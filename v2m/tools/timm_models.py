"""The networks under timm's names: ``import v2m.tools.timm_models``, then ``timm.create_model("v2m_t")``.

Each is the model of an ImageNet-1K experiment: the YAML is the whole truth. ``num_classes``, ``img_size``, ``in_chans``
and ``drop_path_rate`` change it as in timm, ``features_only=True`` gives the stage outputs of a pyramid. There are
no pretrained weights; ``v2m.tools.convert`` reads the official ones of the bases.
"""

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from shared.claims.compose import row_config
from shared.errors import UserError
from v2m.model import CHANNELS, build_network

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
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (CHANNELS, 224, 224),
        "fixed_input_size": False,  # positions are resized, pyramids have none
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj" if name in PLAIN else "patch_embed.0",
        "classifier": "head" if name in PLAIN else "classifier.head",
    }


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
    return build_network(
        model, image_size=img_size, channels=in_chans, classes=num_classes, backend=backend, **changes
    )


def _create(name: str, pretrained: bool, **options):
    if options.get("features_only") and name in PLAIN:
        raise UserError(
            f"{name} has one resolution and so no stages: features_only is for the pyramids, forward_features gives "
            "its grid"
        )
    return build_model_with_cfg(
        network_of,
        name,
        pretrained,
        feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 2, 3)},
        row=ROWS[name],
        **options,
    )


def _register(name: str) -> None:
    """Make the function that timm calls, under the name and the module that timm reads from it."""

    def create(pretrained: bool = False, **options):
        return _create(name, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Return the network of the experiment {ROWS[name]}."
    register_model(create)


for _name in ROWS:
    if not timm.is_model(_name):  # a name that timm has taken stays timm's
        _register(_name)
