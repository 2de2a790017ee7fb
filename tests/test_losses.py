"""Criteria."""
import math

import pytest
import torch
from timm.data import Mixup

from losses import build_criterion

LOGITS = torch.tensor([[2., 0., -1.], [0., 1., 3.]])
LOG_P = [[x - math.log(sum(map(math.exp, row))) for x in row] for row in LOGITS.tolist()]


@pytest.mark.parametrize('smoothing', [0., 0.2])
def test_class_indices_and_smoothing(smoothing):
    expected = sum(-(1 - smoothing) * row[i] - smoothing * sum(row) / 3 for row, i in zip(LOG_P, (0, 1))) / 2
    loss = build_criterion(False, smoothing)(LOGITS, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('mixup, cutmix', [(0.8, 0.), (0., 1.), (0.8, 1.)])
def test_soft_targets_of_mixup_and_of_cutmix_alone(mixup, cutmix):
    mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.1, num_classes=3)
    _, targets = mix(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    expected = -sum(t * p for ts, ps in zip(targets.tolist(), LOG_P) for t, p in zip(ts, ps)) / 2
    assert build_criterion(True, 0.1)(LOGITS, targets).item() == pytest.approx(expected, rel=1e-5)
    assert targets.sum(1).tolist() == pytest.approx([1, 1])
