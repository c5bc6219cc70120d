"""A backbone leaves for timm, torchvision and OpenMMLab with its features, and comes in from MoCo-v3's own files."""

import hashlib
import math

import pytest
import timm
import torch
import torchvision
from torch import nn

from opera import train
from opera.backbones import build_backbone, resnet_small
from opera.moco_checkpoints import load_moco_v3
from opera.tests.small import small_config
from opera.tools import export
from shared.errors import UserError
from shared.training.fit import fit

# float64 through a few layers, sums in another order
EXACT = 1e-9


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network weights and statistics of which none is neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            spread = math.sqrt(6 / value[0].numel()) if value.ndim > 1 else 0.2
            offset = 1.0 if value.ndim == 1 and name.endswith(("weight", "running_var")) else 0.0
            value.copy_(offset + spread * (2 * torch.rand(value.shape, generator=generator) - 1))
    return network


def saved_backbone(path, name: str, size: int, prefix: str = "model.online.backbone.") -> nn.Module:
    """Save a backbone as a pre-training does, with the other networks, and return it in float64."""
    backbone = randomised(build_backbone(name, size))
    state = {prefix + key: value for key, value in backbone.state_dict().items()}
    state |= {"model.online.projector.0.weight": torch.ones(2), "model.momentum.backbone.x": torch.ones(2)}
    torch.save({"state_dict": state, "global_step": 7}, path)
    return backbone.double().eval()


