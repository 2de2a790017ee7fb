"""Build training losses with label smoothing, soft targets or distillation."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy


def build_criterion(soft_targets: bool, smoothing: float = 0.) -> nn.Module:
    """Build the training loss. Soft targets (B, classes) are already smoothed; `smoothing` applies to indices (B,)."""
    if soft_targets:
        return SoftTargetCrossEntropy()
    if smoothing > 0.:
        return LabelSmoothingCrossEntropy(smoothing=smoothing)
    return nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """Compute DeiT's distillation loss for a model with one head.

    The loss is (1 - alpha) * criterion + alpha * distillation.

    Args:
        criterion: loss of outputs and targets.
        kind: 'hard' for cross-entropy with the teacher's prediction. 'soft' for tau^2 times the KL divergence from
            the teacher's distribution to the model's, both at temperature tau, mean over batch and classes as in DeiT.
        alpha: weight of the distillation term. With K classes the soft term is 1 / K of an image's divergence, so both
            terms have equal weight at alpha = K / (K + 1).
        tau: temperature.
    """

    def __init__(self, criterion: nn.Module, kind: str, alpha: float, tau: float = 1.):
        super().__init__()
        self.criterion = criterion
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Compute the loss of outputs and teacher logits (B, classes) and targets for `criterion`."""
        if self.kind == 'hard':
            distillation = F.cross_entropy(outputs, teacher_logits.argmax(dim=1))
        else:
            distillation = self.tau ** 2 / outputs.numel() * F.kl_div(
                F.log_softmax(outputs / self.tau, dim=1), F.log_softmax(teacher_logits / self.tau, dim=1),
                reduction='sum', log_target=True)
        return (1 - self.alpha) * self.criterion(outputs, targets) + self.alpha * distillation


class Teacher(nn.Module):
    """Run a trained model on another model's batches, in eval mode and without gradients.

    Args:
        model: timm model. Its config sets the normalization, and the image size if the model has no img_size.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        config = resolve_model_data_config(model)
        size = getattr(model, 'img_size', None) or config['input_size'][-2:]
        self.size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        mean, std, its_mean, its_std = (torch.tensor(value).view(1, -1, 1, 1) for value in (
            IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, config['mean'], config['std']))
        self.register_buffer('scale', std / its_std)
        self.register_buffer('shift', (mean - its_mean) / its_std)
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) of images (B, 3, H, W) of any size, normalized as by engine.Preprocessor."""
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode='bicubic', align_corners=False, antialias=True)
        return self.model(images * self.scale + self.shift)
