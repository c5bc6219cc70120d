"""Every row of detection and segmentation composes, builds and takes two steps at toy size, and reads real images.

At toy size a row keeps its base file, its recipe and its kind of network; images are drawn, networks and heads are
narrow. The transforms of the recipe itself are run on one drawn image.
"""

import importlib

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from shared.claims.compose import compose, dense_rows, row_config
from shared.claims.protocol import load_paper, paper_names
from shared.dense import libraries
from shared.dense.config import GROUP
from shared.environment import repository_root
from shared.training.config import hash_of

ROOT = repository_root()
CLAIMED = 38
installed = pytest.mark.skipif(
    bool(libraries.missing_modules()), reason="the extra for detection and segmentation is not here: make setup-dense"
)
TOY = {
    "dense.weights": "untrained",
    "dense.drop_path": 0.0,
    "dense.optim.batch_size": 4,
    "paths.data_root": None,
    "data.image_size": 64,
}
# Of a plain network: 8 x 8 tokens; the maps are those of its four blocks.
PLAIN = {"model.network.patch_size": 8, "model.network.embed_dim": 12, "model.network.depth": 4}
HEADS = {
    "detection": {
        "model.neck.out_channels": 16,
        "model.rpn_head.in_channels": 16,
        "model.rpn_head.feat_channels": 16,
        "model.roi_head.bbox_roi_extractor.out_channels": 16,
        "model.roi_head.mask_roi_extractor.out_channels": 16,
        "model.roi_head.bbox_head": {"in_channels": 16, "fc_out_channels": 16},
        "model.roi_head.mask_head": {"num_convs": 1, "in_channels": 16, "conv_out_channels": 16},
        "model.train_cfg.rpn_proposal": {"nms_pre": 50, "max_per_img": 20},
        "model.train_cfg.rcnn.sampler.num": 16,
    },
    "segmentation": {
        "model.data_preprocessor.size": [64, 64],  # to which images are filled up: those that are drawn
        "model.decode_head.channels": 16,
        "model.auxiliary_head.channels": 16,
    },
}
SMALL_IMAGES = {"detection": "shapes", "segmentation": "shapes-labels"}  # groups with the transforms of drawn images


def all_rows() -> list[tuple[str, str]]:
    """Return paper and row of every row of detection and segmentation, the demo's too."""
    papers = [load_paper(ROOT, name) for name in paper_names(ROOT)]
    demo = [(paper.name, row.Row) for paper in papers for row in paper.ledger.Demo if "dense" in row.Compose]
    return [(paper.name, row) for paper in papers for row in dense_rows(paper)] + demo


ROWS = all_rows()


def pipelines(kind: str) -> dict:
    """Return the transforms of drawn images, as changes."""
    row = {"detection": "gm-shapes", "segmentation": "gm-shapes-labels"}[kind]
    changes = row_config("globalmamba", row, 0).dense.changes
    return {key: value for key, value in changes.items() if key.endswith("pipeline")}


def toy(paper: str, row: str, folder) -> DictConfig:
    """Return a row at toy size."""
    cfg = row_config(paper, row, 0).copy()
    importlib.import_module(f"{paper}.tests.contract").CONTRACT.toy(cfg)
    values = dict(TOY)
    if paper == "opera":
        is_vit = row_config(paper, row, 0).model.backbone.startswith("vit")
        values |= {"model.backbone": "vit-tiny" if is_vit else "resnet-small", "dense.weights": None}
        if is_vit:
            values["dense.blocks"] = [2, 3, 4, 5]
    elif "dims" not in cfg.model.network:
        values |= PLAIN | {"dense.blocks": [0, 1, 2, 3]}
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    kind = cfg.dense.kind
    cfg.dense.data.source = SMALL_IMAGES[kind]
    cfg.dense.optim.group = 2 if cfg.dense.optim.group else None
    cfg.dense.optim.batch_size = 4
    cfg.dense.changes = {**cfg.dense.changes, **HEADS[kind], **pipelines(kind)}
    cfg.paths.runs = str(folder)
    return cfg


def backbone(paper: str, cfg: DictConfig):
    if paper == "opera":
        from opera.backbones import build_backbone
        from opera.dense import backbone_of

        cfg.dense.dilated = False  # of blocks without a bottleneck there is none
        return backbone_of(cfg, build_backbone(cfg.model.backbone, cfg.data.image_size))
    return importlib.import_module(f"{paper}.backbone").build_backbone(cfg)


