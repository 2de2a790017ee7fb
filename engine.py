"""Preprocess a batch, train on it, and evaluate on it."""
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed

from errors import TrainingFault
from precision import ApexScaler, NativeScaler
from processes import all_reduce_, gather_from_ranks, get_rank, get_world_size
from utils import Progress

MAX_OVERFLOWS = 50  # Stop after this many halvings of the loss scale in a row: the loss itself is at fault.


class Preprocessor:
    """Move a uint8 batch to the device, normalize it, erase and mix.

    Args:
        device: device of the model.
        mixup: timm's Mixup, which makes soft targets.
        erasing: timm's RandomErasing on this device.
        mean, std: per channel, of images in [0, 1].
    """

    def __init__(
            self, device: torch.device, mixup: Mixup | None = None, erasing: RandomErasing | None = None,
            mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN, std: tuple[float, ...] = IMAGENET_DEFAULT_STD):
        self.device = device
        self.mixup = mixup
        self.erasing = erasing
        self.mean = torch.tensor(mean, device=device) * 255
        self.std = torch.tensor(std, device=device) * 255
        self.on_first_batch: Callable | None = None  # Called once, with the first preprocessed batch.

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Preprocess uint8 images (B, 3, H, W) and class indices (B,).

        Returns:
            Images (B, 3, H, W), float32, in channels-last memory; targets (B,), or (B, classes) after mixup.
        """
        is_cuda = self.device.type == 'cuda'  # Copy synchronously on mps, where host memory could be reused too early.
        images, targets = (tensor.to(self.device, non_blocking=is_cuda) for tensor in (images, targets))
        images = self.normalize(images)
        if self.erasing is not None:
            images = self.erasing(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if self.on_first_batch is not None:
            self.on_first_batch(images, targets)
            self.on_first_batch = None
        return images, targets

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return (image - mean) / std of uint8 images on the device, as float32."""
        B, C, H, W = images.shape
        # Normalize rows of W * C values. Broadcasting over channels would be slow, with an inner loop of three steps.
        rows = images.permute(0, 2, 3, 1).reshape(B, H, W * C)
        mean, std = self.mean.repeat(W), self.std.repeat(W)
        out = torch.empty_like(rows, dtype=torch.float32)
        # On a CPU, normalize one image at a time, so that the image stays in the cache.
        for uint8, result in zip(rows, out) if images.device.type == 'cpu' else [(rows, out)]:
            result.copy_(uint8).sub_(mean).div_(std)
        return out.view(B, H, W, C).permute(0, 3, 1, 2)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of running sums: float64, or float32 on Apple's GPUs (mps), which lack float64."""
    return torch.float32 if device.type == 'mps' else torch.float64


class Meters:
    """Keep the running sums of an epoch on the device, so that only reading them makes the host wait."""
    NAMES = ('loss', 'samples', 'skipped', 'skipped_in_a_row', 'overflows', 'overflows_in_a_row')
    PER_RANK = 2  # The first two sums differ between ranks, and total() adds them up. The others are equal.

    def __init__(self, device: torch.device, saved: list[list[float]] | None = None):
        """Start at 0, or at sums that gather() returned earlier, even if the number of ranks was different then."""
        self.sums = torch.zeros(len(self.NAMES), dtype=sum_dtype(device), device=device)
        if saved:
            if len(saved) == get_world_size():
                sums = saved[get_rank()]
            else:
                totals = [sum(values) * (get_rank() == 0) for values in zip(*saved)]
                sums = totals[:self.PER_RANK] + saved[0][self.PER_RANK:]
            self.sums.copy_(torch.tensor(sums, dtype=self.sums.dtype))

    def add(self, loss: torch.Tensor, samples: int, skipped: torch.Tensor, overflowed: torch.Tensor) -> None:
        """Add an optimizer step: its mean loss over `samples`, and 1. if it was skipped or overflowed, else 0."""
        self.sums[0] += torch.where(skipped > 0, 0., loss.to(self.sums.dtype) * samples)
        self.sums[1] += samples * (1 - skipped)
        for i, flag in ((2, skipped), (4, overflowed)):
            self.sums[i] += flag
            self.sums[i + 1] = (self.sums[i + 1] + 1) * flag

    def read(self) -> dict[str, float]:
        """Return the sums of this rank. This is a host sync."""
        return dict(zip(self.NAMES, self.sums.tolist()))

    def total(self) -> dict[str, float]:
        """Return the sums over all ranks. This is a host sync."""
        ranks = self.gather()
        sums = [sum(values) for values in zip(*ranks)]
        return dict(zip(self.NAMES, sums[:self.PER_RANK] + ranks[0][self.PER_RANK:]))

    def gather(self) -> list[list[float]]:
        """Return the sums of each rank, in rank order. This is a host sync."""
        return gather_from_ranks(self.sums.tolist())


