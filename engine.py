"""What is done with batches: the training step, an epoch of them, evaluation."""
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from timm.utils import dispatch_clip_grad, random_seed

from precision import ApexScaler, NativeScaler
from transforms import Prepare
from utils import Progress, get_rank, get_world_size, reduce_

OVERFLOWS_IN_A_ROW = 50  # a loss scale halved so many times in a row is a fault, not a scale to be found


class TrainingFault(RuntimeError):
    """Training can't go on; the last checkpoint is good."""


class Meters:
    """Running sums of an epoch, kept on the device: reading one waits for it, adding to one does not."""
    NAMES = ('loss', 'samples', 'skipped', 'skipped_in_a_row', 'overflows', 'overflows_in_a_row')
    OF_A_RANK = 2  # the first two are sums of each rank's own, the others are the same on all ranks

    def __init__(self, device: torch.device, saved: list[list[float]] | None = None):
        """Start at 0, or go on from what of_all_ranks() gave, also where the number of ranks has changed."""
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        if saved:
            if len(saved) == get_world_size():
                own = saved[get_rank()]
            else:
                totals = [sum(values) * (get_rank() == 0) for values in zip(*saved)]
                own = totals[:self.OF_A_RANK] + saved[0][self.OF_A_RANK:]
            self.sums.copy_(torch.tensor(own, dtype=torch.float64))

    def add(self, loss: torch.Tensor, samples: int, skipped: torch.Tensor, overflowed: torch.Tensor) -> None:
        """One update: mean loss over `samples`, and whether (0. or 1.) it was skipped or overflowed."""
        self.sums[0] += torch.where(skipped > 0, 0., loss.double() * samples)
        self.sums[1] += samples * (1 - skipped)
        for i, flag in ((2, skipped), (4, overflowed)):
            self.sums[i] += flag
            self.sums[i + 1] = (self.sums[i + 1] + 1) * flag

    def read(self) -> dict[str, float]:
        return dict(zip(self.NAMES, self.sums.tolist()))

    def total(self) -> dict[str, float]:
        """The figures of all ranks together."""
        saved = self.of_all_ranks()
        sums = [sum(values) for values in zip(*saved)]
        return dict(zip(self.NAMES, sums[:self.OF_A_RANK] + saved[0][self.OF_A_RANK:]))

    def of_all_ranks(self) -> list[list[float]]:
        """The sums of each rank, in the order of ranks."""
        if not dist.is_initialized():
            return [self.sums.tolist()]
        parts = [torch.empty_like(self.sums) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self.sums)
        return [part.tolist() for part in parts]


