"""Criteria: what the model's outputs are held against."""
import torch.nn as nn
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy


def build_criterion(soft_targets: bool, smoothing: float = 0.) -> nn.Module:
    """The training loss.

    Args:
        soft_targets: targets are (B, classes) distributions, as mixup and cutmix make them, already smoothed there.
        smoothing: label smoothing for class-index targets (B,).
    """
    if soft_targets:
        return SoftTargetCrossEntropy()
    if smoothing > 0.:
        return LabelSmoothingCrossEntropy(smoothing=smoothing)
    return nn.CrossEntropyLoss()
