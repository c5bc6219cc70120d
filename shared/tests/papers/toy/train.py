"""One run of the toy paper."""

import hydra
import torch
from torch.nn import functional as F

from shared.data.images import load_image_set
from shared.data.sampler import KeyedBatchSampler
from shared.training.application import command, run_job
from shared.training.fit import TrainingData, fit, seconds_of_training
from shared.training.guard import GuardedModule
from shared.training.ranks import world_size

from .config import CONFIGS
from .evaluate import network_input, score
from .model import build_model, count


class ToyModule(GuardedModule):
    def __init__(self, cfg):
        super().__init__()
        self.model, self.lr, self.batch_size = build_model(cfg), cfg.optim.lr, cfg.optim.batch_size

    def loss(self, batch, step):
        logits = self.model(batch["images"].to(self.model[2].weight.dtype))
        # The sum over the ranks by their common count; DistributedDataParallel averages, which this undoes.
        return F.cross_entropy(logits, batch["labels"], reduction="sum") * world_size() / self.batch_size

    def training_step(self, batch, batch_idx):
        self.last_loss = loss = self.loss(batch, batch_idx)
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self):
        return {"optimizer": torch.optim.AdamW(self.parameters(), self.lr)}


class Batches:
    def __init__(self, images):
        self.images = images

    def __getitem__(self, batch):  # (epoch, samples)
        return dict(zip(("images", "labels"), network_input(self.images, batch[1]), strict=True))


def prepare(cfg):
    images = load_image_set(cfg.data.manifest, "train", cfg.paths.data_root)
    sampler = KeyedBatchSampler(len(images), cfg.optim.batch_size, cfg.seed, cfg.scale.steps)
    torch.manual_seed(cfg.seed)
    return ToyModule(cfg), TrainingData(Batches(images), sampler, mixes=False)


def run(cfg, folder):
    module, data = prepare(cfg)
    trainer = fit(cfg, module, data, folder)
    metrics = count(cfg) | module.step_counts()
    return score(cfg, module.model) | metrics if trainer.is_global_zero else None


def seconds_of_run(cfg) -> float:
    return seconds_of_training(cfg, *prepare(cfg))


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg):
    return run_job(cfg, run)


if __name__ == "__main__":
    # Under its own name: a launcher that sends jobs to processes would otherwise copy all of this module to them.
    from .train import main

    main()
