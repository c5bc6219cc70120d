"""Training as every paper does it: its batches, Lightning's loop, resumed where it stopped, the cost of its steps."""

import os
import signal
import time
from itertools import chain, repeat
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from shared.data.sampler import KeyedBatchSampler
from shared.errors import RunInterrupted, UserError
from shared.training.checkpoints import AtomicCheckpointIO, Resumption
from shared.training.checks import autocast_context, cluster_environment, device_of, ranks_of, synchronise
from shared.training.guard import GuardedModule


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


def fit(cfg, module: GuardedModule, data, folder: Path, callbacks=(), **options) -> pl.Trainer:
    """Train for all steps of ``data.sampler``, continuing from ``folder/last.ckpt`` where there is one.

    The callbacks stand before the one that saves checkpoints, which then hold their state. ``options``: more of
    Lightning's Trainer, such as how gradients are clipped. Raises RunInterrupted where a signal ends the training, and
    UserError, on every rank, where it diverged.
    """
    checkpoint = module.checkpoint = folder / "last.ckpt"
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
    module.require_convergence(trainer.optimizers[0])
    trainer.save_checkpoint(checkpoint)
    return trainer


def seconds_of_training(cfg, module: pl.LightningModule, data) -> float:
    """Estimate the seconds of all steps from three timed ones, which change the module.

    Of a batch that several devices share, one device's part is loaded, in this process, and computed; workers load as
    many batches at a time as there are of them, while others are computed. ``module.loss`` takes a batch and the
    number of the step.
    """
    data.sampler.world_size = max(ranks_of(cfg.trainer), 1)
    # Anew every time, for a short training has fewer batches than are timed.
    batches = chain.from_iterable(repeat(DataLoader(data.batches, sampler=data.sampler, batch_size=None)))
    optimizer, device = module.configure_optimizers()["optimizer"], device_of(cfg)
    module.to(device)
    times = []
    for _ in range(4):  # the first one warms up
        begin = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        with autocast_context(cfg, device):
            loss = module.loss(move_data_to_device(batch, device), 0)
        loss.backward()
        optimizer.step()
        synchronise(device)
        loading, computing = loaded - begin, time.perf_counter() - loaded
        times.append(max(loading / data.workers, computing) if data.workers else loading + computing)
    return data.sampler.steps * median(times[1:])
