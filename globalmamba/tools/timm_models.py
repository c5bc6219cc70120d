"""The networks under timm's names, registered by ``import globalmamba.tools.timm_models``.

Each is the model of an ImageNet-1K experiment: the YAML is the whole truth. ``num_classes``, ``img_size``, ``in_chans``
and ``drop_path_rate`` change it as in timm, ``features_only=True`` gives the stage outputs of a pyramid. There are
no pretrained weights; ``globalmamba.tools.convert`` reads the official ones of the bases.
"""

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from globalmamba.model import CHANNELS, build_network
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


def _settings(name: str) -> dict:
    plain = "vim" in name
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (CHANNELS, 224, 224),
        "fixed_input_size": plain,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "tokens.proj" if plain else "patch_embed.0",
        "classifier": "head" if plain else "classifier.head",
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


def _create(name: str, pretrained: bool, **options):
    if options.get("features_only") and default_cfgs[name].default.fixed_input_size:
        raise UserError(f"{name} has one resolution and so no stages: features_only is for the pyramids")
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
