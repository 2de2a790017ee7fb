"""Build the optimizer and its learning-rate schedule, set their position, and load moments from a checkpoint."""
import argparse
from typing import Any

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build timm's optimizer of --opt."""
    settings = dict(eps=args.opt_eps)
    if args.opt_betas:
        settings['betas'] = tuple(args.opt_betas)
    if args.opt in ('adamw', 'adam'):
        settings['fused'] = True  # only a fused one can skip a step without a host sync
    return create_optimizer_v2(
        model, opt=args.opt, lr=lr, weight_decay=args.weight_decay, momentum=args.momentum,
        layer_decay=args.layer_decay, **settings)


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """Build timm's scheduler; return it and the number of epochs with the cool-down."""
    noise = args.lr_noise[0] if args.lr_noise and len(args.lr_noise) == 1 else args.lr_noise
    return create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, decay_epochs=args.decay_epochs,
        cooldown_epochs=args.cooldown_epochs, decay_rate=args.decay_rate,
        min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs,
        warmup_prefix=args.warmup_prefix, noise=noise,
        noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std, noise_seed=args.seed,
        step_on_epochs=not args.sched_on_updates, updates_per_epoch=updates_per_epoch)


def position_schedule(scheduler, epoch: int, updates: int) -> None:
    """Set the learning rate in force in `epoch`, after `updates` updates of the run.

    As in the authors' code an epoch's rate is the schedule's value for the epoch before.
    """
    if scheduler.t_in_epochs and epoch > 0:
        scheduler.step(epoch - 1)
    elif not scheduler.t_in_epochs and updates > 0:
        scheduler.step_update(updates)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None, source: str) -> None:
    """Load moments and counts; learning rates and weight decays stay as the command line sets them."""
    if not isinstance(state, dict):
        raise ValueError(f'{source} holds no optimizer: start from it by --finetune')
    counts = ('params', 'step', 'lookahead_step')  # some optimizers of timm keep these among the settings
    settings = [{k: v for k, v in group.items() if k not in counts} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ValueError(f'the optimizer state in {source} is of another model or optimizer ({error})') from None
    moments = getattr(optimizer, '_base_optimizer', optimizer).state  # timm's Lookahead has no state of its own
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
        for p in group['params']:
            for key, moment in moments[p].items():
                if isinstance(moment, torch.Tensor) and moment.ndim > 0:
                    moments[p][key] = _fit_moment(moment, p, source)


def _fit_moment(moment: torch.Tensor, p: torch.Tensor, source: str) -> torch.Tensor:
    """Return a moment in the shape that belongs to the parameter `p`; torch does not compare shapes.

    Older checkpoints store 1x1 convolutions as linear layers, whose moments have two dimensions. A factored moment has
    axes of 1, or one axis less than `p`.
    """
    if p.shape == (*moment.shape, 1, 1):
        return moment.view(p.shape)
    if moment.ndim == p.ndim and any(a not in (1, b) for a, b in zip(moment.shape, p.shape)):
        raise ValueError(f'the optimizer state in {source} is of another --input-size: use that '
                         'of the run, another --output-dir, or --overwrite')
    if p.ndim == 4 and moment.ndim < 3:
        raise ValueError(f'the factored moments in {source}, an older file, are of linear layers, which are 1x1 '
                         'convolutions now: start from it by --finetune')
    return moment