@dataclass
class TrainStep:
    """Run one optimizer step on one or more batches.

    A step preprocesses the batch on the device, runs the forward pass under autocast, computes the loss and gradients,
    unscales, all-reduces a finiteness flag, clips, and updates weights and EMA. It does not wait for the device.

    Attributes:
        model: model, which may be compiled or wrapped in DistributedDataParallel.
        criterion: loss of outputs and targets, and of the teacher's logits (B, classes) if there is a teacher.
        optimizer: optimizer, fused if possible, since only a fused one can skip a step without a host sync.
        preprocess: moves, normalizes, erases and mixes a batch.
        scaler: NativeScaler or ApexScaler.
        autocast: returns the context manager of the forward pass.
        ema: timm's ModelEmaV3, and the module that it averages.
        clip_grad, clip_mode: `value` and `mode` of timm's dispatch_clip_grad.
        skip_nonfinite: skip steps whose loss or gradient is not finite, and discard their BatchNorm statistics.
        seed, rank: the random draws of a step depend only on (seed, epoch, step, rank).
        teacher: model that computes the teacher's logits for `criterion`.
        frozen: modules that stay in eval mode.
    """
    model: nn.Module
    criterion: Callable
    optimizer: torch.optim.Optimizer
    preprocess: Preprocessor
    scaler: NativeScaler | ApexScaler
    autocast: Callable
    ema: tuple[ModelEmaV3, nn.Module] | None = None
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    skip_nonfinite: bool = False
    seed: int = 0
    rank: int = 0
    teacher: nn.Module | None = None
    frozen: list[nn.Module] = field(default_factory=list)
    updates_per_epoch: int = 0  # for the EMA decay warm-up

    def __post_init__(self):
        self.statistics = [b for b in self.model.buffers() if b.is_floating_point()] if self.skip_nonfinite else []

    def __call__(self, batches: list[tuple[torch.Tensor, torch.Tensor]], epoch: int, step: int, meters: Meters) -> None:
        """Train on `batches` of (B, 3, H, W) uint8 images and (B,) class indices, as step `step` of `epoch`."""
        random_seed(int(np.random.SeedSequence((self.seed, epoch, step, self.rank)).generate_state(1)[0]))
        before = torch.cat([b.flatten() for b in self.statistics]) if self.statistics else None

        loss = torch.zeros((), device=self.preprocess.device)
        for i, (images, targets) in enumerate(batches):
            last = i == len(batches) - 1
            images, targets = self.preprocess(images, targets)
            with contextlib.nullcontext() if last or not hasattr(self.model, 'no_sync') else self.model.no_sync():
                with self.autocast():
                    teacher_logits = [] if self.teacher is None else [self.teacher(images).float()]
                    # Convert to float32: F.cross_entropy would round the log-probabilities of 16-bit logits.
                    batch_loss = self.criterion(self.model(images).float(), targets, *teacher_logits) / len(batches)
                self.scaler.backward(batch_loss, self.optimizer, last)
            loss = loss + batch_loss.detach()

        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        # Gradients are equal on all ranks here, but losses are not, so only the loss flag needs an all-reduce.
        bad_loss = all_reduce_((~torch.isfinite(loss)).float(), dist.ReduceOp.MAX)
        bad_norm = (~torch.isfinite(norm)).float()
        skips_overflows = self.scaler.skips_overflows
        bad = bad_loss if skips_overflows else torch.maximum(bad_loss, bad_norm)

        if self.clip_grad is not None:
            if self.clip_mode == 'norm':
                nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
            else:
                dispatch_clip_grad(parameters, self.clip_grad, mode=self.clip_mode)
        self._optimizer_step(bad)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if before is not None:
            after = torch.where(bad > 0, before, torch.cat([b.flatten() for b in self.statistics]))
            for buffer, value in zip(self.statistics, after.split([b.numel() for b in self.statistics])):
                buffer.copy_(value)
        if self.ema is not None:
            average, module = self.ema
            done = epoch * self.updates_per_epoch + step + 1
            average.update(module, done if average.use_warmup else None)  # Given a step, timm would start at decay 0.
        samples = sum(len(targets) for _, targets in batches)
        meters.add(loss, samples, bad, bad_norm * (1 - bad_loss) if skips_overflows else torch.zeros_like(bad))

    def _optimizer_step(self, bad: torch.Tensor) -> None:
        if self.scaler.skips_overflows or not self.skip_nonfinite:
            self.scaler.step(self.optimizer)
        elif getattr(self.optimizer, '_step_supports_amp_scaling', False):
            # If found_inf is set, as by GradScaler, a fused optimizer skips the step without a host sync.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf
        elif not bad.item():  # This is a host sync. Other optimizers cannot skip a step on the device.
            self.optimizer.step()


