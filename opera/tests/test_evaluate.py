"""A checkpoint has the scores of its run, and one of something else is refused in one sentence."""

import pytest
import torch

from opera import train
from opera.evaluate import checkpoint_of, evaluate_checkpoint
from opera.tests.small import SMALL, small_config
from shared.claims.compose import compose, quoted
from shared.claims.protocol import Paper
from shared.data.images import load_image_set
from shared.environment import repository_root
from shared.errors import UserError
from shared.testing.applications import call_application
from shared.training.application import run_evaluation
from shared.training.config import run_folder

# The same arithmetic on the same images in the same batches.
SAME = 1e-12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a small run, its config, its two checkpoints and its metrics."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    cfg = small_config(folder)
    metrics = train.run(cfg, folder / "run")
    return cfg, checkpoint_of(cfg), folder / "run/digits/last.ckpt", metrics


def backbone_of(path, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a pre-training's backbone by MoCo-v3's names, which begin with ``prefix``."""
    state, ours = torch.load(path, weights_only=True)["state_dict"], "model.online.backbone."
    return {prefix + n.removeprefix(ours): value for n, value in state.items() if n.startswith(ours)}


def test_a_pretraining_has_the_neighbours_of_its_run(whole, tmp_path):
    cfg, path, _, metrics = whole
    scores = evaluate_checkpoint(cfg, path, tmp_path / "pictures")
    assert set(scores) == {"top1_knn", "n_test", "parameters", "steps_trained"}
    for name in ("top1_knn", "n_test", "parameters"):
        assert scores[name] == pytest.approx(metrics[name], abs=SAME)
    assert scores["steps_trained"] == 11 and not (tmp_path / "pictures").exists()


def test_another_task_takes_the_weights_of_the_pretraining_that_is_there(whole, tmp_path):
    cfg, path, _, metrics = whole
    other = cfg.copy()
    other.task.epochs = 1
    before = path.stat().st_mtime_ns, torch.load(path, weights_only=True)["state_dict"]
    scores = train.run(other, tmp_path)
    assert scores["top1_knn"] == metrics["top1_knn"] and scores["top1"] != metrics["top1"]
    assert scores["resumed"] == 1 and "pretrain_seconds" not in scores and metrics["pretrain_seconds"] > 0
    after = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, after[name]) for name, value in before[1].items())


def test_an_official_probe_is_scored_by_its_classifier(whole, tmp_path):
    cfg, _, path, metrics = whole
    state = torch.load(path, weights_only=True)["state_dict"]
    official = {
        "module." + name.removeprefix("model.").removeprefix("backbone.").replace("head.", "fc."): value
        for name, value in state.items()
    }
    torch.save({"state_dict": official}, tmp_path / "linear.pth.tar")
    scores = evaluate_checkpoint(cfg, tmp_path / "linear.pth.tar", tmp_path)
    assert scores == {name: metrics[name] for name in ("top1", "top5", "top1_knn", "n_test", "parameters")}


def test_a_probe_of_another_number_of_classes_is_scored_by_neighbours(whole, tmp_path):
    cfg, path, _, metrics = whole
    official = backbone_of(path, "module.")
    official |= {"module.fc.weight": torch.ones(7, 64), "module.fc.bias": torch.ones(7)}
    torch.save({"state_dict": official}, tmp_path / "linear.pth.tar")
    scores = evaluate_checkpoint(cfg, tmp_path / "linear.pth.tar", tmp_path)
    assert scores == {name: metrics[name] for name in ("top1_knn", "n_test", "parameters")}


def test_a_row_without_a_pretraining_has_the_checkpoint_of_its_first_task(whole, tmp_path):
    cfg = small_config(tmp_path, "task.weights=untrained", "task.epochs=1")
    folder = run_folder(cfg)
    metrics = train.run(cfg, folder)
    assert checkpoint_of(cfg) == folder / "digits/last.ckpt" != checkpoint_of(whole[0])
    assert evaluate_checkpoint(cfg, checkpoint_of(cfg), tmp_path)["top1"] == metrics["top1"]
    with pytest.raises(UserError, match="nothing.tar is missing"):
        checkpoint_of(small_config(tmp_path, "task.weights=nothing.tar"))


def test_a_task_without_neighbours_has_them_scored_all_the_same(whole, tmp_path):
    cfg, path, _, metrics = whole
    without = cfg.copy()
    without.task.neighbours = None
    assert evaluate_checkpoint(without, path, tmp_path)["top1_knn"] == metrics["top1_knn"]  # 20 either way


def test_a_file_in_the_form_of_moco_v3_is_scored_by_neighbours(whole, tmp_path):
    cfg, path, _, metrics = whole
    official = backbone_of(path, "module.base_encoder.")
    torch.save({"state_dict": official}, tmp_path / "moco.pth.tar")
    scores = evaluate_checkpoint(cfg, tmp_path / "moco.pth.tar", tmp_path)
    assert scores == {name: metrics[name] for name in ("top1_knn", "n_test", "parameters")}


def test_a_classifier_has_the_accuracy_of_its_run(whole, tmp_path):
    cfg, _, path, metrics = whole
    scores = evaluate_checkpoint(cfg, path, tmp_path)
    assert set(scores) == {"top1", "top5", "n_test", "parameters", "steps_trained"}
    for name in ("top1", "top5", "n_test", "parameters"):
        assert scores[name] == pytest.approx(metrics[name], abs=SAME)
    assert scores["steps_trained"] == 22  # two epochs
    elsewhere = tmp_path / "moved.ckpt"
    elsewhere.write_bytes(path.read_bytes())
    assert evaluate_checkpoint(cfg, elsewhere, tmp_path) == scores


def test_every_set_of_the_task_is_scored_by_the_names_of_a_run(whole, tmp_path, monkeypatch):
    cfg, path, tuned, metrics = whole

    def half_of_the_digits(name, split, data_root):
        images = load_image_set("digits", split, data_root)
        if name == "half" and split == "test":
            images.labels, images.pixels = images.labels[::2], images.pixels[::2]
        return images

    for module in ("opera.evaluate", "opera.train", "opera.tuning"):
        monkeypatch.setattr(f"{module}.load_classification_set", half_of_the_digits)
    both = cfg.copy()
    both.task.sets = ["digits", "half"]
    scores = evaluate_checkpoint(both, path, tmp_path)
    assert scores["top1_knn"] == metrics["top1_knn"] and (scores["n_test"], scores["n_test_half"]) == (359, 180)
    assert 0.5 < scores["top1_knn_half"] <= 1
    # The folder tells which one a classifier was tuned on; their classes would not.
    assert evaluate_checkpoint(both, tuned, tmp_path)["top1"] == metrics["top1"]
    half = tmp_path / "half/last.ckpt"
    half.parent.mkdir()
    half.write_bytes(tuned.read_bytes())
    assert set(evaluate_checkpoint(both, half, tmp_path)) >= {"top1_half", "n_test_half"}
    (tmp_path / "last.ckpt").write_bytes(tuned.read_bytes())
    with pytest.raises(UserError, match=r"10 classes apart, .* digits 10, half 10; say which one .* task.sets="):
        evaluate_checkpoint(both, tmp_path / "last.ckpt", tmp_path)


def test_the_command_prints_the_scores(whole):
    cfg, path, _, metrics = whole
    paper = Paper("opera", repository_root())
    ended = call_application(paper, "evaluate", "+experiment=digits-opera", f"ckpt={quoted(str(path))}", *SMALL)
    assert ended.code == 0, ended.err
    assert f"{metrics['top1_knn'] * 100:.2f}" in ended.out and str(path) in ended.out


@pytest.mark.parametrize(
    ("which", "overrides", "words"),
    [
        (1, ["objective.arrangement=instance"], "does not fit row default"),
        (1, ["objective.arrangement=backbone"], "does not fit row default"),
        (1, ["model.backbone=resnet-small"], "does not fit row default"),
        (2, ["model.backbone=resnet-small"], "does not fit row default"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_in_one_sentence(whole, tmp_path, which, overrides, words):
    with pytest.raises(UserError, match=words) as error:
        evaluate_checkpoint(small_config(tmp_path, *overrides), whole[which], tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task=dense", "task.kind=dense and dense=null: set"),
        ("optim.precision=16-mixed", "optim.precision=16-mixed is not supported"),
    ],
)
def test_what_is_not_trained_is_not_scored(whole, tmp_path, capsys, override, words):
    cfg = compose("opera", [*SMALL, f"ckpt={whole[1]}", f"out={tmp_path / 'out'}", override], "evaluate")
    with pytest.raises(SystemExit) as stop:
        run_evaluation(cfg, evaluate_checkpoint, train.check, checkpoint_of)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_classifier_of_other_classes_is_told_so(whole, tmp_path):
    cfg, _, path, _ = whole
    content = torch.load(path, weights_only=True)
    for name in ("model.head.weight", "model.head.bias"):
        content["state_dict"][name] = content["state_dict"][name][:7]
    torch.save(content, tmp_path / "seven.ckpt")
    with pytest.raises(UserError, match="tells 7 classes apart, and the sets of row default have: digits 10"):
        evaluate_checkpoint(cfg, tmp_path / "seven.ckpt", tmp_path)


def test_a_damaged_a_missing_and_a_strange_file_are_told_in_one_sentence(whole, tmp_path):
    cfg, path = whole[:2]
    with pytest.raises(UserError, match="is missing"):
        evaluate_checkpoint(cfg, tmp_path / "absent.ckpt", tmp_path)
    (tmp_path / "damaged.ckpt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        evaluate_checkpoint(cfg, tmp_path / "damaged.ckpt", tmp_path)
    torch.save({"state_dict": {"model.weight": torch.ones(2)}, "global_step": 1}, tmp_path / "strange.ckpt")
    with pytest.raises(UserError, match="neither a pre-training nor a tuned classifier"):
        evaluate_checkpoint(cfg, tmp_path / "strange.ckpt", tmp_path)
