"""A run from the command line to its last epoch: it trains, logs and evaluates."""
import copy
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn.modules.module import register_module_forward_hook

import nano
import optim
import options
from test_options import PUBLISHED

GOLDEN_LR = json.loads((Path(__file__).parent / 'golden_lr.json').read_text())
ONE_STEP = ('--epochs', 1, '--batch-size', 48, '--test-freq', 9)


# the schedule

@pytest.mark.parametrize('name', PUBLISHED)
@pytest.mark.parametrize('resumes', [False, True])
def test_learning_rates_are_the_authors(name, resumes):
    golden = GOLDEN_LR[name]
    args = options.parse_args(PUBLISHED[name].split())
    lr = args.lr * golden['recipe']['batch'] * 8 / 512
    assert lr == pytest.approx(golden['base_lr'], rel=1e-12)

    def fresh():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
        return optimizer, *optim.build_scheduler(args, optimizer, updates_per_epoch=7)

    optimizer, scheduler, num_epochs = fresh()
    assert num_epochs == golden['num_epochs'] == len(golden['lr_in_epoch'])
    for epoch, expected in enumerate(golden['lr_in_epoch']):
        if resumes:
            optimizer, scheduler, _ = fresh()
        optim.position_schedule(scheduler, epoch, 7 * epoch)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-12, abs=0), epoch
        for update in range(7 * epoch, 7 * epoch + 7):
            scheduler.step_update(update + 1)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-12, abs=0), epoch
        scheduler.step(epoch, None)


