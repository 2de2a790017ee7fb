"""python tests/nano.py ARGS: train.py ARGS with `cmt_nano`, a CMT small enough for a test to train in seconds."""
import importlib
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import cmt  # noqa: E402

default_cfgs = generate_default_cfgs({'cmt_nano': cmt._cfg(size=32)})

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
    """cmt_nano at 64 px in eval mode, with the statistics of a batch and logits far apart."""
    torch.manual_seed(seed)
    model = timm.create_model('cmt_nano', img_size=64, **kwargs).train()
    with torch.no_grad():
        model(torch.randn(16, 3, 64, 64))
        model.head.weight.mul_(30)
    return model.eval()


SMALL = dict(img_size=64, stem_chs=8, embed_dims=(8, 16, 32, 64), depths=(1, 2, 2, 1), num_features=64, num_classes=5)


def small(seed=0, **kwargs) -> cmt.CMT:
    """A CMT at 64 px, for tests that need no training."""
    torch.manual_seed(seed)
    return cmt.CMT(**{**SMALL, **kwargs})


def train(argv, **changes) -> None:
    """main() in this process."""
    import options
    import train
    train.main(options.parse_args([str(arg) for arg in argv]))


def start(argv, ranks=1, output=os.devnull, before=None, command='train') -> list[multiprocessing.Process]:
    """cli() in forked processes, which import nothing anew: seconds less than a subprocess each.

    Args:
        argv: flags of train.py.
        ranks: processes, which meet as torchrun's would.
        output: file for what they print.
        before: called with the rank in the new process first.
        command: module with a cli().
    """
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port = found.getsockname()[1]

    def child(rank):
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, 'w', buffering=1)
        sys.stderr = os.fdopen(2, 'w', buffering=1)
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGUSR1):  # not as an earlier run left them in the test's process
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


def full_disk(*args, **kwargs):
    raise OSError(28, 'No space left on device')


def at_step(monkeypatch, number, action):
    """Do `action` in the training step after `number` others."""
    import engine
    step, calls = engine.TrainStep.__call__, []

    def patched(self, *args):
        calls.append(1)
        if len(calls) == number + 1:
            action()
        return step(self, *args)

    monkeypatch.setattr(engine.TrainStep, '__call__', patched)


def finish(processes, status=0, timeout=120) -> None:
    """Wait for processes that are to end with `status`; else what they printed is shown."""
    try:
        for process in processes:
            process.join(timeout)
        assert [process.exitcode for process in processes] == [status] * len(processes), \
            processes[0].output.read_text()[-3000:]
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()


def read(folder, name='checkpoint_last.pth'):
    return torch.load(Path(folder) / name, weights_only=True)


def log(folder) -> list[dict]:
    """Lines of log.txt without what no two runs share."""
    lines = [json.loads(line) for line in (Path(folder) / 'log.txt').read_text().splitlines()]
    for line in lines:
        for key in ('train_images_per_s', 'epoch_seconds', 'memory_mb'):
            assert line.pop(key) >= 0
    return lines


def same(a, b) -> bool:
    """Equal bit by bit."""
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
    pause = float(os.environ.get('NANO_PAUSE', 0))  # seconds in each step, for tests that disturb a run
    if pause:
        once = command.TrainStep.__call__
        command.TrainStep.__call__ = lambda *args: time.sleep(pause) or once(*args)
    sys.exit(command.cli())
