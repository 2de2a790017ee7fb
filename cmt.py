"""CMT: Convolutional Neural Networks Meet Vision Transformers, in PyTorch, registered with timm.

    import cmt, timm
    model = timm.create_model('cmt_s', pretrained=True)

Paper: Guo et al., https://arxiv.org/abs/2107.06263 (CVPR 2022). The order of operations is that of the
released weights.

Maps are (B, C, H, W) tensors in channels-last memory, so the (B, H, W, C) view that LayerNorm, attention and the 1x1
convolutions (stored as linear layers) work on costs nothing, and nothing is copied between stages.
"""
import argparse
import contextlib
import copy
import itertools
import math
import re
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, create_classifier, get_device_dtype, to_2tuple, \
    trunc_normal_, use_fused_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_model_deprecations, \
    register_notrace_function
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch.utils.checkpoint import checkpoint

__all__ = ['CMT', 'checkpoint_filter_fn', 'to_released', 'use_kernels']

# The released checkpoints hold their training arguments; this lets torch.load(weights_only=True), and with it
# timm's pretrained=True, read them. A Namespace only carries attributes: unpickling one runs nothing.
torch.serialization.add_safe_globals([argparse.Namespace])

STRIDE = 32  # of the last stage: stem 2, four patch aggregations 2 each
_kernels = None  # the module kernels, from use_kernels() on


def use_kernels(enable: bool = True) -> None:
    """Let all CMT models of this process use the Triton kernels of kernels.py, where their tensors are on CUDA.

    Off until called, for they have not been measured on a GPU yet (docs/performance.md).

    Raises:
        ValueError: no kernels.py, which pip does not install, or no Triton.
    """
    global _kernels
    _kernels = None
    if enable:
        try:
            import kernels
        except ImportError as error:
            raise ValueError(f'the Triton kernels need Triton ({error})') from None
        if not hasattr(kernels, 'add_depthwise'):
            raise ValueError(f'{kernels.__file__} is another package: the Triton kernels need kernels.py beside cmt.py')
        _kernels = kernels


@register_notrace_function  # a branch on a shape breaks torch.fx; as one opaque call it is checked in traced models too
@torch.fx.wrap
def check_image_size(x: torch.Tensor, img_size: Tuple[int, int], dynamic: bool) -> torch.Tensor:
    height, width = x.shape[2], x.shape[3]
    if dynamic:
        if height % 32 != 0 or width % 32 != 0 or height < 32 or width < 32:
            raise ValueError(f'image size {height}x{width}: height and width must be multiples of 32')
    elif height != img_size[0] or width != img_size[1]:
        raise ValueError(
            f'image size {height}x{width}: this model was built for {img_size[0]}x{img_size[1]}; build it with '
            f'img_size=({height}, {width}) or dynamic_img_size=True (any multiples of 32)')
    return x


@register_notrace_function
@torch.fx.wrap
def resample_position_bias(bias: torch.Tensor, height: int, width: int, sr_ratio: int) -> torch.Tensor:
    """Resample a position bias, bicubic, over its query grid and then over its key grid (paper section 3.3).

    Args:
        bias: (heads, H, W, H / sr_ratio, W / sr_ratio).
        height, width: query grid wanted, multiples of `sr_ratio`.
        sr_ratio: K/V reduction of the stage.

    Returns:
        (heads, height, width, height / sr_ratio, width / sr_ratio), in the dtype of `bias`.
    """
    heads, old_h, old_w, old_kh, old_kw = bias.shape
    if old_h == height and old_w == width:
        return bias
    kh, kw = height // sr_ratio, width // sr_ratio
    x = bias if bias.dtype == torch.float64 else bias.float()
    x = x.permute(0, 3, 4, 1, 2).reshape(heads, old_kh * old_kw, old_h, old_w)
    x = F.interpolate(x, size=(height, width), mode='bicubic', align_corners=False)
    x = x.reshape(heads, old_kh, old_kw, height * width).permute(0, 3, 1, 2)  # (heads, N, kh, kw)
    x = F.interpolate(x, size=(kh, kw), mode='bicubic', align_corners=False)
    return x.reshape(heads, height, width, kh, kw).to(bias.dtype)


@register_notrace_function  # dtype and device are not known to torch.fx either
@torch.fx.wrap
def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """F.layer_norm over the last dimension that stays in bfloat16 under autocast to it.

    On CUDA autocast would have it return float32, and with it the residual stream, which starts at one. The kernel
    computes in float32 in either case. float16 is left as it is: its range may be too small for the stream.
    """
    if not torch.jit.is_scripting():
        device = x.device.type
        # autocast does not know meta tensors
        if device != 'meta' and torch.is_autocast_enabled(device) and \
                torch.get_autocast_dtype(device) == torch.bfloat16:
            with torch.autocast(device, enabled=False):
                return F.layer_norm(x.bfloat16(), weight.shape, weight.bfloat16(), bias.bfloat16(), eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@register_notrace_function
@torch.fx.wrap
def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Optional[torch.Tensor], scale: float, drop: float,
        fused: bool) -> torch.Tensor:
    """Softmax(Q K^T * scale + B) V.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, N_kv, d).
        bias: (heads, N, N_kv).
        scale: of the scores.
        drop: rate of dropout on attention.
        fused: use scaled_dot_product_attention, but on CPU, where it is the slower one (docs/performance.md).
    """
    if not torch.jit.is_scripting():
        if _kernels is not None and fused and drop == 0. and _kernels.attends(q, k, v):
            return _kernels.attention(q, k, v, bias, scale)
    if fused and not q.is_cpu:
        mask = None if bias is None else bias.unsqueeze(0)  # with three dimensions no fused kernel takes it
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
    attn = q @ (k * scale).transpose(-2, -1)  # (B, heads, N, N_kv); K is the smaller one to scale
    if bias is not None:
        attn = attn + bias.to(attn.dtype)  # a float32 table would make float32 scores under autocast
    attn = attn.softmax(dim=-1)
    if drop > 0.:
        attn = F.dropout(attn, drop)
    return attn @ v