def test_a_schedule_on_updates_resumes_where_it_stood():
    args = options.parse_args('--epochs 4 --warmup-epochs 1 --cooldown-epochs 0 --sched-on-updates'.split())

    def rates(first):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.)
        scheduler, num_epochs = optim.build_scheduler(args, optimizer, updates_per_epoch=5)
        optim.position_schedule(scheduler, first // 5, first)
        for update in range(first, 5 * num_epochs):
            yield optimizer.param_groups[0]['lr']
            scheduler.step_update(update + 1)

    undisturbed = list(rates(0))
    assert len(set(undisturbed)) == 20
    assert list(rates(7)) == undisturbed[7:] and list(rates(10)) == undisturbed[10:]


@pytest.mark.parametrize('change, words', [
    (['--epochs', 2, '--warmup-epochs', 5], '--warmup-epochs 0'),
    (['--epochs', 3, '--cooldown-epochs', 2], '5 epochs, 2 of them'),
    (['--min-lr', 0.01], '--min-lr 3.1e-05'),
    (['--batch-size', 4096], '0.0195312 = 0.1 x 100 / 512'),  # An epoch has only 100 images.
    (['--model-ema-decay', 0.99996], '100% .*--no-model-ema'),
    (['--model-ema-decay', 0.9, '--epochs', 4], '8% .*--model-ema-warmup or --no-model-ema'),
    (['--model-ema-decay', 0.99996, '--model-ema-warmup'], '3 epochs'),
])
def test_a_surprising_schedule_is_logged_first(flags, capsys, change, words):
    with nano.at_step(0, nano.die), pytest.raises(nano.Killed):
        nano.train([*flags, '--model-ema-decay', 0.1, *change])
    advice = '--warmup-epochs 0', '--min-lr 3.1e-05', '--no-model-ema'
    printed = capsys.readouterr().out
    assert re.search(words, printed) and not any(text in printed for text in advice if text not in words)


# one run

def test_a_run_learns_and_writes_what_design_says(whole):
    lines = nano.log(whole)
    assert [line['epoch'] for line in lines] == [0, 1, 2]
    assert set(lines[0]) == {
        'epoch', 'train_lr', 'train_loss', 'skipped_updates', 'n_parameters', 'test_acc1', 'test_acc5', 'test_loss',
        'ema_test_acc1', 'ema_test_acc5', 'ema_test_loss'}
    assert lines[0]['train_lr'] == 1e-3 and lines[2]['test_acc5'] == 100 and lines[2]['skipped_updates'] == 0
    assert {path.name for path in whole.iterdir()} >= {
        '.lock', 'checkpoint_best.pth', 'checkpoint_ema_best.pth', 'checkpoint_last.pth', 'checkpoint_prev.pth',
        'config.yaml', 'log.txt'}
    last = nano.read(whole)
    assert set(last) >= {
        'model', 'model_ema', 'optimizer', 'lr_scheduler', 'loss_scaler', 'epoch', 'step', 'meters', 'best',
        'world_size', 'samples_seen', 'args'}
    assert type(last['args']) is dict and last['args']['seed'] == 3407
    assert last['epoch'] == 2 and nano.read(whole, 'checkpoint_prev.pth')['epoch'] == 1
    assert nano.updates(whole) == 18


def test_the_smallest_and_the_largest_class_are_logged(flags, images, renamed, capsys):
    """And a class without validation images."""
    nano.train([*flags, *ONE_STEP, '--data-path', images])
    printed = capsys.readouterr().out
    assert '24 (class_1) to 40 (class_0)' in printed and 'without validation images' not in printed
    data = renamed(a='class_0', b='class_0', c='class_0')
    (data / 'val' / 'c').unlink()
    nano.train([*flags, *ONE_STEP, '--data-path', data])
    assert 'without validation images (1): c\n' in capsys.readouterr().out


def test_max_train_images_trains_on_so_many_in_each_resume(flags, images, tmp_path, capsys):
    """And as a folder of these images does."""
    flags = [*flags, '--batch-size', 2, '--resume', 'auto']
    run = [*flags, '--max-train-images', 31, '--output-dir', tmp_path / 'run']
    for epochs in (1, 2):
        nano.train([*run, '--epochs', epochs])
        assert nano.read(tmp_path / 'run')['training_images'] == 31
        assert '10 (class_' in capsys.readouterr().out
    (tmp_path / 'short').mkdir()
    (tmp_path / 'short' / 'val').symlink_to(images / 'val')
    for label, share in enumerate((11, 10, 10)):
        folder = tmp_path / 'short' / 'train' / f'class_{label}'
        folder.mkdir(parents=True)
        for file in sorted((images / 'train' / folder.name).iterdir())[:share]:
            (folder / file.name).symlink_to(file)
    for epochs in (1, 2):
        nano.train([*flags, '--data-path', tmp_path / 'short', '--output-dir', tmp_path / 'links', '--epochs', epochs])
    assert nano.same(nano.read(tmp_path / 'run')['model'], nano.read(tmp_path / 'links')['model'])


def test_a_small_model_learns(flags, tmp_path):
    nano.train([
        *flags, '--output-dir', tmp_path / 'run', '--mixup', 0, '--cutmix', 0, '--aa', 'none', '--reprob', 0,
        '--drop', 0, '--drop-path', 0, '--no-repeated-aug', '--lr', 0.4, '--epochs', 5])
    lines = nano.log(tmp_path / 'run')
    assert lines[-1]['train_loss'] < 0.8 * lines[0]['train_loss'] and max(line['test_acc1'] for line in lines) > 60


def test_ema_averages_from_the_first_step(flags, tmp_path):
    states = []
    with nano.on_forward(lambda model, _: states.append(copy.deepcopy(model.state_dict()))):
        nano.train([*flags, *ONE_STEP, '--output-dir', tmp_path / 'run', '--model-ema-decay', 0.75])
    last = nano.read(tmp_path / 'run')
    assert nano.updates(tmp_path / 'run') == 1
    for name, after in last['model'].items():
        if after.is_floating_point():
            expected = 0.75 * states[0][name] + 0.25 * after
            assert torch.allclose(last['model_ema'][name], expected, rtol=1e-5, atol=1e-7), name


def test_bn_momentum_weights_the_new_batch(flags, tmp_path):
    moved = []
    for more in ([], ['--bn-momentum', 0.01]):
        nano.train([*flags, *ONE_STEP, '--accum-steps', 1, '--batch-size', 96, *more,
                    '--output-dir', tmp_path / f'run{len(more)}'])
        moved.append(1 - nano.read(tmp_path / f'run{len(more)}')['model']['stem.norm1.running_var'])  # starts at 1
    torch.testing.assert_close(moved[0], 10 * moved[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize('flag, rate', [([], 0.1), (['--head-drop', 0.4], 0.4)])
def test_head_drop_is_the_models_unless_given(flags, flag, rate):
    def check(model, _):
        assert model.head_drop.p == rate
        nano.die()

    with nano.on_forward(check), pytest.raises(nano.Killed):
        nano.train([*flags, '--drop', 0.2, *flag])


def test_vectors_do_not_decay_and_rates_follow_depth():
    model = timm.create_model('cmt_nano')
    names = {id(p): name for name, p in model.named_parameters()}
    args = options.parse_args('--weight-decay 0.07 --layer-decay 0.5'.split())
    groups = optim.build_optimizer(args, model, 1.).param_groups
    for group in groups:
        for p in group['params']:
            is_exempt = p.ndim <= 1 or names[id(p)].endswith('.bias')
            assert group['weight_decay'] == (0 if is_exempt else 0.07), names[id(p)]
    rates = {names[id(p)]: group['lr_scale'] for group in groups for p in group['params']}
    depths = ['stem.conv1', *(f'stages.{i}.blocks.0.lpu.dw' for i in range(4)), 'head']
    assert [rates[f'{name}.weight'] for name in depths] == [0.5 ** i for i in range(5, -1, -1)]


@pytest.mark.parametrize('mixes, more', [
    (True, []), (True, ['--mixup', 0]), (False, ['--mixup', 0, '--cutmix', 0])])
def test_the_loss_is_of_mixed_or_smoothed_targets(flags, mixes, more):
    losses = []

    def note(module, inputs, loss):
        if isinstance(module, (LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, torch.nn.CrossEntropyLoss)):
            losses.append((*inputs, loss.item()))

    with register_module_forward_hook(note):
        nano.train([*flags, *ONE_STEP, '--smoothing', 0.3, *more])
    outputs, targets, loss = losses[0]
    if mixes:
        assert targets.min().item() == pytest.approx(0.1, rel=1e-5)  # a third of 0.3 for each of three classes
    expected = torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0. if mixes else 0.3)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_time_left_counts_training_and_due_validations(flags, capsys, monkeypatch):
    """Epochs 0, 2 and 3 of four are validated."""
    passed, monotonic = [], time.monotonic
    monkeypatch.setattr(time, 'monotonic', lambda: monotonic() + sum(passed))
    with nano.on_forward(lambda model, _: passed.append(500 if model.training else 100)):  # An epoch is two batches.
        nano.train([*flags, '--epochs', 4, '--test-freq', 3, '--test-epoch', 1, '--no-model-ema', '--batch-size', 48])
    left = re.findall(r'^epoch \d/3  train loss .*?(?:eta (\d+):(\d+):(\d+))?$', capsys.readouterr().out, re.M)
    seconds = [int(h or 0) * 3600 + int(m or 0) * 60 + int(s or 0) for h, m, s in left]
    assert seconds == [pytest.approx(expected, abs=20) for expected in (3200, 2200, 1100, 0)]


def test_skipped_steps_leave_no_trace_and_are_counted(flags, tmp_path):
    with nano.poison(11):  # in the sixth step, of two batches each
        nano.train([*flags, '--epochs', 2, '--on-nonfinite', 'skip', '--output-dir', tmp_path])
    saved = nano.read(tmp_path)
    assert nano.finite(saved['model']) and nano.finite(saved['model_ema']) and nano.updates(tmp_path) == 11
    assert [line['skipped_updates'] for line in nano.log(tmp_path)] == [1, 0]


# evaluation

def scores(output: str) -> list[str]:
    return [line for line in output.splitlines() if 'Acc' in line]


def score_lines(line: dict, prefix: str = '') -> list[str]:
    """Return the two lines in which DeiT's code prints the scores of a line of log.txt."""
    acc1, acc5, loss = (line[f'{prefix}test_{key}'] for key in ('acc1', 'acc5', 'loss'))
    return [f'* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}',
            f'Accuracy of the network on the 27 test images: {acc1:.3f}%']


@pytest.mark.parametrize('prefix', ['', 'ema_'])
def test_eval_of_a_validation_folder_gives_the_logged_scores(flags, images, whole, tmp_path, capsys, prefix):
    (tmp_path / 'val').symlink_to(images / 'val')
    path = whole / f'checkpoint_{prefix}best.pth'
    nano.train([*flags, '--data-path', tmp_path, '--eval', '--resume', path, *([] if prefix else ['--no-model-ema'])])
    best = max(nano.log(whole), key=lambda line: line[f'{prefix}test_acc1'])  # the first one of several
    assert nano.read(whole, path.name)['epoch'] == best['epoch']
    assert scores(capsys.readouterr().out) == score_lines(best, prefix)
    assert [path.name for path in tmp_path.iterdir()] == ['val']


def test_two_ranks_train_and_score_as_one_does(flags, pair, tmp_path, capsys):
    printed = (pair.parent / 'out.txt').read_text()
    assert nano.read(pair)['world_size'] == 2 and '0.00625 = 0.1 x 32 / 512' in printed
    epochs = re.findall(r'^epoch \d/1  train loss .*\n  val acc1 .*EMA acc1', printed, re.M)
    assert len(epochs) == 2  # once, not by each rank

    evaluation = [*flags, '--eval', '--no-model-ema', '--resume', pair / 'checkpoint_last.pth']
    nano.train(evaluation)
    expected = score_lines(nano.log(pair)[-1])
    assert scores(capsys.readouterr().out) == expected
    nano.finish(nano.start(evaluation, ranks=2, output=tmp_path / 'eval.txt'))
    assert scores((tmp_path / 'eval.txt').read_text()) == expected


def test_classes_are_scored_under_the_checkpoints_indices(flags, images, whole, renamed, tmp_path, capsys):
    """In another order, and only some of them."""
    def accuracy(checkpoint, *more):
        nano.train([*flags, '--no-model-ema', '--eval', '--resume', checkpoint, *more])
        return float(re.search(r'^\* Acc@1 (\S+)', capsys.readouterr().out, re.M)[1])

    of_all = accuracy(whole / 'checkpoint_last.pth')
    (tmp_path / 'map').write_text('class_2\nclass_0\nclass_1\n')
    swapped = tmp_path / 'swapped'
    nano.train([*flags, '--class-map', tmp_path / 'map', '--output-dir', swapped])
    logged = nano.log(swapped)[-1]['test_acc1']
    assert accuracy(swapped / 'checkpoint_last.pth') == pytest.approx(logged, abs=1e-3) and logged > 40

    correct = 0.
    for name in ('class_0', 'class_1', 'class_2'):
        data = renamed(**{name: name})
        shutil.rmtree(data / 'train')
        of_class = accuracy(whole / 'checkpoint_last.pth', '--data-path', data)
        correct += of_class * len(list((images / 'val' / name).iterdir()))
        shutil.rmtree(data)
    assert correct / 27 == pytest.approx(of_all, abs=1e-3)


@pytest.mark.parametrize('ranks, workers', [(1, 0), (2, 2)])
def test_eval_counts_the_images_that_exif_rotates(flags, images, whole, tmp_path, ranks, workers):
    """Once, over all ranks and workers; without the rotations it gives the score of the stored images."""
    shutil.copytree(images / 'val', tmp_path / 'val')
    for i, path in enumerate(sorted(tmp_path.glob('val/*/*.png'))[::2]):
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8  # two of ten are upright
        Image.open(path).save(path, exif=exif)
    for flag, count in (('--no-ignore-exif', 8), ('--ignore-exif', 0)):
        nano.finish(nano.start(
            [*flags, '--data-path', tmp_path, '--eval', '--resume', whole / 'checkpoint_last.pth', '--no-model-ema',
             '--num-workers', workers, flag], ranks=ranks, output=tmp_path / flag))
        lines = [line for line in (tmp_path / flag).read_text().splitlines() if 'EXIF' in line]
        assert len(lines) == (count > 0) and all(f' {count} ' in line and '--ignore-exif' in line for line in lines)
    stored, rotated = (scores((tmp_path / flag).read_text()) for flag in ('--ignore-exif', '--no-ignore-exif'))
    assert stored == score_lines(nano.log(whole)[-1]) != rotated


def test_eval_reads_images_as_the_checkpoints_run_did(flags, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / 'data')
    path, exif = tmp_path / 'data/val/class_0/01.png', Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    run = [*flags, '--data-path', tmp_path / 'data', '--epochs', 1]
    nano.train([*run, '--ignore-exif', '--output-dir', tmp_path / 'run'])
    for more, count in (([], 0), (['--no-ignore-exif'], 1)):
        capsys.readouterr()
        nano.train([*run, '--eval', '--resume', tmp_path / 'run/checkpoint_last.pth', *more])
        assert capsys.readouterr().out.count('--ignore-exif') == count
