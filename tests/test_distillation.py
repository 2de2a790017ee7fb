"""Knowledge distillation: the losses by hand, the teacher, and a run."""
import math
import os

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import nano
from losses import DistillationLoss, Teacher
from test_finetune import few_digits
from test_weights import models_called
from weights import build_teacher


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_loss_by_hand(kind):
    outputs, teacher_outputs, targets = [[1., 2., 0.], [0., -1., 3.]], [[2., 0., 1.], [1., 1.5, -2.]], [1, 2]
    alpha, tau = 0.3, 2.5
    entropy, distillation = (
        -sum(math.log(softmax(row)[t]) for row, t in zip(outputs, labels)) / 2 for labels in (targets, [0, 1]))
    if kind == 'soft':
        divergence = 0.
        for row, teacher in zip(outputs, teacher_outputs):
            q, p = softmax([v / tau for v in row]), softmax([v / tau for v in teacher])
            divergence += sum(b * math.log(b / a) for a, b in zip(q, p))
        distillation = tau ** 2 * divergence / 6  # 2 images x 3 classes
    loss = DistillationLoss(nn.CrossEntropyLoss(), kind, alpha, tau)(
        torch.tensor(outputs), torch.tensor(targets), torch.tensor(teacher_outputs))
    assert loss.item() == pytest.approx(0.7 * entropy + 0.3 * distillation, rel=1e-5)


class Recorder(nn.Module):
    pretrained_cfg = default_cfg = dict(input_size=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.seen = x
        return x.mean((2, 3)) * self.scale


def test_the_teacher_gets_its_normalisation_and_size():
    model = Recorder()
    teacher = Teacher(model.train())
    pixels = torch.tensor([0.2, 0.6, 0.9]).view(1, 3, 1, 1).expand(2, 3, 16, 24)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    logits = teacher((pixels - mean) / std)
    mean, std = (torch.tensor(model.default_cfg[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    assert model.seen.shape == (2, 3, 8, 8)
    assert torch.allclose(model.seen, ((pixels - mean) / std)[..., :8, :8], atol=1e-5)
    assert not logits.requires_grad and not model.training and not model.scale.requires_grad


def test_a_run_with_a_teacher(flags, whole, tmp_path):
    argv = [*flags, '--epochs', 1, '--test-freq', 9]
    losses = []
    for kind in ('soft', 'hard'):
        with models_called() as models:
            nano.train([*argv, '--distillation-type', kind, '--teacher-path', whole / 'checkpoint_last.pth',
                        '--output-dir', tmp_path / kind])
        losses.append(nano.log(tmp_path / kind)[0]['train_loss'])
        teacher = models[0]
        assert nano.same(dict(teacher.state_dict()), dict(nano.read(whole)['model']))  # statistics included
    assert len({*losses, nano.log(whole)[0]['train_loss']}) == 3


def test_teachers_that_do_not_fit(tmp_path):
    path = tmp_path / 'run.pth'
    model, ema = nano.small(1, num_classes=3), nano.small(2, num_classes=3)
    torch.save({'model': model.state_dict(), 'model_ema': ema.state_dict(), 'classes': ['a', 'b', 'x']}, path)
    with pytest.raises(ValueError, match='run.pth'):
        build_teacher(None, str(path), ['a', 'b', 'c'])
    torch.save(model.state_dict(), tmp_path / 'nameless.pth')
    with pytest.raises(ValueError, match='--teacher-path'):
        build_teacher(None, str(tmp_path / 'nameless.pth'), ['a', 'b'])
    assert nano.same(build_teacher(None, str(path), ['a', 'b', 'x']).state_dict(), model.state_dict())  # not the EMA
    torch.save(timm.create_model('resnet18', num_classes=2).state_dict(), tmp_path / 'resnet.pth')
    assert Teacher(build_teacher('resnet18', str(tmp_path / 'resnet.pth'), ['a', 'b'])).size == (224, 224)
    with pytest.raises(ValueError, match='resnet.pth'):
        build_teacher('resnet18', str(tmp_path / 'resnet.pth'), ['a', 'b', 'c'])


SEEDS = os.environ.get('SEEDS', '1 2 3').split()
KINDS = os.environ.get('KINDS', 'none soft').split()
STUDENT = (
    '--model cmt_nano --device cpu --input-size 32 --batch-size 32 --num-workers 0 --lr 0.064 --drop-path 0 '
    '--head-drop 0 --no-model-ema --no-repeated-aug --aa none --color-jitter 0 --reprob 0 --hflip 0 --smoothing 0 '
    '--warmup-epochs 0 --cooldown-epochs 0 --sched-on-updates --test-freq 1000 --test-epoch 1000 '
    '--print-freq 1000').split()


@pytest.mark.soak
def test_students_of_a_teacher_are_better(tmp_path):
    """Train students on 200 digits for 100 epochs with and without a teacher that was trained on 1,437.

    A teacher's outputs fit mixed images better than mixed labels do.
    The environment variables SEEDS='4 5 6' and KINDS='none soft hard' choose other runs; -s prints the figures.
    """
    nano.train([*STUDENT, '--data-set', 'DIGITS', '--mixup', 0, '--cutmix', 0, '--epochs', 30, '--seed', 0,
                '--output-dir', tmp_path / 'teacher'])
    print('teacher', nano.log(tmp_path / 'teacher')[-1]['test_acc1'])
    teacher = ['--teacher-path', tmp_path / 'teacher' / 'checkpoint_last.pth']
    settings = {
        'none': [], 'soft': ['--distillation-alpha', 0.9, '--distillation-tau', 3, *teacher],
        'hard': ['--distillation-alpha', 1, *teacher]}
    argv, mean = [*STUDENT, '--data-path', few_digits(tmp_path / 'few'), '--epochs', 100], {}
    for kind in KINDS:
        scores = []
        for seed in SEEDS:
            out = tmp_path / f'{kind}_{seed}'
            nano.train([*argv, '--distillation-type', kind, *settings[kind], '--seed', seed, '--output-dir', out])
            scores.append(nano.log(out)[-1]['test_acc1'])
        mean[kind] = np.mean(scores)
        print(f'{kind}: {mean[kind]:.2f} %, standard deviation {np.std(scores, ddof=1):.2f}', scores, flush=True)
    for kind in set(KINDS) - {'none'}:
        assert mean[kind] > mean['none'] + 0.5