@register_notrace_function
@torch.fx.wrap
def add_depthwise(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """x + DW3x3(x), the identity as a centre tap of the kernel where that is exact: a pass over memory less each way.

    Under autocast the tap would round the weights away: bfloat16 has eight bits for 1 + w.
    """
    # a trace, of which FLOPs are counted, shows the model's own operations
    if not (torch.jit.is_scripting() or torch.jit.is_tracing()):
        if _kernels is not None and _kernels.takes(x):
            return _kernels.add_depthwise(x, weight, bias)
        wide = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
        if wide and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            identity = F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
            return F.conv2d(x, weight + identity, bias, padding=1, groups=weight.shape[0])
    return x + F.conv2d(x, weight, bias, padding=1, groups=weight.shape[0])


def build_act(name: str) -> nn.GELU:
    if name not in ('gelu', 'gelu_tanh'):
        raise ValueError(f"act_layer {name!r}: 'gelu' or 'gelu_tanh'")
    return nn.GELU(approximate='tanh' if name == 'gelu_tanh' else 'none')


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


class Conv1x1(nn.Linear):
    """1x1 convolution as a linear layer on the (B, H, W, C) view."""


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, each followed by GELU and BatchNorm (paper section 3.1)."""

    def __init__(
            self, in_chans: int, chs: int, img_size: Tuple[int, int], dynamic_img_size: bool = False,
            act_layer: str = 'gelu', device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.img_size = img_size
        self.dynamic_img_size = dynamic_img_size
        self.conv1 = nn.Conv2d(in_chans, chs, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(chs, **dd)
        self.conv2 = nn.Conv2d(chs, chs, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(chs, **dd)
        self.conv3 = nn.Conv2d(chs, chs, 3, padding=1, **dd)
        self.norm3 = nn.BatchNorm2d(chs, **dd)
        self.act = build_act(act_layer)

    def forward(self, x):
        x = check_image_size(x, self.img_size, self.dynamic_img_size)
        x = x.contiguous(memory_format=torch.channels_last)
        # here and below GELU sees maps as (B, H, W, C): the CPU's takes twice as long on the other view
        x = self.norm1(self.act(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = self.norm2(self.act(self.conv2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = self.norm3(self.act(self.conv3(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return x


class PatchAggregation(nn.Module):
    """2x2 convolution of stride 2, then LayerNorm over channels (paper section 3.1)."""

    def __init__(self, in_chs: int, dim: int, norm_eps: Optional[float] = None, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.proj = nn.Conv2d(in_chs, dim, 2, stride=2, **dd)
        self.norm = LayerNorm(dim, eps=1e-5 if norm_eps is None else norm_eps, **dd)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LocalPerceptionUnit(nn.Module):
    """LPU(x) = DWConv(x) + x (paper eq. 1)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x):
        return add_depthwise(x, self.dw.weight, self.dw.bias)


