"""Build the optimizer and its learning-rate schedule, set the schedule's position, and load the optimizer state."""
import argparse
from typing import Any

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from errors import UsageError, first_line


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build the timm optimizer named by --opt; raise UsageError if timm lacks it or it refuses a setting."""
    settings = {**optimizer_kwargs(args), 'lr': lr}
    if args.opt in ('adamw', 'adam'):
        settings['fused'] = True  # Only a fused optimizer can skip a step without a host sync.
    try:
        return create_optimizer_v2(model, **settings)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UsageError(f'--opt {args.opt}: {first_line(error)}') from None


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """Build timm's scheduler; return it and the number of epochs, including the cool-down."""
    settings = {**scheduler_kwargs(args), 'decay_milestones': (90, 180, 270)}  # scheduler_kwargs would set [30, 60].
    return create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates_per_epoch)


def schedule_warnings(args: argparse.Namespace, lr: float, updates: int) -> list[str]:
    """Return warnings about settings that do not fit a run of `updates` optimizer steps at learning rate `lr`."""
    warnings = []
    if args.warmup_epochs >= args.epochs and not args.warmup_prefix:
        warnings.append(f'the warm-up of {args.warmup_epochs} epochs lasts the whole training: the learning rate '
                        f'never reaches {lr:g}. Use --warmup-epochs {args.epochs // 20}.')
    if lr < args.min_lr:
        warnings.append(f'the learning rate {lr:g} is below --min-lr {args.min_lr:g}, so it rises toward the end. '
                        f'Use --min-lr {lr / 100:.2g}.')
    initial = args.model_ema_decay ** updates  # fraction of initial weights in the EMA at the end
    if args.model_ema and not args.model_ema_warmup and initial > 0.05:
        warnings.append(f'EMA decay {args.model_ema_decay:g} is too slow for {updates} steps: {initial:.0%} of the '
                        'EMA would still be initial weights, in evaluation, prediction and export too. '
                        'Use --model-ema-warmup or --no-model-ema.')
    return warnings


def position_schedule(scheduler, epoch: int, updates: int) -> None:
    """Set the learning rate for `epoch`, after `updates` optimizer steps of the run.

    As in the authors' code, an epoch uses the schedule's value for the previous epoch.
    """
    if scheduler.t_in_epochs and epoch > 0:
        scheduler.step(epoch - 1)
    elif not scheduler.t_in_epochs and updates > 0:
        scheduler.step_update(updates)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], file: str) -> None:
    """Load moments and step counts. Keep the learning rates and weight decays that the command line sets."""
    counts = ('params', 'step', 'lookahead_step')  # Load these too, if timm's optimizer has them in its groups.
    settings = [{k: v for k, v in group.items() if k not in counts} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for p, moments in optimizer.state.items() if optimizer.defaults.get('fused') else ():
            if not moments['exp_avg'].shape == moments['exp_avg_sq'].shape == p.shape:  # The kernel does not check.
                raise ValueError('moments have other shapes')
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
        raise UsageError(f'the optimizer state in {file} belongs to another model or optimizer ({error})') from None
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