def train_one_epoch(
        train_step: TrainStep, loader: Iterable, epoch: int, first_step: int, updates: int, accum_steps: int,
        meters: Meters, progress: Progress, check_every: int = 1, max_skips: int = 0) -> Iterator[int]:
    """Train for the rest of an epoch. After each optimizer step, yield the number of steps done in the epoch.

    Args:
        train_step: the optimizer step.
        loader: the epoch's remaining batches.
        epoch: index of the epoch.
        first_step: steps of the epoch that are already done.
        updates: steps to run.
        accum_steps: batches per step.
        meters, progress: running sums to add to, and the progress display.
        check_every: steps between reads of the meters, each a host sync.
        max_skips: consecutive steps that may be skipped because a loss or gradient is not finite.

    Raises:
        TrainingFault: on all ranks, if losses or gradients are not finite.
    """
    train_step.model.train()
    for module in train_step.frozen:
        module.eval()
    batches = iter(loader)
    images, began = 0, time.monotonic()
    for step in range(first_step, first_step + updates):
        asked = time.monotonic()
        group = list(islice(batches, accum_steps))
        if step > first_step:  # Do not count the first wait, which includes starting the workers.
            progress.waited += time.monotonic() - asked
        train_step(group, epoch, step, meters)
        images += sum(len(targets) for _, targets in group)

        figures = None
        if (step + 1) % check_every == 0 or progress.due():
            now = meters.read()  # This is a host sync.
            check_faults(now, epoch, step, max_skips)
            if progress.due():
                rate = images * get_world_size() / (time.monotonic() - began)
                figures = {
                    'loss': f'{now["loss"] / max(now["samples"], 1):.4f}',
                    'lr': f'{max(group["lr"] for group in train_step.optimizer.param_groups):.2e}',
                    'images/s': f'{rate:.0f}',
                }
                if progress.wait_share() >= 0.1:
                    figures['waiting for data'] = f'{progress.wait_share():.0%}'
        progress.step(figures)
        yield step + 1


def check_faults(sums: dict[str, float], epoch: int, step: int, max_skips: int) -> None:
    """Raise TrainingFault if steps were skipped or overflowed more often than allowed."""
    where = f'epoch {epoch}, step {step}'
    if sums['skipped_in_a_row'] > max_skips or (sums['skipped'] and not max_skips):
        raise TrainingFault(
            f'{where}: loss or gradient is not finite'
            + (f', {sums["skipped_in_a_row"]:.0f} steps in a row' if max_skips else
               '; a lower --lr, --clip-grad 1 or --on-nonfinite skip may help'))
    if sums['overflows_in_a_row'] > MAX_OVERFLOWS:
        raise TrainingFault(f'{where}: gradients overflowed {MAX_OVERFLOWS} times in a row under loss scaling; '
                            'a lower --lr may help')


@torch.inference_mode()
def evaluate(
        model: nn.Module, loader: Iterable, preprocess: Preprocessor, autocast: Callable,
        progress: Progress | None = None, predictions: list | None = None) -> dict[str, float]:
    """Evaluate `model` on all ranks, each with its share of the data.

    Unlike timm's accuracy(), count images over all batches and ranks, so that the scores are exact. For each batch,
    append the targets (B,) and the top k <= 5 classes and probabilities, both (B, k), to `predictions`.

    Returns:
        acc1, acc5 (%; acc5 counts all classes if there are fewer), loss (mean cross-entropy), count (images).
    """
    model.eval()
    device = preprocess.device
    totals = torch.zeros(4, dtype=sum_dtype(device), device=device)  # correct, in the top 5, loss, images
    for images, targets in loader:
        images, targets = preprocess(images, targets)
        with autocast():
            outputs = model(images)
        outputs = outputs.float()
        top = outputs.topk(min(5, outputs.shape[1]), dim=1)
        is_target = top.indices == targets[:, None]  # (B, k)
        if predictions is not None:
            predictions.append((targets, top.indices, outputs.softmax(dim=1).gather(1, top.indices)))
        totals[0] += is_target[:, 0].sum()
        totals[1] += is_target.any(dim=1).sum()
        totals[2] += nn.functional.cross_entropy(outputs, targets, reduction='sum')
        totals[3] += len(targets)
        if progress is not None:
            progress.step()
    correct, in_five, loss, count = all_reduce_(totals).tolist()
    count = max(count, 1)  # Avoid 0 / 0 if a signal stops the evaluation before its first batch.
    return {'acc1': 100 * correct / count, 'acc5': 100 * in_five / count, 'loss': loss / count, 'count': int(count)}


def throughput(model: nn.Module, images: torch.Tensor, autocast: Callable, warmup: int = 50, runs: int = 30) -> float:
    """Return the images per second of forward passes on one batch: the mean of `runs` passes after `warmup`."""
    model.eval()
    synchronize = torch.get_device_module(images.device).synchronize  # This does nothing on a CPU.
    with torch.inference_mode(), autocast():
        for i in range(warmup + runs):
            if i == warmup:
                synchronize()
                began = time.monotonic()
            model(images)
        synchronize()
    return runs * len(images) / (time.monotonic() - began)
