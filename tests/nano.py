"""python tests/nano.py ARGS: train.py ARGS with `cmt_nano`, a CMT small enough for a test to train in seconds."""
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).parent.parent))
import cmt  # noqa: E402

default_cfgs = generate_default_cfgs({'cmt_nano': cmt._cfg(size=32)})

ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
FLAGS = (
    '--model cmt_nano --device cpu --input-size 32 --batch-size 8 --accum-steps 2 --num-workers 0 '
    '--epochs 3 --cooldown-epochs 0 --warmup-epochs 1 --warmup-lr 1e-3 --lr 0.1 --model-ema-decay 0.9 '
    '--drop 0.1 --drop-path 0.2 --test-freq 1 --print-freq 3').split()


@register_model
def cmt_nano(pretrained: bool = False, **kwargs) -> cmt.CMT:
    model_args = dict(
        stem_chs=4, embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratios=(2,) * 4,
        num_features=32, drop_rate=0.1)
    return build_model_with_cfg(
        cmt.CMT, 'cmt_nano', pretrained, pretrained_filter_fn=cmt.checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3)), **dict(model_args, **kwargs))


def warm(seed=0, **kwargs) -> cmt.CMT:
    """Return cmt_nano at 64 px in eval mode, with BatchNorm statistics of a batch and logits far apart."""
    torch.manual_seed(seed)
    model = timm.create_model('cmt_nano', img_size=64, **kwargs).train()
    with torch.no_grad():
        model(torch.randn(16, 3, 64, 64))
        model.head.weight.mul_(30)
    return model.eval()


SMALL = dict(img_size=64, stem_chs=8, embed_dims=(12, 24, 48, 96), depths=(1, 2, 2, 1), num_features=64,
             num_classes=5)  # heads of 12 channels, which fused attention pads to 16


def small(seed=0, **kwargs) -> cmt.CMT:
    """Return a CMT at 64 px, for tests that need no training."""
    torch.manual_seed(seed)
    return cmt.CMT(**{**SMALL, **kwargs})


def train(argv) -> None:
    """Run train.py's main() in this process."""
    import options
    import train
    train.main(options.parse_args([str(arg) for arg in argv]))


def start(argv, ranks=1, output=os.devnull, before=None, command='train') -> list[multiprocessing.Process]:
    """Run cli() in forked processes, which save the seconds of importing torch.

    Args:
        argv: flags of train.py.
        ranks: number of processes, which meet as torchrun's would.
        output: file for what they print.
        before: called with the rank first in each new process.
        command: module with a cli().
    """
    port = free_port()

    def child(rank):
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, 'w', buffering=1)
        sys.stderr = os.fdopen(2, 'w', buffering=1)
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGUSR1):  # An earlier run may have left its handlers in this process.
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if ranks > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        if before:
            before(rank)
        sys.argv = [f'{command}.py', *map(str, argv)]
        sys.exit(importlib.import_module(command).cli())

    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=child, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
        process.output = Path(output)
    return processes


def free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


class Killed(Exception):
    """End a run in this process as abruptly as an exception can."""


def die():
    raise Killed


def full_disk(*args, **kwargs):
    raise OSError(28, 'No space left on device')


def at_step(number, action):
    """Call `action` in the optimizer step after `number` others, until the returned handle's `with` block ends."""
    steps = itertools.count()

    def hook(*_):
        if next(steps) == number:
            action()

    return register_optimizer_step_pre_hook(hook)


def on_forward(action):
    """Call `action` with each CMT and its images before a forward pass, as long as at_step does."""
    def hook(module, images):
        if isinstance(module, cmt.CMT):
            action(module, *images)

    return register_module_forward_pre_hook(hook)


def poison(*numbers):
    """Make an image NaN in the training batches with these numbers, as long as at_step does."""
    batches = itertools.count()

    def spoil(model, images):
        if model.training and next(batches) in numbers:
            images[1] = float('nan')

    return on_forward(spoil)


def on_log(action):
    """Call `action` in this process whenever a line of log.txt is on disk."""
    sync = os.fsync

    def hook(descriptor):
        sync(descriptor)
        if os.readlink(f'/proc/self/fd/{descriptor}').endswith('/log.txt'):
            action()

    os.fsync = hook


def torchrun(options, argv) -> list[str]:
    return [sys.executable, '-m', 'torch.distributed.run', *options.split(), '--max-restarts', '3',
            '--monitor-interval', '0.1', __file__, *map(str, argv)]


def wait_for(condition, seconds=200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'timed out'
        time.sleep(0.02)


def finish(processes, status=0, timeout=120) -> None:
    """Wait for processes that must end with `status`; show what they printed if they do not."""
    try:
        for process in processes:
            process.join(timeout)
        assert [process.exitcode for process in processes] == [status] * len(processes), \
            processes[0].output.read_text()[-3000:]
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()


def children_of(pid) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        threads = Path(f'/proc/{pid}/task').glob('*/children')
        return sorted(int(child) for thread in threads for child in thread.read_text().split())
    return []


def read(folder, name='checkpoint_last.pth'):
    return torch.load(Path(folder) / name, weights_only=True)


def epochs(folder) -> list[int]:
    return [line['epoch'] for line in log(folder)]


def updates(folder) -> int:
    """Return the number of optimizer steps that checkpoint_last.pth holds."""
    states = read(folder)['optimizer']['state'].values()
    number, = {int(state['step']) for state in states if 'step' in state}  # Muon's own states lack it.
    return number


def log(folder) -> list[dict]:
    """Return the lines of log.txt without the figures in which two equal runs differ."""
    lines = [json.loads(line) for line in (Path(folder) / 'log.txt').read_text().splitlines()]
    for line in lines:
        for key in ('train_images_per_s', 'epoch_seconds', 'memory_mb'):
            assert line.pop(key, 0) >= 0  # Windows has no memory_mb.
    return lines


def same(a, b) -> bool:
    """Return whether nested tensors are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def finite(state) -> bool:
    return all(value.isfinite().all() for value in state.values())


def assert_same_run(folder, other) -> None:
    a, b = read(folder), read(other)
    for key in ('model', 'model_ema', 'optimizer', 'lr_scheduler', 'epoch', 'step', 'best', 'samples_seen', 'meters'):
        assert same(a[key], b[key]), key
    assert log(folder) == log(other)


if __name__ == '__main__':
    import train as command
    # Seconds a step, a validation batch and an fsync, so that a test can disturb the run.
    pauses = [float(pause) for pause in os.environ.get('NANO_PAUSE', '0,0,0').split(',')] + [0, 0]
    register_optimizer_step_pre_hook(lambda *_: time.sleep(pauses[0]))
    on_forward(lambda model, images: model.training or time.sleep(pauses[1]))
    sync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(pauses[2]), sync(descriptor))
    sys.exit(command.cli())
