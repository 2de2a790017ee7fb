"""Choose the dtype of training and torch's CUDA settings, and scale the loss."""
import functools
import logging
from collections.abc import Callable

import torch
import torch.nn as nn

from errors import UsageError

logger = logging.getLogger(__name__)


def find_apex():
    """Return NVIDIA's apex.amp, or None if it is not installed.

    Releases after 25.04 have no amp, and the package apex on PyPI is unrelated.
    """
    try:
        from apex import amp
    except Exception:  # An unrelated package named apex can raise exceptions of any type.
        return None
    return amp if hasattr(amp, 'initialize') and hasattr(amp, 'scale_loss') else None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of --amp-dtype; 'auto' is float32 on a CPU and a 16-bit type on CUDA."""
    if name == 'auto' and device.type == 'cuda':
        # GPUs before Ampere (T4, V100, RTX 20xx) only emulate bfloat16, without cuDNN convolutions: use float16.
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.float32 if name in ('auto', 'tf32') else getattr(torch, name)


def configure_cuda(amp_dtype: str, is_training: bool, fixed_size: bool) -> None:
    """Enable TF32 for --amp-dtype tf32, let cuDNN benchmark convolutions, and disable cuDNN attention in training.

    cuDNN times its algorithms in the first step and keeps the fastest, which pays off only for a fixed input size.
    """
    if amp_dtype == 'tf32':
        torch.set_float32_matmul_precision('high')  # for matmuls; convolutions use TF32 by default
    torch.backends.cudnn.benchmark = fixed_size
    if is_training:
        # cuDNN attention returns NaN gradients for 64 keys and a frozen position bias (CMT-B; pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)


class NativeScaler(torch.amp.GradScaler):
    """Scale the loss as torch does for float16, or do nothing if disabled."""

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, last: bool) -> None:
        """Compute scaled gradients; `last` marks the last batch of an optimizer step."""
        self.scale(loss).backward()

    @property
    def skips_overflows(self) -> bool:
        """Return whether the scaler itself skips steps with overflowing gradients."""
        return self.is_enabled()


class ApexScaler(NativeScaler):
    """Scale the loss with apex.amp.

    apex unscales when the context of scale_loss ends, and patches the optimizer to skip steps that overflowed. timm's
    ApexScaler unscales, clips and steps in one call, so no check can run in between.
    """
    skips_overflows = True

    def __init__(self, amp):
        super().__init__(enabled=False)
        self.amp = amp

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, last: bool) -> None:
        with self.amp.scale_loss(loss, optimizer, **({} if last else {'delay_unscale': True})) as scaled:
            scaled.backward()

    def state_dict(self) -> dict:
        """Return the state of apex.amp."""
        return self.amp.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of apex.amp."""
        self.amp.load_state_dict(state_dict)


def autocast_to(dtype: torch.dtype, device: torch.device) -> Callable:
    """Return a function that returns the autocast context of a forward pass, disabled for float32."""
    return functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)


def build_precision(
        model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, amp_dtype: str,
        apex_opt_level: str | None = None) -> tuple[nn.Module, torch.optim.Optimizer, NativeScaler, torch.dtype]:
    """Choose the autocast dtype from --amp-dtype, and build the loss scaler; apex patches model and optimizer.

    With `apex_opt_level`, use apex.amp at this level if it is installed, else autocast to float16 (bfloat16 on a CPU).

    Returns:
        Model, optimizer, loss scaler and autocast dtype.
    """
    dtype = resolve_dtype(amp_dtype, device)
    if apex_opt_level is not None:
        apex = find_apex()
        if apex is not None:
            model, optimizer = apex.initialize(model, optimizer, opt_level=apex_opt_level)
            return model, optimizer, ApexScaler(apex), torch.float32
        dtype = torch.float16 if device.type == 'cuda' else torch.bfloat16
        logger.info('--apex-amp: apex.amp is not installed, using torch.autocast to %s', str(dtype)[6:])
    return model, optimizer, NativeScaler(device.type, enabled=dtype == torch.float16), dtype


def load_scaler(scaler: torch.amp.GradScaler, state: dict, file: str) -> None:
    """Load the loss scale; raise UsageError if another kind of scaler saved it."""
    try:
        scaler.load_state_dict(state)
    except (KeyError, RuntimeError):
        raise UsageError(f'{file} was trained with another loss scaler: use the same --apex-amp and '
                         '--amp-dtype') from None