class SpatialReduction(nn.Module):
    """k x k depthwise convolution of stride k, then BatchNorm: the map that K and V are made of."""

    def __init__(self, dim: int, ratio: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, ratio, stride=ratio, groups=dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x):
        return self.norm(self.dw(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class LMHSA(nn.Module):
    """Lightweight multi-head self-attention: Softmax(Q K'^T / sqrt(d) + B) V' (paper eq. 3)."""
    fused_attn: torch.jit.Final[bool]

    def __init__(
            self, dim: int, num_heads: int, sr_ratio: int, qkv_bias: bool = True,
            proj_drop: float = 0., attn_drop: float = 0., device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim ** -0.5
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.sr = SpatialReduction(dim, sr_ratio, **dd) if sr_ratio > 1 else nn.Identity()
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, position_bias: Optional[torch.Tensor]):
        # x: (B, H, W, C); position_bias: (heads, N, N_kv)
        B, H, W, C = x.shape
        q = self.q(x).reshape(B, H * W, self.num_heads, self.head_dim).transpose(1, 2)  # (B, heads, N, d)
        kv = self.kv(self.sr(x)).flatten(1, 2).unflatten(2, (2, self.num_heads, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N_kv, d) each

        drop = self.attn_drop.p if self.training else 0.
        x = attend(q, k, v, position_bias, self.scale, drop, self.fused_attn)
        x = x.transpose(1, 2).reshape(B, H, W, C)
        return self.proj_drop(self.proj(x))


class IRFFN(nn.Module):
    """Inverted residual feed-forward network: 1x1, x + DW3x3(x), 1x1, with GELU and BatchNorm (paper eq. 4)."""

    def __init__(
            self, dim: int, hidden_dim: int, drop: float = 0., act_layer: str = 'gelu', device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.expand = Conv1x1(dim, hidden_dim, **dd)
        self.norm1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.dw = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.norm2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.project = Conv1x1(hidden_dim, dim, **dd)
        self.norm3 = nn.BatchNorm2d(dim, **dd)
        self.act = build_act(act_layer)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        # (B, H, W, C) in, (B, C, H, W) out
        x = self.expand(x)
        if not torch.jit.is_scripting():
            if self._folds(x):
                norm1, dw, norm2, project = self.norm1, self.dw, self.norm2, self.project
                x = _FoldedTraining.apply(
                    x, norm1, norm2, self.act.approximate, norm1.weight, norm1.bias, dw.weight, dw.bias,
                    norm2.weight, norm2.bias, project.weight, project.bias)
                return self.norm3(x.permute(0, 3, 1, 2))
        x = self.norm1(self.act(x).permute(0, 3, 1, 2))
        x = self.drop(x)
        x = add_depthwise(x, self.dw.weight, self.dw.bias).permute(0, 2, 3, 1)
        x = self.norm2(self.act(x).permute(0, 3, 1, 2))
        x = self.norm3(self.project(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.drop(x)

    def _folds(self, x) -> bool:
        """Whether training goes by _FoldedTraining: on CPU, where it was measured, and where nobody can tell."""
        if not self.training or type(x) is not torch.Tensor or not x.is_cpu or self.drop.p > 0.:
            return False
        if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled('cpu'):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return False
        modules, norms = (self.norm1, self.dw, self.norm2, self.project, self.act), (self.norm1, self.norm2)
        return (
            x.shape[:3].numel() > 1  # which BatchNorm refuses
            and [type(m) for m in modules] == [nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, Conv1x1, nn.GELU]
            and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
                        for m in modules)
            and all(m.training and m.affine and m.track_running_stats and m.momentum is not None for m in norms)
        )


class _FoldedTraining(torch.autograd.Function):
    """An IRFFN in training from its first GELU to its last product, without making the maps that BatchNorm returns.

    The scale that follows from a batch goes into the next weights and the shift into their bias, at the borders of the
    3x3 convolution less what would fall on its padding, which is zeros behind BatchNorm. The gradients of scale and
    shift then follow from those of the weights. Of each hidden map that saves two passes over memory forward, two
    backward, and two of six maps that are kept for the backward pass. torch has nothing that does it on a CPU.
    """

    @staticmethod
    def forward(ctx, x, norm1, norm2, approximate, weight1, bias1, dw, dw_bias, weight2, bias2, project, project_bias):
        # (B, H, W, C) in, (B, H, W, dim) out
        a = F.gelu(x, approximate=approximate)
        mean1, rstd1 = _batch_statistics(a, norm1)
        scale1 = weight1 * rstd1
        shift1 = bias1 - mean1 * scale1
        kernel = dw[:, 0] + F.pad(dw.new_ones(1, 1), (1, 1, 1, 1))  # x + DW(x)
        scaled = (kernel * scale1[:, None, None])[:, None]
        shifts = kernel * shift1[:, None, None]  # what the shift gives by each of the taps
        y = F.conv2d(a.permute(0, 3, 1, 2), scaled, dw_bias + shifts.sum((1, 2)), padding=1, groups=len(dw))
        y = y.permute(0, 2, 3, 1)
        for i, row in _BORDERS:
            y[:, row] -= shifts[:, i].sum(1)
            y[:, :, row] -= shifts[:, :, i].sum(1)
            for j, column in _BORDERS:
                y[:, row, column] += shifts[:, i, j]
        b = F.gelu(y, approximate=approximate)
        mean2, rstd2 = _batch_statistics(b, norm2)
        scale2 = weight2 * rstd2
        shift2 = bias2 - mean2 * scale2
        projected = project * scale2
        ctx.approximate, ctx.eps = approximate, (norm1.eps, norm2.eps)
        ctx.save_for_backward(
            x, weight1, bias1, dw, dw_bias, weight2, bias2, project, project_bias,
            a, y, b, mean1, rstd1, scale1, shift1, kernel, scaled, mean2, rstd2, scale2, shift2, projected)
        return F.linear(b, projected, torch.addmv(project_bias, project, shift2))

    @staticmethod
    def again(ctx, x, weight1, bias1, dw, dw_bias, weight2, bias2, project, project_bias):
        """The same by torch's own operations, for gradients of gradients."""
        a = F.gelu(x, approximate=ctx.approximate).permute(0, 3, 1, 2)
        a = F.batch_norm(a, None, None, weight1, bias1, training=True, eps=ctx.eps[0])
        b = F.gelu(add_depthwise(a, dw, dw_bias).permute(0, 2, 3, 1), approximate=ctx.approximate).permute(0, 3, 1, 2)
        b = F.batch_norm(b, None, None, weight2, bias2, training=True, eps=ctx.eps[1])
        return F.linear(b.permute(0, 2, 3, 1), project, project_bias)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            inputs, needed = saved[:9], [ctx.needs_input_grad[i] for i in (0, *range(4, 12))]
            found = iter(torch.autograd.grad(
                _FoldedTraining.again(ctx, *inputs), list(itertools.compress(inputs, needed)), grad, create_graph=True))
            d, *rest = [next(found) if is_needed else None for is_needed in needed]
            return d, None, None, None, *rest
        x, weight1, _, _, _, weight2, _, project, _ = saved[:9]
        a, y, b, mean1, rstd1, scale1, shift1, kernel, scaled, mean2, rstd2, scale2, shift2, projected = saved[9:]
        B, H, W, C = x.shape
        grad, b = grad.reshape(B * H * W, -1), b.reshape(-1, C)
        d_project_bias = torch.mv(grad.t(), grad.new_ones(len(grad)))  # half the time of grad.sum(0)
        d_projected = grad.t() @ b
        d_shift2 = torch.mv(project.t(), d_project_bias)
        d_project = torch.addr(d_projected * scale2, d_project_bias, shift2)
        d_weight2, constant, linear = _through_statistics(
            (d_projected * project).sum(0), d_shift2, weight2, mean2, rstd2, len(b))
        d = torch.addcmul(constant, b, linear).addmm_(grad, projected).view(B, H, W, C)
        d = torch.ops.aten.gelu_backward.grad_input(d, y, approximate=ctx.approximate, grad_input=d)

        maps = d.permute(0, 3, 1, 2)
        _, d_scaled, d_dw_bias = torch.ops.aten.convolution_backward(
            maps, a.permute(0, 3, 1, 2), scaled, [C], [1, 1], [1, 1], [1, 1], False, [0, 0], C, [False, True, True])
        sums = d_dw_bias.repeat(3, 3, 1)  # of the gradient where a tap does not fall on the padding
        for i, row in _BORDERS:
            sums[i] -= d[:, row].sum((0, 1))
            sums[:, i] -= d[:, :, row].sum((0, 1))
            for j, column in _BORDERS:
                sums[i, j] += d[:, row, column].sum(0)
        sums = sums.permute(2, 0, 1)
        d_shift1 = (kernel * sums).sum((1, 2))
        d_dw = d_scaled[:, 0] * scale1[:, None, None] + sums * shift1[:, None, None]
        d_weight1, constant, linear = _through_statistics(
            (d_scaled[:, 0] * kernel).sum((1, 2)), d_shift1, weight1, mean1, rstd1, B * H * W)
        # the input's gradient as a convolution forward, which takes a bias
        d = F.conv2d(maps, scaled.flip(2, 3), constant, padding=1, groups=C).permute(0, 2, 3, 1).addcmul_(a, linear)
        d = torch.ops.aten.gelu_backward.grad_input(d, x, approximate=ctx.approximate, grad_input=d)
        return (d, None, None, None, d_weight1, d_shift1, d_dw[:, None], d_dw_bias,
                d_weight2, d_shift2, d_project, d_project_bias)


_BORDERS = ((0, 0), (2, -1))  # a tap of three, and the row or column of outputs for which it falls on the padding


def _batch_statistics(x: torch.Tensor, norm: nn.BatchNorm2d) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / standard deviation by channel of (B, H, W, C), which go into the running statistics too."""
    norm.num_batches_tracked.add_(1)
    mean, var = torch.batch_norm_update_stats(x.flatten(0, 2), norm.running_mean, norm.running_var, norm.momentum)
    return mean, (var + norm.eps).rsqrt()


def _through_statistics(d_scale, d_shift, weight, mean, rstd, count: int):
    """From the gradients of scale = weight * rstd and shift = bias - mean * scale those of the weight, and of the input
    x as constant + linear * x.
    """
    d_scale = d_scale - mean * d_shift
    linear = d_scale * weight * rstd ** 3 / -count
    return d_scale * rstd, weight * rstd * d_shift / -count - linear * mean, linear


class Affine(nn.Module):
    """x * scale + shift by channel: what is left of a BatchNorm in evaluation."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        scale, shift = _scale_and_shift(norm)
        self.register_buffer('scale', scale.to(norm.weight.dtype)[:, None, None])
        self.register_buffer('shift', shift.to(norm.weight.dtype)[:, None, None])

    def forward(self, x):
        return torch.addcmul(self.shift, x, self.scale)


@register_notrace_function
@torch.fx.wrap
def affine_depthwise_act(
        x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor],
        approximate: str) -> torch.Tensor:
    """GELU(DW3x3(x * scale + shift))."""
    if not (torch.jit.is_scripting() or torch.jit.is_tracing()):
        if _kernels is not None and approximate == 'none' and _kernels.takes(x) and not x.requires_grad:
            return _kernels.affine_depthwise_gelu(x, scale, shift, weight, bias)
    x = F.conv2d(torch.addcmul(shift, x, scale), weight, bias, padding=1, groups=weight.shape[0])
    return F.gelu(x.permute(0, 2, 3, 1), approximate=approximate).permute(0, 3, 1, 2)


class FusedIRFFN(nn.Module):
    """An IRFFN in inference form. Its first BatchNorm stays, as an affine map: the zeros that pad the 3x3 convolution
    come after it, so that its shift could only go into that convolution with another bias at each border.
    """

    def __init__(self, irffn: IRFFN):
        super().__init__()
        self.expand, self.act, self.affine, self.dw = irffn.expand, irffn.act, Affine(irffn.norm1), irffn.dw
        _add_identity(self.dw)
        self.project = irffn.project
        _fold_before(irffn.norm2, self.project)
        _fold_after(self.project, irffn.norm3)

    def forward(self, x):
        x = self.act(self.expand(x)).permute(0, 3, 1, 2)
        x = affine_depthwise_act(
            x, self.affine.scale, self.affine.shift, self.dw.weight, self.dw.bias, self.act.approximate)
        return self.project(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _scale_and_shift(norm: nn.BatchNorm2d) -> Tuple[torch.Tensor, torch.Tensor]:
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _fold_after(conv: Union[nn.Conv2d, nn.Linear], norm: nn.BatchNorm2d) -> None:
    """conv, then norm, as conv."""
    scale, shift = _scale_and_shift(norm)
    conv.weight.copy_((conv.weight.double().transpose(0, -1) * scale).transpose(0, -1))
    conv.bias.copy_(conv.bias.double() * scale + shift)


def _fold_before(norm: nn.BatchNorm2d, conv: Union[nn.Conv2d, nn.Linear]) -> None:
    """norm, then conv, as conv; one without padding and groups."""
    scale, shift = _scale_and_shift(norm)
    weight = conv.weight.double().flatten(2) if conv.weight.ndim == 4 else conv.weight.double()[:, :, None]
    conv.bias.copy_(conv.bias.double() + torch.einsum('oit,i->o', weight, shift))
    conv.weight.copy_((weight * scale[:, None]).view_as(conv.weight))


def _add_identity(conv: nn.Conv2d) -> None:
    """x + conv(x) of a depthwise 3x3 convolution, as conv."""
    conv.weight[:, 0, 1, 1] += 1


class CMTBlock(nn.Module):
    """LPU, then LMHSA and IRFFN behind LayerNorm and a residual each (paper eq. 5-7)."""

    def __init__(
            self, dim: int, num_heads: int, sr_ratio: int, mlp_ratio: float, qkv_bias: bool = True,
            proj_drop: float = 0., attn_drop: float = 0., drop_path: float = 0., act_layer: str = 'gelu',
            norm_eps: Optional[float] = None, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        eps = 1e-6 if norm_eps is None else norm_eps
        self.lpu = LocalPerceptionUnit(dim, **dd)
        self.norm1 = LayerNorm(dim, eps=eps, **dd)
        self.lmhsa = LMHSA(dim, num_heads, sr_ratio, qkv_bias, proj_drop, attn_drop, **dd)
        self.norm2 = LayerNorm(dim, eps=eps, **dd)
        self.irffn = IRFFN(dim, int(dim * mlp_ratio), proj_drop, act_layer, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x, position_bias: Optional[torch.Tensor]):
        x = self.lpu(x)
        x = x + self.drop_path1(self.lmhsa(self.norm1(x.permute(0, 2, 3, 1)), position_bias)).permute(0, 3, 1, 2)
        x = x + self.drop_path2(self.irffn(self.norm2(x.permute(0, 2, 3, 1))))
        return x


@contextlib.contextmanager
def _spare_buffers(module: nn.Module):
    """Let `module` work on copies of its buffers: recomputing a block must not count its batch twice in BatchNorm."""
    kept = [(m, dict(m._buffers)) for m in module.modules()]
    for m, buffers in kept:
        m._buffers.update({name: b.clone() for name, b in buffers.items() if b is not None})
    try:
        yield
    finally:
        for m, buffers in kept:
            m._buffers.update(buffers)


class CMTStage(nn.Module):
    """Patch aggregation, then blocks that share one learned position bias (paper section 3.2).

    The bias is the paper's table (heads, N, N / k^2) with its two grids spelled out, (heads, H, W, H / k, W / k): the
    shape then tells a 256x320 table from a 320x256 one, which have the same N.
    """

    def __init__(
            self, in_chs: int, dim: int, feat_size: Tuple[int, int], num_heads: int, sr_ratio: int,
            drop_path: List[float], dynamic_img_size: bool = False, position_bias: bool = True,
            norm_eps: Optional[float] = None, device=None, dtype=None, **block_args):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.dynamic_img_size = dynamic_img_size
        self.sr_ratio = sr_ratio
        self.aggregation = PatchAggregation(in_chs, dim, norm_eps, **dd)
        key_size = (feat_size[0] // sr_ratio, feat_size[1] // sr_ratio)
        self.register_parameter('position_bias', nn.Parameter(
            torch.empty(num_heads, *feat_size, *key_size, **dd)) if position_bias else None)
        self.blocks = nn.ModuleList([
            CMTBlock(dim, num_heads, sr_ratio, drop_path=rate, norm_eps=norm_eps, **block_args, **dd)
            for rate in drop_path])

    def _apply(self, fn, recurse=True):
        # Module.to(memory_format=torch.channels_last) asks it of all that has four or five dimensions, and torch
        # refuses it to five: the bias is seen as a matrix, which stays as it is
        return super()._apply(lambda t: fn(t.flatten(1)).view(t.shape) if t.ndim == 5 else fn(t), recurse)

    def forward(self, x):
        x = self.aggregation(x)
        bias = self.position_bias
        if bias is not None:
            if self.dynamic_img_size:
                bias = resample_position_bias(bias, x.shape[2], x.shape[3], self.sr_ratio)
            bias = bias.flatten(3).flatten(1, 2)  # (heads, N, N_kv)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = self._checkpointed(block, x, bias)
            else:
                x = block(x, bias)
        return x

    @torch.jit.ignore
    def _checkpointed(self, block: CMTBlock, x: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        if torch.compiler.is_compiling():  # takes no context_fn, and updates buffers once by itself
            return checkpoint(block, x, bias, use_reentrant=False)
        return checkpoint(
            block, x, bias, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _spare_buffers(block)))


class HeadProjection(nn.Module):
    """1x1 convolution to the width of the classifier, BatchNorm, SiLU."""

    def __init__(self, dim: int, num_features: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.proj = Conv1x1(dim, num_features, **dd)
        self.norm = nn.BatchNorm2d(num_features, **dd)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class CMT(nn.Module):
    """CMT classifier and backbone.

    Args:
        img_size: input height and width, multiples of 32.
        in_chans: input channels.
        num_classes: classes; 0 removes the classifier.
        global_pool: pooling before the classifier, '' for none.
        stem_chs: channels of the stem.
        embed_dims, depths, num_heads, sr_ratios, mlp_ratios: width, blocks, heads, K/V reduction and IRFFN ratio of
            each stage (paper table 1).
        num_features: width of the head.
        qkv_bias: biases on Q, K and V.
        position_bias: a learned position bias in each stage; MindCV's CMT has none.
        act_layer: 'gelu', the erf form, or 'gelu_tanh', MindCV's.
        norm_eps: of every LayerNorm, MindCV's is 1e-7; the released weights' (1e-5 and 1e-6) where None.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in LMHSA's projection and in the IRFFN.
        attn_drop_rate: dropout on attention.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        dynamic_img_size: take any multiples of 32 call by call, resampling the position bias.

    Raises:
        ValueError: a size that is not a multiple of 32, or not the one that the model was built for.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            stem_chs: int = 32,
            embed_dims: Tuple[int, ...] = (64, 128, 256, 512),
            depths: Tuple[int, ...] = (3, 3, 16, 3),
            num_heads: Tuple[int, ...] = (1, 2, 4, 8),
            sr_ratios: Tuple[int, ...] = (8, 4, 2, 1),
            mlp_ratios: Tuple[float, ...] = (4., 4., 4., 4.),
            num_features: int = 1280,
            qkv_bias: bool = True,
            position_bias: bool = True,
            act_layer: str = 'gelu',
            norm_eps: Optional[float] = None,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            dynamic_img_size: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = self._checked_size(img_size)
        self.dynamic_img_size = dynamic_img_size
        self.feature_info = []

        self.stem = Stem(in_chans, stem_chs, self.img_size, dynamic_img_size, act_layer, **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=False)
        stages = []
        in_chs = stem_chs
        for i, (dim, depth) in enumerate(zip(embed_dims, depths)):
            reduction = 4 * 2 ** i
            first = sum(depths[:i])
            stages.append(CMTStage(
                in_chs, dim, (self.img_size[0] // reduction, self.img_size[1] // reduction), num_heads[i], sr_ratios[i],
                drop_path[first:first + depth], dynamic_img_size, position_bias, norm_eps, mlp_ratio=mlp_ratios[i],
                qkv_bias=qkv_bias, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, act_layer=act_layer, **dd))
            in_chs = dim
            self.feature_info += [dict(num_chs=dim, reduction=reduction, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)

        self.num_features = num_features
        self.head_proj = HeadProjection(in_chs, num_features, **dd)
        self.global_pool, self.head_drop, self.head = create_classifier(
            num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()

        self.apply(self._init_weights)

    @staticmethod
    def _checked_size(img_size: Union[int, Tuple[int, int]]) -> Tuple[int, int]:
        height, width = to_2tuple(img_size)
        if min(height, width) < STRIDE or height % STRIDE or width % STRIDE:
            raise ValueError(f'image size {height}x{width}: height and width must be multiples of {STRIDE}')
        return height, width

    @staticmethod
    def _init_weights(m: nn.Module) -> None:
        # what the paper calls a convolution: Kaiming normal on fan-out, undivided by groups; other linear layers: 0.02
        if isinstance(m, (nn.Conv2d, Conv1x1)):
            nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
        elif isinstance(m, nn.Linear):
            # at 5 std: with the default bounds, +-2, float32 rounds one draw in 2^24 to -2, a hundred std away
            trunc_normal_(m.weight, std=.02, a=-.1, b=.1)
        elif isinstance(m, CMTStage) and m.position_bias is not None:
            nn.init.normal_(m.position_bias)
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None:
            nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        if coarse:
            return dict(stem=r'^stem', blocks=[(r'^stages\.(\d+)', None), (r'^head_proj', (99999,))])
        return dict(stem=r'^stem', blocks=[
            (r'^stages\.(\d+)\.(?:aggregation|position_bias)', (0,)),
            (r'^stages\.(\d+)\.blocks\.(\d+)', None),
            (r'^head_proj', (99999,)),
        ])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Rebuild for another input size: the position bias is resampled, all else stays."""
        self.img_size = self.stem.img_size = self._checked_size(img_size)
        for stage, info in zip(self.stages, self.feature_info):
            bias = stage.position_bias
            if bias is None:
                continue
            height, width = (s // info['reduction'] for s in self.img_size)
            resampled = resample_position_bias(bias.detach(), height, width, stage.sr_ratio)
            stage.position_bias = nn.Parameter(resampled, requires_grad=bias.requires_grad)
        update_model_input_size(self, self.img_size)

    @torch.no_grad()
    @torch.jit.ignore
    def fuse(self) -> 'CMT':
        """A copy in inference form: residuals of depthwise convolutions inside them, BatchNorm inside its neighbours.

        The algebra is exact, done in float64. The copy is in eval mode, is not for training, and has a state dict of
        its own.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        if isinstance(model.stem.norm1, Affine):  # it is one already
            return model
        for module in model.modules():
            if isinstance(module, SpatialReduction):
                _fold_after(module.dw, module.norm)
                module.norm = nn.Identity()
            elif isinstance(module, CMTBlock):
                _add_identity(module.lpu.dw)
                module.lpu = module.lpu.dw
                module.irffn = FusedIRFFN(module.irffn)
        stem = model.stem
        stem.norm1, stem.norm2 = Affine(stem.norm1), Affine(stem.norm2)  # before padded convolutions
        _fold_before(stem.norm3, model.stages[0].aggregation.proj)
        stem.norm3 = nn.Identity()
        if isinstance(model.head_proj, HeadProjection):
            _fold_after(model.head_proj.proj, model.head_proj.norm)
            model.head_proj.norm = nn.Identity()
        return model

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, freshly initialised; the pooling stays where `global_pool` is None."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **get_device_dtype(self))
        self._init_weights(self.head)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_intermediates(
            self, x: torch.Tensor, indices: Optional[Union[int, List[int]]] = None, norm: bool = False,
            stop_early: bool = False, output_fmt: str = 'NCHW', intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that also returns the maps of stages.

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n stages if int, all if None, those named if a sequence.
            norm: not used, the stages end without a norm.
            stop_early: stop after the last stage wanted.
            output_fmt: 'NCHW'.
            intermediates_only: return the maps alone.

        Returns:
            The final features (B, num_features, H / 32, W / 32), and a list of maps (B, C, h, w).
        """
        assert output_fmt == 'NCHW', 'Output format must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # a Sequential can't be sliced in TorchScript
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if torch.jit.is_scripting() or len(stages) == len(self.stages):  # the head reads the last stage only
            x = self.head_proj(x)
        return x, intermediates

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Drop the stages behind the last one wanted, and the head, which reads the last stage only."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = prune_head or prune_norm or max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_end:
            self.head_proj = nn.Identity()
            self.num_features = self.feature_info[max_index]['num_chs']
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.head_proj(self.stages(self.stem(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


# name here -> released name; <i> stands for a stage. K and V, fused here, are split apart in the two functions below.
_RELEASED_NAMES = (
    (r'^stem\.(conv|norm)(\d)\.', r'stem_\1\2.'),
    (r'^stages\.(\d)\.aggregation\.', r'patch_embed_<\1>.'),
    (r'^stages\.(\d)\.position_bias$', r'relative_pos_<\1>'),
    (r'^stages\.(\d)\.blocks\.', r'blocks_<\1>.'),
    (r'\.lpu\.dw\.', r'.proj.'),
    (r'\.lmhsa\.sr\.dw\.', r'.attn.sr.0.'), (r'\.lmhsa\.sr\.norm\.', r'.attn.sr.1.'), (r'\.lmhsa\.', r'.attn.'),
    (r'\.irffn\.expand\.', r'.mlp.conv1.0.'), (r'\.irffn\.norm1\.', r'.mlp.conv1.2.'),
    (r'\.irffn\.dw\.', r'.mlp.proj.'), (r'\.irffn\.norm2\.', r'.mlp.proj_bn.'),
    (r'\.irffn\.project\.', r'.mlp.conv2.0.'), (r'\.irffn\.norm3\.', r'.mlp.conv2.1.'),
    (r'^head_proj\.proj\.', r'_fc.'), (r'^head_proj\.norm\.', r'_bn.'),
)
# MindSpore's name -> torch's
_MINDSPORE_NAMES = {
    'gamma': 'weight', 'beta': 'bias', 'moving_mean': 'running_mean', 'moving_variance': 'running_var'}


def _released_name(name: str) -> str:
    for pattern, replacement in _RELEASED_NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r'<(\d)>', lambda m: 'abcd'[int(m[1])], name)


def _plain_name(name: str) -> str:
    """Without the prefixes that wrappers add, and under torch's names."""
    path, _, last = re.sub(r'^(module\.|_orig_mod\.)+', '', name).rpartition('.')
    return f'{path}.{_MINDSPORE_NAMES.get(last, last)}' if path else last


def _query_grid(num_queries: int, num_keys: int, stage: CMTStage) -> Tuple[int, int]:
    """Query grid of a released table, (heads, N, N_kv), which does not say it: the model's where N fits, or square."""
    height, width = stage.position_bias.shape[1:3]
    if height * width != num_queries:
        height = width = math.isqrt(num_queries)
    if height * width != num_queries or num_keys * stage.sr_ratio ** 2 != num_queries:
        raise ValueError(
            f'position bias of {num_queries} x {num_keys} entries is of no square input: build the model at the size '
            'that it was trained at (img_size=), load it, then call set_input_size')
    return height, width


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: CMT) -> Dict[str, torch.Tensor]:
    """Map weights onto the names and sizes of `model`.

    Args:
        state_dict: under released, MindCV's or this project's names; or a checkpoint that holds one under `model`,
            `state_dict` or `model_ema`, with or without the `module.` prefix of DistributedDataParallel.
        model: the model that the weights are for; position biases of another size are resampled to its own.

    Returns:
        A state dict for `model.load_state_dict`. Names that are nobody's pass unchanged, for strict loading to list.

    Raises:
        ValueError: a position bias whose grid its shape does not tell.
    """
    for key in ('model', 'state_dict', 'model_ema'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    is_mindspore = any(name.endswith('.moving_mean') for name in state_dict)
    state_dict = {_plain_name(name): value for name, value in state_dict.items()}
    for name, target in model.state_dict().items():
        released = _released_name(name)
        halves = [released.replace('.kv.', half) for half in ('.k.', '.v.')]
        if '.kv.' in released and all(half in state_dict for half in halves):
            state_dict[name] = torch.cat([state_dict.pop(half) for half in halves])
        elif released in state_dict and (released == name or name not in state_dict):
            value = state_dict.pop(released)
            is_conv1x1 = value.ndim == 4 and target.ndim == 2
            state_dict[name] = value.flatten(1) if is_conv1x1 else value
        elif is_mindspore and name.endswith('.num_batches_tracked'):  # MindSpore counts none
            state_dict[name] = torch.zeros_like(target, device='cpu')
    for i, stage in enumerate(model.stages):
        bias = state_dict.get(f'stages.{i}.position_bias')
        if bias is not None and stage.position_bias is not None:
            if bias.ndim not in (3, 5):
                raise ValueError(f'a position bias has 3 or 5 dimensions, not {bias.ndim}')
            if bias.ndim == 3:
                height, width = _query_grid(bias.shape[1], bias.shape[2], stage)
                bias = bias.reshape(-1, height, width, height // stage.sr_ratio, width // stage.sr_ratio)
            height, width = stage.position_bias.shape[1:3]
            state_dict[f'stages.{i}.position_bias'] = resample_position_bias(bias, height, width, stage.sr_ratio)
    return state_dict


def to_released(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The way back: this project's names and shapes to those of the authors' code.

    Raises:
        ValueError: weights without position bias, MindCV's form, which the authors' code does not have.
    """
    if not any(name.endswith('.position_bias') for name in state_dict):
        raise ValueError("these weights have no position bias (MindCV's form): the authors' code can't hold them")
    out = {}
    for name, value in state_dict.items():
        released = _released_name(name)
        if '.attn.kv.' in released:
            out[released.replace('.kv.', '.k.')], out[released.replace('.kv.', '.v.')] = value.chunk(2)
        elif released.startswith('relative_pos_'):
            out[released] = value.flatten(3).flatten(1, 2)
        elif re.search(r'\.conv[12]\.0\.weight$|^_fc\.weight$', released):
            out[released] = value[:, :, None, None]  # linear -> 1x1 convolution
        else:
            out[released] = value
    return out


def _cfg(url: str = '', size: int = 224, **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, size, size), 'pool_size': (size // STRIDE, size // STRIDE),
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1', 'classifier': 'head',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2107.06263', 'origin_url': 'https://github.com/ggjy/CMT.pytorch',
        **kwargs,
    }


_RELEASE = 'https://github.com/ggjy/CMT.pytorch/releases/download/release-v1/'
default_cfgs = generate_default_cfgs({
    'cmt_ti.in1k': _cfg(_RELEASE + 'cmt_tiny.pth', 160),
    'cmt_xs.in1k': _cfg(_RELEASE + 'cmt_xs.pth', 192),
    'cmt_s.in1k': _cfg(_RELEASE + 'cmt_small.pth', 224),
    'cmt_b.in1k': _cfg(_RELEASE + 'cmt_base.pth', 256),
})


def _create_cmt(variant: str, pretrained: bool, model_args: Dict[str, Any], **kwargs) -> CMT:
    if kwargs.get('dynamic_img_size', False):
        kwargs['pretrained_cfg_overlay'] = dict(kwargs.get('pretrained_cfg_overlay') or {}, fixed_input_size=False)
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    model_args = dict(model_args, img_size=cfg.input_size[-2:])
    return build_model_with_cfg(
        CMT, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3)),
        **dict(model_args, **kwargs),
    )


@register_model
def cmt_ti(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-Ti at 160 px: 9.49 M parameters, 0.6 G multiply-adds."""
    model_args = dict(
        stem_chs=16, embed_dims=(46, 92, 184, 368), depths=(2, 2, 10, 2), mlp_ratios=(3.6,) * 4, drop_rate=0.1)
    return _create_cmt('cmt_ti', pretrained, model_args, **kwargs)


@register_model
def cmt_xs(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-XS at 192 px: 15.2 M parameters, 1.5 G multiply-adds."""
    model_args = dict(
        stem_chs=16, embed_dims=(52, 104, 208, 416), depths=(3, 3, 12, 3), mlp_ratios=(3.77,) * 4, drop_rate=0.1)
    return _create_cmt('cmt_xs', pretrained, model_args, **kwargs)


@register_model
def cmt_s(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-S at 224 px: 26.3 M parameters, 4.0 G multiply-adds."""
    model_args = dict(
        stem_chs=32, embed_dims=(64, 128, 256, 512), depths=(3, 3, 16, 3), mlp_ratios=(4.,) * 4, drop_rate=0.1)
    return _create_cmt('cmt_s', pretrained, model_args, **kwargs)


@register_model
def cmt_b(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-B at 256 px: 45.7 M parameters, 9.3 G multiply-adds."""
    model_args = dict(
        stem_chs=38, embed_dims=(76, 152, 304, 608), depths=(4, 4, 20, 4), mlp_ratios=(4.,) * 4, drop_rate=0.3)
    return _create_cmt('cmt_b', pretrained, model_args, **kwargs)


# MindCV's names
ALIASES = {'cmt_tiny': 'cmt_ti', 'cmt_xsmall': 'cmt_xs', 'cmt_small': 'cmt_s', 'cmt_base': 'cmt_b'}
register_model_deprecations(__name__, ALIASES)