def test_all_claims_of_detection_and_segmentation_are_rows():
    ledgers = {paper: load_paper(ROOT, paper).ledger for paper in paper_names(ROOT)}
    claims = [(paper, model.Claim.Row) for paper, ledger in ledgers.items() for model in ledger.Models]
    assert len(set(claims) & set(ROWS)) == CLAIMED
    assert [
        model.Name for ledger in ledgers.values() for model in ledger.Models if model.Claim.Status == "blocked"
    ] == []


def without_baselines() -> list[tuple[str, str]]:
    """Return the rows but for baselines at full scale, whose networks and recipes those of claims are."""
    full = {(paper, row.Row) for paper in paper_names(ROOT) for row in load_paper(ROOT, paper).ledger.Full}
    return [case for case in ROWS if case not in full]


@pytest.mark.parametrize(("paper", "row"), ROWS)
def test_row_is_not_refused_by_its_own_check(paper, row):
    cfg = row_config(paper, row, 0).copy()
    cfg.trainer.accelerator = "cpu"
    importlib.import_module(f"{paper}.train").check(cfg)
    assert cfg.dense.optim.precision == "32-true"


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("paper", "row"), [("v2m", "v2m-coco-sstar-1x-ap"), ("opera", "opera-seg-r50-bs1024-pt150")])
def test_the_cost_of_a_row_on_eight_devices_is_estimated_by_one(paper, row, tmp_path):
    from shared.dense.run import seconds_of_run

    cfg = toy(paper, row, tmp_path)
    cfg.dense.optim.batch_size, cfg.trainer.devices = 16, 8
    assert 0 < seconds_of_run(cfg, backbone(paper, cfg)) < 10**7


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("paper", "row"), without_baselines())
def test_row_takes_two_steps_at_toy_size(paper, row, tmp_path):
    from shared.dense.run import prepare

    cfg = toy(paper, row, tmp_path)
    module, data = prepare(cfg, backbone(paper, cfg))
    module.train()
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]  # a warm-up's first steps are lost in float32
    batches = iter(data.train_dataloader())
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    for step in range(2):
        loss = module.loss(next(batches), step)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        # Without one, a parameter would stop a training on several devices.
        trained = {name: parameter for name, parameter in module.model.named_parameters() if parameter.requires_grad}
        assert [name for name, parameter in trained.items() if parameter.grad is None] == []
        optimizer.step()
    moved = {name for name, p in module.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved <= trained.keys() and len(moved) > 0.9 * len(trained)


def recipes() -> list[str]:
    """Return the choices of the group ``dense`` that take the transforms of their base file as they are."""
    files = sorted(GROUP.glob("*.yaml"))
    return [file.stem for file in files if "dataset.pipeline" not in file.read_text(encoding="utf-8")]


@installed
@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes())
def test_the_recipes_own_transforms_give_training_and_test_images(recipe, tmp_path):
    from shared.dense.data import DenseBatches, open_set, prepared
    from shared.dense.model import config_of, library_of

    cfg = compose("v2m", [f"dense={recipe}"])
    cfg.dense.data.source, cfg.paths.data_root = SMALL_IMAGES[cfg.dense.kind], None
    library = library_of(cfg.dense)
    config = config_of(library, cfg.dense, [8, 16, 32, 64])
    sample = DenseBatches(open_set(library, config, cfg, "train", tmp_path), 0).sample(0, 0)
    test = prepared(open_set(library, config, cfg, "test", tmp_path), 0)
    if cfg.dense.kind == "detection":
        assert len(sample["data_samples"].gt_instances) > 0 and min(test["inputs"].shape[1:]) == 800
    else:
        assert sample["inputs"].shape[1:] == sample["data_samples"].gt_sem_seg.data.shape[1:] == (512, 512)
        assert test["inputs"].shape[1:] == (512, 512)


@pytest.mark.parametrize(("paper", "row"), [case for case in ROWS if case[0] != "opera"])
def test_row_begins_with_the_weights_of_a_row_of_its_own_network(paper, row):
    cfg = row_config(paper, row, 0)
    if cfg.dense.weights == "untrained":
        assert cfg.dense.pretraining is None
        return
    first = row_config(paper, cfg.dense.pretraining, 0)
    drop_path = "drop_path"
    assert {**first.model.network, drop_path: None} == {**cfg.model.network, drop_path: None}
    assert first.scale.name == cfg.scale.name and first.dense is None
    cfg.dense, cfg.selection, cfg.variant = None, first.selection, first.variant
    assert hash_of(cfg) == hash_of(first)
