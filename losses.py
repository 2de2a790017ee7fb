"""Criteria: what the model's outputs are held against."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
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


class DistillationLoss(nn.Module):
    """DeiT's knowledge distillation for a model with one head: (1 - alpha) * criterion + alpha * teacher's part.

    Args:
        criterion: loss of outputs and targets.
        kind: 'soft', tau^2 times the KL divergence from the teacher's distribution to the model's, both at temperature
            tau, mean over batch and classes as in DeiT's code; or 'hard', cross-entropy against the teacher's decision.
        alpha: share of the teacher's part. With K classes the soft one is 1 / K of an image's divergence: both parts
            weigh the same at K / (K + 1).
        tau: temperature.
    """

    def __init__(self, criterion: nn.Module, kind: str, alpha: float, tau: float = 1.):
        super().__init__()
        assert kind in ('soft', 'hard')
        self.criterion = criterion
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """Outputs and teacher's logits (B, classes), targets as `criterion` takes them."""
        if self.kind == 'hard':
            distillation = F.cross_entropy(outputs, taught.argmax(dim=1))
        else:
            distillation = self.tau ** 2 / outputs.numel() * F.kl_div(
                F.log_softmax(outputs / self.tau, dim=1), F.log_softmax(taught / self.tau, dim=1),
                reduction='sum', log_target=True)
        return (1 - self.alpha) * self.criterion(outputs, targets) + self.alpha * distillation


class Teacher(nn.Module):
    """A trained model that looks at the batches of another: in eval mode, without gradient.

    Args:
        model: of timm; its cfg says how images are normalised and, where it has no img_size, how large they are.
        mean, std: normalisation of the images that come.
    """

    def __init__(
            self,
            model: nn.Module,
            mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
            std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__()
        config = resolve_model_data_config(model)
        size = getattr(model, 'img_size', None) or config['input_size'][-2:]
        self.size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        mean, std, own_mean, own_std = (
            torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std, config['mean'], config['std']))
        self.register_buffer('scale', std / own_std)
        self.register_buffer('shift', (mean - own_mean) / own_std)
        self.model = model.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> 'Teacher':
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalised images of any size to logits (B, classes)."""
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode='bicubic', align_corners=False, antialias=True)
        return self.model(images * self.scale + self.shift)