class TrainStep:
    """One update of the weights from one or several batches.

    The order: prepare the batch on the device, forward under autocast, loss, backward, unscale, agree on finiteness
    over all ranks, clip, optimizer, EMA. Nothing in it waits for the device.

    Args:
        model: with or without DistributedDataParallel or compilation around it.
        criterion: loss of outputs and targets.
        optimizer: a fused one can leave a step out without a host sync.
        prepare: see Prepare.
        scaler: NativeScaler or ApexScaler.
        autocast: makes the context of the forward pass.
        ema: timm's ModelEmaV3 and the module that it averages.
        clip_grad, clip_mode: as timm's dispatch_clip_grad.
        skip_nonfinite: leave out updates whose loss or gradient is not finite, and their BatchNorm statistics.
        seed, rank: what (seed, epoch, step, rank) keys the draws of a step with.
        teacher: gives the logits (B, classes) that `criterion` takes as a third argument.
        frozen: modules that stay in eval mode.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module,
            optimizer: torch.optim.Optimizer,
            prepare: Prepare,
            scaler: NativeScaler | ApexScaler,
            autocast: Callable,
            ema: tuple | None = None,
            clip_grad: float | None = None,
            clip_mode: str = 'norm',
            skip_nonfinite: bool = False,
            seed: int = 0,
            rank: int = 0,
            teacher: nn.Module | None = None,
            frozen: list[nn.Module] | None = None,
    ):
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.prepare = prepare
        self.scaler = scaler
        self.autocast = autocast
        self.ema = ema
        self.clip_grad = clip_grad
        self.clip_mode = clip_mode
        self.skip_nonfinite = skip_nonfinite
        self.seed = seed
        self.rank = rank
        self.teacher = teacher
        self.frozen = frozen or []
        self.statistics = [b for b in model.buffers() if b.is_floating_point()] if skip_nonfinite else []

    def __call__(self, batches: list[tuple[torch.Tensor, torch.Tensor]], epoch: int, step: int, meters: Meters) -> None:
        """Train on `batches` of (B, 3, H, W) uint8 images and (B,) class indices, as step `step` of `epoch`."""
        random_seed(int(np.random.SeedSequence((self.seed, epoch, step, self.rank)).generate_state(1)[0]))
        before = torch.cat([b.flatten() for b in self.statistics]) if self.statistics else None

        loss = torch.zeros((), device=self.prepare.device)
        for i, (images, targets) in enumerate(batches):
            last = i == len(batches) - 1
            images, targets = self.prepare(images, targets)
            with contextlib.nullcontext() if last or not hasattr(self.model, 'no_sync') else self.model.no_sync():
                with self.autocast():
                    taught = [] if self.teacher is None else [self.teacher(images)]
                    batch_loss = self.criterion(self.model(images), targets, *taught) / len(batches)
                self.scaler.backward(batch_loss, self.optimizer, last)
            loss = loss + batch_loss.detach()

        self.scaler.unscale_(self.optimizer)
        parameters = self.scaler.parameters(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        # gradients are the same on all ranks by now, losses are not
        bad_loss = reduce_((~torch.isfinite(loss)).float(), dist.ReduceOp.MAX)
        bad_norm = (~torch.isfinite(norm)).float()
        scales = self.scaler.scales  # then overflowing gradients are the scaler's business
        bad = bad_loss if scales else torch.maximum(bad_loss, bad_norm)

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
            average.update(module)
        samples = sum(len(targets) for _, targets in batches)
        meters.add(loss, samples, bad, bad_norm * (1 - bad_loss) if scales else torch.zeros_like(bad))

    def _optimizer_step(self, bad: torch.Tensor) -> None:
        if self.scaler.scales or not self.skip_nonfinite:
            self.scaler.step(self.optimizer)
        elif getattr(self.optimizer, '_step_supports_amp_scaling', False):
            # the way GradScaler tells a fused optimizer to leave a step out, decided on the device
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf
        elif not bad.item():  # this is a host sync: other optimizers can't leave a step out on the device
            self.optimizer.step()


def train_one_epoch(
        train_step: TrainStep,
        loader: Iterable,
        epoch: int,
        first_step: int,
        updates: int,
        accum_steps: int,
        meters: Meters,
        progress: Progress,
        check_every: int = 1,
        skips_in_a_row: int = 0,
) -> Iterator[int]:
    """Train for the rest of an epoch, yielding at each step's border the number of updates done in the epoch.

    Args:
        train_step: the update.
        loader: batches, from where the epoch stands.
        epoch: its number.
        first_step: updates done in it before.
        updates: updates to do.
        accum_steps: batches to an update.
        meters: go on from their sums.
        progress: shown to a person.
        check_every: updates between two looks at the meters, each a host sync.
        skips_in_a_row: updates that may be left out one after the other for a loss or gradient that is not finite.

    Raises:
        TrainingFault: on all ranks, where losses or gradients are not finite.
    """
    train_step.model.train()
    for module in train_step.frozen:
        module.eval()
    batches = iter(loader)
    images, began = 0, time.monotonic()
    for step in range(first_step, first_step + updates):
        asked = time.monotonic()
        group = list(islice(batches, accum_steps))
        if step > first_step:  # for the first one loaders have to start
            progress.waited += time.monotonic() - asked
        train_step(group, epoch, step, meters)
        images += sum(len(targets) for _, targets in group)

        figures = None
        if (step + 1) % check_every == 0 or progress.due():
            now = meters.read()  # this is a host sync
            check_faults(now, epoch, step, skips_in_a_row)
            if progress.due():
                rate = images * get_world_size() / (time.monotonic() - began)
                figures = {
                    'loss': f'{now["loss"] / max(now["samples"], 1):.4f}',
                    'lr': f'{max(group["lr"] for group in train_step.optimizer.param_groups):.2e}',
                    'images/s': f'{rate:.0f}',
                }
                if progress.wait_share() >= 0.1:
                    figures['waits for data'] = f'{progress.wait_share():.0%}'
        progress.step(figures)
        yield step + 1


def check_faults(sums: dict[str, float], epoch: int, step: int, skips_in_a_row: int) -> None:
    """Raise TrainingFault where the meters say that training can't go on."""
    where = f'epoch {epoch}, step {step}'
    if sums['skipped_in_a_row'] > skips_in_a_row or (sums['skipped'] and not skips_in_a_row):
        raise TrainingFault(
            f'{where}: loss or gradient is not finite'
            + (f', {sums["skipped_in_a_row"]:.0f} updates in a row' if skips_in_a_row else
               '; a lower --lr, --clip-grad 1 or --on-nonfinite skip may help'))
    if sums['overflows_in_a_row'] > OVERFLOWS_IN_A_ROW:
        raise TrainingFault(f'{where}: gradients overflowed {OVERFLOWS_IN_A_ROW} times in a row under loss scaling')


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Iterable,
        prepare: Prepare,
        autocast: Callable,
        progress: Progress | None = None,
) -> dict[str, float]:
    """Score `model` on the shares of all ranks.

    timm's accuracy() gives percentages of a batch; what is summed here are counts, exact over batches and ranks.

    Returns:
        acc1, acc5 (%; top-5 counts all classes where there are fewer), loss (mean cross-entropy), count (images).
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=prepare.device)  # correct, among the first 5, loss, images
    for images, targets in loader:
        images, targets = prepare(images, targets)
        with autocast():
            outputs = model(images)
        outputs = outputs.float()
        best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]  # (B, 5)
        totals[0] += best[:, 0].sum()
        totals[1] += best.any(dim=1).sum()
        totals[2] += nn.functional.cross_entropy(outputs, targets, reduction='sum')
        totals[3] += len(targets)
        if progress is not None:
            progress.step()
    correct, in_five, loss, count = reduce_(totals).tolist()
    return {'acc1': 100 * correct / count, 'acc5': 100 * in_five / count, 'loss': loss / count, 'count': int(count)}


def throughput(model: nn.Module, images: torch.Tensor, autocast: Callable, warmup: int = 50, runs: int = 30) -> float:
    """Images per second of forward passes over one prepared batch, mean of `runs` after `warmup`."""
    model.eval()
    with torch.inference_mode(), autocast():
        for i in range(warmup + runs):
            if i == warmup:
                _synchronize(images.device)
                began = time.monotonic()
            model(images)
        _synchronize(images.device)
    return runs * len(images) / (time.monotonic() - began)


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
