"""Number formats of training: which one, and what scales the loss for it."""
import torch


def find_apex():
    """apex.amp where NVIDIA's apex is installed and still has it, else None. (PyPI's apex is something else.)"""
    try:
        from apex import amp
    except Exception:  # whatever an unrelated package of that name does when imported
        return None
    return amp if hasattr(amp, 'initialize') and hasattr(amp, 'scale_loss') else None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == 'auto':
        name = 'float32' if device.type != 'cuda' else 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
    return getattr(torch, name)


class NativeScaler(torch.amp.GradScaler):
    """torch's loss scaling, for float16; disabled, it passes everything through."""

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, last: bool) -> None:
        self.scale(loss).backward()

    def parameters(self, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        return [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]

    @property
    def scales(self) -> bool:
        """Whether gradients that overflow are left out by the scale's own doing."""
        return self.is_enabled()


class ApexScaler(NativeScaler):
    """apex.amp's loss scaling: it unscales when scale_loss's context ends, and patches the optimizer to leave out steps
    that overflowed. timm's ApexScaler unscales, clips and steps in one call, which leaves no room between.
    """
    scales = True

    def __init__(self, amp):
        super().__init__(enabled=False)
        self.amp = amp

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, last: bool) -> None:
        with self.amp.scale_loss(loss, optimizer, **({} if last else {'delay_unscale': True})) as scaled:
            scaled.backward()

    def state_dict(self) -> dict:
        return self.amp.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.amp.load_state_dict(state_dict)
