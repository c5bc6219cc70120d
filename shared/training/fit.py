"""Training as every paper does it: its batches, Lightning's loop, resumed where it stopped, the cost of its steps."""

import os
import signal
import time
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from shared.data.sampler import KeyedBatchSampler
from shared.errors import RunInterrupted, UserError
from shared.training.checkpoints import AtomicCheckpointIO, Resumption
from shared.training.checks import autocast_context, cluster_environment, device_of, ranks_of, synchronise


class TrainingData(pl.LightningDataModule):
    """The training batches; one sampler that resumption can move."""

    def __init__(self, batches, sampler: KeyedBatchSampler, mixes: bool, workers: int = 0):
        super().__init__()
        self.batches, self.sampler, self.mixes, self.workers = batches, sampler, mixes, workers

    def require_equal_pairs(self, ranks: int) -> None:
        """Raise UserError where ``ranks`` would mix other pairs of images than one process does."""
        size = self.sampler.batch_size
        if self.mixes and ranks > 1 and size % (2 * ranks):
            raise UserError(
                f"a batch of {size} mixed images cannot be shared by {ranks} ranks: set optim.batch_size to a "
                f"multiple of {2 * ranks}"
            )

    def setup(self, stage: str) -> None:
        self.require_equal_pairs(self.trainer.world_size)
        self.sampler.share(self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader:
        # A generator of its own: a loader otherwise draws from torch's global one at every epoch.
        return DataLoader(
            self.batches,
            sampler=self.sampler,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),
        )


def fit(cfg, module: pl.LightningModule, data, folder: Path, callbacks=(), **options) -> pl.Trainer:
    """Train for all steps of ``data.sampler``, continuing from ``folder/last.ckpt`` where there is one.

    The callbacks stand before the one that saves checkpoints, which then hold their state. ``options``: more of
    Lightning's Trainer, such as how gradients are clipped. Raises RunInterrupted where a signal ends the training.
    """
    checkpoint = folder / "last.ckpt"
    trainer = pl.Trainer(
        max_steps=data.sampler.steps,
        max_epochs=-1,
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=cfg.trainer.strategy,
        precision=cfg.optim.precision,
        logger=[instantiate(logger, save_dir=folder) for logger in cfg.logger.values() if logger],
        callbacks=[*callbacks, Resumption(checkpoint, cfg.output.checkpoint_every, data.sampler)],
        plugins=[AtomicCheckpointIO(), cluster_environment(cfg.trainer)],
        default_root_dir=folder,  # Lightning looks there for checkpoints of its own
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=os.isatty(2),
        use_distributed_sampler=False,
        log_every_n_steps=10,
        **options,
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None)
    except SystemExit as stop:
        # Lightning's answer to Ctrl-C, and to SIGTERM, which a shell would take for success.
        number = signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT
        raise RunInterrupted(128 + number) from stop
    trainer.save_checkpoint(checkpoint)
    return trainer


def seconds_of_training(cfg, module: pl.LightningModule, data) -> float:
    """Estimate the seconds of all steps from three timed ones, which change the module.

    Of a batch that several devices share, one device's part is loaded and timed. ``module.loss`` takes a batch, a
    dictionary of tensors, and the number of the step.
    """
    data.sampler.world_size = max(ranks_of(cfg.trainer), 1)
    optimizer, device = module.configure_optimizers()["optimizer"], device_of(cfg)
    module.to(device)
    times = []
    for batch in islice(cycle(data.train_dataloader()), 4):  # the first one warms up
        begin = time.perf_counter()
        with autocast_context(cfg, device):
            loss = module.loss({name: value.to(device) for name, value in batch.items()}, 0)
        loss.backward()
        optimizer.step()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return data.sampler.steps * median(times[1:])
