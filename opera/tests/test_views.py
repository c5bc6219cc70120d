"""The views: torchvision's operations image by image, and draws that nothing but their key changes."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torchvision.transforms import InterpolationMode

from opera import views
from opera.views import Views, ViewsConfig
from shared.errors import UserError

CLOSE = {"rtol": 0, "atol": 2e-5}  # float32, values in [0, 1]
MOCO = ViewsConfig(
    image_size=24,
    scale=[0.2, 1.0],
    ratio=[0.75, 1.3333],
    flip=0.5,
    jitter=[0.4, 0.4, 0.2, 0.1],
    jitter_probability=0.8,
    grey=0.2,
    blur=[1.0, 0.1],
    blur_sigma=[0.1, 2.0],
    solarize=[0.0, 0.2],
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
)


def pictures(count: int, height: int = 40, width: int = 36) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), generator=draw, dtype=torch.uint8)


def numbers(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


@pytest.mark.parametrize("size", [8, 24, 64])
def test_crops_are_torchvisions(size):
    images = pictures(4)
    boxes = np.array([[0, 0, 40, 36], [3, 5, 10, 30], [20, 1, 17, 9], [39, 35, 1, 1]])
    actual = views.crop(images, boxes, size)
    for image, box, one in zip(images, boxes.tolist(), actual, strict=True):
        wanted = reference.resized_crop(
            image.float() / 255, *box, [size, size], InterpolationMode.BILINEAR, antialias=True
        )
        torch.testing.assert_close(one, wanted, **CLOSE)


@pytest.mark.parametrize(
    "ours, theirs, factors",
    [
        (views.brightness, reference.adjust_brightness, [0.6, 1.0, 1.4]),
        (views.contrast, reference.adjust_contrast, [0.6, 1.0, 1.4]),
        (views.saturation, reference.adjust_saturation, [0.8, 0.0, 1.9]),
        (views.hue, reference.adjust_hue, [-0.1, 0.0, 0.5]),
    ],
)
def test_colours_are_torchvisions(ours, theirs, factors):
    images = pictures(3).float() / 255
    images[0, :, :4] = 0.3  # grey pixels have no hue
    for image, factor, one in zip(images, factors, ours(images, numbers(factors)), strict=True):
        torch.testing.assert_close(one, theirs(image, factor), **CLOSE)


def test_grey_is_torchvisions():
    images = pictures(2).float() / 255
    torch.testing.assert_close(views.grey(images), reference.rgb_to_grayscale(images, 3), **CLOSE)


def test_blurs_are_torchvisions():
    images, sigma = pictures(3, 32, 32).float() / 255, np.array([0.1, 1.0, 2.0])
    for image, one, actual in zip(images, sigma.tolist(), views.blurred(images, sigma, 2.0), strict=True):
        torch.testing.assert_close(actual, reference.gaussian_blur(image, [13, 13], [one, one]), **CLOSE)


def test_a_view_is_a_function_of_its_key_alone():
    make, images, index = Views(MOCO), pictures(6), np.arange(6)
    whole = make(images, (0, 2, index), 0)
    assert whole.shape == (6, 3, 24, 24) and whole.dtype == torch.float32
    some = np.array([4, 1])
    torch.testing.assert_close(make(images[some], (0, 2, index[some]), 0), whole[some], **CLOSE)
    for other in ((1, 2, index), (0, 3, index)):
        assert not make(images, other, 0).allclose(whole)
    assert not make(images, (0, 2, index), 1).allclose(whole)


def test_a_view_is_what_torchvision_makes_of_the_same_numbers():
    """Without colours, blur and solarize: a crop, a flip, the normalisation."""
    plain = ViewsConfig(**{**vars(MOCO), "jitter": [0.0] * 4, "grey": 0.0, "blur": [0.0, 0.0], "flip": 1.0})
    make, images, index = Views(plain), pictures(3), np.arange(3)
    boxes = make.boxes([40] * 3, [36] * 3, (0, 0, index, 0)).tolist()
    for image, box, one in zip(images, boxes, make(images, (0, 0, index), 0), strict=True):
        part = reference.resized_crop(image.float() / 255, *box, [24, 24], antialias=True)
        wanted = reference.normalize(reference.horizontal_flip(part), MOCO.mean, MOCO.std)
        torch.testing.assert_close(one, wanted, rtol=0, atol=2e-4)


def shares(make: Views, view: int, **changes) -> float:
    """Return how often images are changed by what is switched on."""
    images, index = pictures(1).expand(400, -1, -1, -1), np.arange(400)
    quiet = {"jitter": [0.0] * 4, "grey": 0.0, "blur": [0.0, 0.0], "solarize": [0.0, 0.0], "flip": 0.0}
    quiet |= {"scale": [1.0, 1.0], "ratio": [0.9, 0.9]}
    before = Views(ViewsConfig(**{**vars(MOCO), **quiet}))(images, (0, 0, index), view)
    after = Views(ViewsConfig(**{**vars(MOCO), **quiet, **changes}))(images, (0, 0, index), view)
    return float(((before - after).abs().amax((1, 2, 3)) > 1e-3).float().mean())


@pytest.mark.parametrize(
    "changes, view, share",
    [
        ({"flip": 0.5}, 0, 0.5),
        ({"grey": 0.2}, 0, 0.2),
        ({"jitter": [0.4, 0.4, 0.2, 0.1]}, 0, 0.8),
        ({"solarize": [0.0, 0.2]}, 1, 0.2),
        ({"solarize": [0.0, 0.2]}, 0, 0.0),
        ({"blur": [1.0, 0.1], "blur_sigma": [1.0, 2.0]}, 0, 1.0),
        ({"blur": [1.0, 0.1], "blur_sigma": [1.0, 2.0]}, 1, 0.1),
    ],
)
def test_every_change_is_as_frequent_as_its_probability(changes, view, share):
    assert shares(Views(MOCO), view, **changes) == pytest.approx(share, abs=0.07)


def test_colours_change_in_every_order():
    images, index = pictures(1).expand(300, -1, -1, -1), np.arange(300)
    order = views.keyed_uniform(views.ORDER, 0, 0, index[:, None], 0, np.arange(4)).argsort(1)
    assert len({tuple(one) for one in order.tolist()}) == 24
    assert Views(MOCO)(images, (0, 0, index), 0).isfinite().all()


@pytest.mark.parametrize(
    "field, value", [("scale", [0.0, 1.0]), ("jitter", [0.4, 0.4, 0.2, 0.6]), ("blur", [0.5]), ("std", [0, 1, 1])]
)
def test_values_that_cannot_be_used_are_one_sentence(field, value):
    with pytest.raises(UserError, match=f"views.{field} = .* cannot be used: set"):
        Views(ViewsConfig(**{**vars(MOCO), field: value}))