def images(size: int) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def assert_same_features(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.std() > 1e-3
    torch.testing.assert_close(actual, wanted, rtol=0, atol=EXACT * float(wanted.abs().max()))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """Return the path of a checkpoint of ResNet-50 and its backbone."""
    path = tmp_path_factory.mktemp("resnet") / "last.ckpt"
    return path, saved_backbone(path, "resnet50", 32)


# The forms torchvision and dense of a ResNet have the same tensors.
@pytest.mark.parametrize("form", ["timm", "dense", pytest.param("torchvision", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_resnet_loads_strictly_where_it_goes_and_computes_our_features(resnet, tmp_path, form):
    path, ours = resnet
    out = tmp_path / "out.pth"
    meta = export.export(path, form, out)
    content = torch.load(out, weights_only=True)
    assert content["meta"] == meta and meta["form"] == form and meta["steps_trained"] == 7
    assert meta["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert meta["row"] is meta["image_size"] is meta["mean"] is None  # nothing tells them
    if form == "timm":
        theirs = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(out)).double().eval()
    else:
        theirs = torchvision.models.resnet50()
        theirs.fc = nn.Identity()
        theirs.load_state_dict(content["state_dict"], strict=True)
        theirs.double().eval()
    assert_same_features(theirs(images(48)), ours(images(48)))
    assert all(value.is_contiguous() for value in content["state_dict"].values())
    assert list(tmp_path.iterdir()) == [out]


@torch.no_grad()
def test_a_vit_goes_to_timm_with_the_arguments_that_its_file_names(tmp_path):
    ours = saved_backbone(tmp_path / "last.ckpt", "vit-tiny", 24)
    meta = export.export(tmp_path / "last.ckpt", "timm", tmp_path / "out.pth")
    assert meta["backbone"] == "vit-tiny" and meta["image_size"] == 24
    described = meta["architecture"]
    theirs = timm.create_model(described["model"], **described["arguments"], checkpoint_path=str(tmp_path / "out.pth"))
    assert_same_features(theirs.double().eval()(images(24)), ours(images(24)))


def test_a_vit_goes_to_mmsegmentation_by_its_names_and_with_what_its_defaults_leave_out(tmp_path):
    saved_backbone(tmp_path / "last.ckpt", "vit-tiny", 8)
    meta = export.export(tmp_path / "last.ckpt", "dense", tmp_path / "out.pth")
    state = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    # Of mmsegmentation 1.2.2, VisionTransformer with final_norm and patch_bias.
    around = {"cls_token", "pos_embed", "ln1.weight", "ln1.bias"}
    around |= {"patch_embed.projection.weight", "patch_embed.projection.bias"}
    block = {f"attn.attn.{name}" for name in ("in_proj_weight", "in_proj_bias")}
    for name in ("ln1", "ln2", "attn.attn.out_proj", "ffn.layers.0.0", "ffn.layers.1"):
        block |= {f"{name}.weight", f"{name}.bias"}
    assert set(state) == around | {f"layers.{number}.{name}" for number in range(6) for name in block}
    arguments = meta["architecture"]["arguments"]
    assert arguments["final_norm"] and arguments["patch_bias"] and arguments["norm_cfg"]["eps"] == 1e-6
    assert (arguments["num_heads"], arguments["mlp_ratio"], arguments["img_size"]) == (3, 4, 8)


@pytest.mark.parametrize("form", ["timm", "dense"])
def test_moco_v3s_vit_s_is_described_with_twelve_heads(form):
    with torch.device("meta"):
        arguments = export.architecture("vit-small", build_backbone("vit-small", 224), form)["arguments"]
    assert arguments["num_heads"] == 12 and arguments["img_size"] == 224


@pytest.mark.parametrize(("form", "key", "value"), [
    ("timm", "num_heads", 6), ("dense", "num_heads", 6), ("dense", "norm_cfg", {"type": "LN", "eps": 1e-5}),
])  # fmt: skip
def test_nothing_is_written_that_would_compute_something_else(tmp_path, monkeypatch, form, key, value):
    saved_backbone(tmp_path / "last.ckpt", "vit-tiny", 8)
    right = export.architecture

    def wrong(*arguments):
        described = right(*arguments)
        described["arguments"][key] = value
        return described

    monkeypatch.setattr(export, "architecture", wrong)
    with pytest.raises(UserError, match="computes other features than ours"):
        export.export(tmp_path / "last.ckpt", form, tmp_path / "out.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_features_that_are_not_finite_are_not_handed_on(tmp_path):
    backbone = build_backbone("vit-tiny", 8)
    backbone.norm.bias.data[0] = torch.nan
    state = {f"model.online.backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="not finite"):
        export.export(tmp_path / "last.ckpt", "timm", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_the_command_exports_a_real_pretraining_and_overwrites_by_force_alone(tmp_path, caplog):
    overrides = ["model=vit-tiny", "data.train_images=20", "optim.batch_size=10"]
    cfg = small_config(tmp_path, *overrides)
    module, data = train.prepare(cfg)
    fit(cfg, module, data, tmp_path / "run")
    out = tmp_path / "out.pth"
    arguments = ["--ckpt", str(tmp_path / "run/last.ckpt"), "--form", "timm", "--out", str(out)]
    assert export.main(arguments) == 0
    content = torch.load(out, weights_only=True)
    online = module.model.online.backbone.state_dict()
    assert content["state_dict"].keys() == online.keys()
    assert all(torch.equal(content["state_dict"][name], value) for name, value in online.items())
    momentum = module.model.momentum.backbone.state_dict()
    assert not torch.equal(content["state_dict"]["norm.bias"], momentum["norm.bias"])
    out.write_bytes(b"kept")
    caplog.clear()
    assert export.main(arguments) == 2
    assert "is there already" in caplog.text and caplog.text.count("\n") == 1 and out.read_bytes() == b"kept"
    assert export.main([*arguments, "--force"]) == 0 and torch.load(out, weights_only=True)["state_dict"]


def test_a_wrong_command_is_one_sentence(tmp_path, caplog):
    assert export.main(["--form", "keras", "--ckpt", "a", "--out", str(tmp_path / "b")]) == 2
    (record,) = caplog.records
    assert "invalid choice: 'keras'" in record.message and record.message.endswith("--help")


def test_an_official_file_is_exported_too(tmp_path):
    moco_file(tmp_path / "moco.pth.tar", torchvision.models.resnet50(weights=None), "fc")
    meta = export.export(tmp_path / "moco.pth.tar", "torchvision", tmp_path / "out.pth")
    assert meta["backbone"] == "resnet50" and meta["steps_trained"] is None
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    network = torchvision.models.resnet50(weights=None)
    network.fc = torch.nn.Identity()
    network.load_state_dict(content["state_dict"])


def test_a_row_tells_image_size_and_normalisation_and_refuses_another_backbone(tmp_path):
    saved_backbone(tmp_path / "last.ckpt", "vit-tiny", 32)
    meta = export.export(tmp_path / "last.ckpt", "timm", tmp_path / "out.pth", row="cifar10-all-opera-vit")
    assert meta["row"] == "cifar10-all-opera-vit" and meta["image_size"] == 32
    assert meta["mean"] == [0.485, 0.456, 0.406] and meta["std"] == [0.229, 0.224, 0.225]
    with pytest.raises(UserError, match="does not fit row digits-opera"):
        export.export(tmp_path / "last.ckpt", "timm", tmp_path / "other.pth", row="digits-opera")
    with pytest.raises(UserError, match="unknown row 'no-such-row'"):
        export.export(tmp_path / "last.ckpt", "timm", tmp_path / "other.pth", row="no-such-row")
    assert not (tmp_path / "other.pth").exists()


@pytest.mark.parametrize(
    ("name", "size", "prefix", "form", "words"),
    [
        ("convnet-tiny", 8, "model.online.backbone.", "timm", "convnet-tiny is a network of our own"),
        ("resnet-small", 32, "model.online.backbone.", "dense", "resnet-small is a network of our own"),
        ("vit-tiny", 8, "model.online.backbone.", "torchvision", "vit-tiny has no form torchvision"),
        ("convnet-tiny", 8, "model.online.backbone.", "onnx", "form=onnx is unknown"),
        ("convnet-tiny", 8, "model.backbone.", "timm", "another network's checkpoint: give the last.ckpt"),
        ("convnet-tiny", 8, "model.online.backbone.more.", "timm", "holds none of the backbones resnet50"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_sentence(tmp_path, name, size, prefix, form, words):
    saved_backbone(tmp_path / "last.ckpt", name, size, prefix)
    with pytest.raises(UserError, match=words) as error:
        export.export(tmp_path / "last.ckpt", form, tmp_path / "out.pth")
    assert "\n" not in str(error.value) and not (tmp_path / "out.pth").exists()


def test_a_classifier_a_damaged_and_a_missing_file_are_told_in_one_sentence(tmp_path):
    path, out = tmp_path / "last.ckpt", tmp_path / "out.pth"
    state = {"model.backbone.conv1.weight": torch.ones(2), "model.head.weight": torch.ones(2)}
    torch.save({"state_dict": state, "global_step": 1}, path)
    with pytest.raises(UserError, match="a tuned classifier's checkpoint"):
        export.export(path, "timm", out)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="is damaged"):
        export.export(path, "timm", out)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        export.export(path, "timm", out)
    assert not out.exists()


def moco_file(path, encoder: nn.Module, end: str, kind: str = "pretraining", **more) -> dict:
    """Save a file as MoCo-v3's training does, of an encoder of timm or torchvision without its last layer."""
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    own = {name: value for name, value in state.items() if not name.startswith(f"{end}.")}
    if kind == "probe":
        state = {f"module.{name}": value for name, value in own.items()}
        state |= {f"module.{end}.weight": torch.ones(5, 4), f"module.{end}.bias": torch.ones(5)}
    else:
        state = {f"module.momentum_encoder.{name}": value for name, value in own.items()}
        if kind == "pretraining":
            state |= {f"module.base_encoder.{name}": value for name, value in own.items()}
            others = randomised(encoder, seed=9).state_dict()
            state |= {f"module.momentum_encoder.{name}": others[name] for name in own}
        projector = {"0.weight": torch.ones(4, 4), "1.running_mean": torch.ones(4)}
        state |= {f"module.base_encoder.{end}.{name}": value for name, value in projector.items() if kind != "momentum"}
        state |= {f"module.predictor.{name}": value for name, value in projector.items()}
    state = {name: value.clone() for name, value in state.items()}
    torch.save({"epoch": 300, "arch": "any", "state_dict": state, "optimizer": {"state": {}}, **more}, path)
    return state


def timm_vit(**sizes) -> nn.Module:
    """timm's ViT with a classifier, of the shape of our vit-tiny at 32 pixels or of ``sizes``."""
    tiny = {"embed_dim": 192, "depth": 6, "num_heads": 3, "patch_size": 4, "img_size": 32}
    return timm.create_model("vit_small_patch16_224", num_classes=5, **(tiny | sizes))


VIT_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 12, "patch_size": 16, "img_size": 224}


@pytest.mark.parametrize(
    ("name", "size", "kind", "encoder"),
    [
        pytest.param("resnet50", 224, "pretraining", "base_encoder", marks=pytest.mark.slow),
        pytest.param("vit-small", 224, "pretraining", "base_encoder", marks=pytest.mark.slow),
        ("resnet-small", 32, "pretraining", "base_encoder"),
        ("vit-tiny", 32, "pretraining", "base_encoder"),
        ("vit-tiny", 32, "momentum", "momentum_encoder"),
        ("vit-tiny", 32, "probe", ""),
    ],
)
@torch.no_grad()
def test_moco_v3s_encoder_is_taken_without_what_ends_it(tmp_path, name, size, kind, encoder):
    backbone, end = build_backbone(name, size), "head" if name.startswith("vit") else "fc"
    if end == "head":
        theirs = timm_vit(**(VIT_SMALL if size == 224 else {}))
    else:
        theirs = torchvision.models.resnet50() if name == "resnet50" else resnet_small()
        theirs.fc = nn.Linear(backbone.num_features, 5)
    wanted = {key: value.clone() for key, value in randomised(theirs, seed=3).state_dict().items()}
    state = moco_file(tmp_path / "moco.pth.tar", theirs, end, kind, best_acc1=torch.tensor(70.5))
    loaded = load_moco_v3(backbone, tmp_path / "moco.pth.tar")
    assert loaded.encoder == encoder and sorted([*loaded.used, *loaded.left_out]) == sorted(state)
    assert len(loaded.used) == len(wanted) - 2 and not any(f".{end}." in key for key in loaded.used)
    theirs.load_state_dict(wanted)
    setattr(theirs, end, nn.Identity())
    batch = images(size if end == "head" else 64)[:2]
    assert_same_features(backbone.double().eval()(batch), theirs.double().eval()(batch))
    if end == "head":  # positions stay fixed, and are the file's
        assert not backbone.pos_embed.requires_grad
        assert torch.equal(backbone.pos_embed.float(), wanted["pos_embed"])


def test_what_was_taken_is_logged(tmp_path, caplog):
    moco_file(tmp_path / "moco.pth.tar", timm_vit(), "head")
    with caplog.at_level("INFO"):
        load_moco_v3(build_backbone("vit-tiny", 32), tmp_path / "moco.pth.tar")
    assert "78 tensors of base_encoder loaded" in caplog.text
    assert "module.base_encoder, module.momentum_encoder, module.predictor" in caplog.text


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "is missing: give an official file"),
        (lambda path: path.write_bytes(b"PK no archive"), "is damaged or no checkpoint"),
        (lambda path: torch.save({"model": {}}, path), "holds no state_dict of tensors"),
        (lambda path: torch.save({"state_dict": {"module.conv1.weight": 3}}, path), "holds no state_dict of tensors"),
        (lambda path: torch.save({"state_dict": {"conv1.weight": torch.ones(2)}}, path), "no tensors named module"),
        (lambda path: moco_file(path, timm_vit(), "head"), "holds a ViT of another architecture"),
        (lambda path: moco_file(path, torchvision.models.resnet18(), "fc"), "holds a ResNet of another"),
    ],
)
def test_a_file_that_does_not_fit_is_told_in_one_sentence_and_changes_nothing(tmp_path, write, words):
    backbone = build_backbone("resnet-small", 32)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    write(tmp_path / "moco.pth.tar")
    with pytest.raises(UserError, match=words) as error:
        load_moco_v3(backbone, tmp_path / "moco.pth.tar")
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_a_vit_of_another_image_size_is_told_which_one_the_file_has(tmp_path):
    moco_file(tmp_path / "moco.pth.tar", timm_vit(img_size=48), "head")
    with pytest.raises(UserError, match="has 144 patches and the backbone 64: set data.image_size"):
        load_moco_v3(build_backbone("vit-tiny", 32), tmp_path / "moco.pth.tar")
