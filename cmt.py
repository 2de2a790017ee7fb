"""CMT: Convolutional Neural Networks Meet Vision Transformers, in PyTorch, registered with timm.

    import cmt, timm
    model = timm.create_model('cmt_s', pretrained=True)

Paper: Guo et al., https://arxiv.org/abs/2107.06263 (CVPR 2022). The arithmetic is that of the
authors' code, which differs from the paper in LMHSA and CMTStage. Every block takes and returns a feature map
(B, C, H, W) in channels-last memory. Every module that holds weights comes from torch or timm.
"""
import argparse
import contextlib
import math
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates, create_classifier, get_device_dtype, \
    to_2tuple, trunc_normal_, use_fused_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_model_deprecations, \
    register_notrace_function
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.nextvit import merge_pre_bn
from timm.utils.model import reparameterize_model
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

__all__ = ['CMT', 'MODELS', 'checkpoint_filter_fn', 'to_released']


def check_multiples(height: int, width: int) -> Tuple[int, int]:
    """Return height and width, or raise ValueError if they are not multiples of 32."""
    near_h, near_w = max(32, (height + 16) // 32 * 32), max(32, (width + 16) // 32 * 32)
    if height != near_h or width != near_w:
        raise ValueError(f'image size {height}x{width}: use multiples of 32 (nearest: {near_h}x{near_w})')
    return height, width


@register_notrace_function  # torch.fx cannot trace a branch on a shape. Keep the check as one call in traced models.
@torch.fx.wrap
def check_image_size(x: torch.Tensor, img_size: Tuple[int, int], dynamic: bool, in_chans: int = 3) -> torch.Tensor:
    """Check the size of images (B, in_chans, H, W) and return them unchanged; the convolution checks `in_chans`.

    Raises:
        ValueError: the images are not four-dimensional, have channels last, or have the wrong size: not `img_size`, or
            if `dynamic`, not multiples of 32.
    """
    if x.dim() != 4 or x.shape[1] != in_chans and x.shape[3] == in_chans:
        shape = ', '.join([str(size) for size in x.shape])
        raise ValueError(f'images must be (B, {in_chans}, H, W), not ({shape}): unsqueeze or permute them')
    height, width = check_multiples(x.shape[2], x.shape[3])
    if not dynamic and (height != img_size[0] or width != img_size[1]):
        raise ValueError(f'image size {height}x{width}: this model was built for {img_size[0]}x{img_size[1]}; build it '
                         f'with img_size=({height}, {width}) or dynamic_img_size=True (any multiples of 32)')
    return x


@register_notrace_function
@torch.fx.wrap
def resample_position_bias(bias: torch.Tensor, height: int, width: int, sr_ratio: int) -> torch.Tensor:
    """Resample a position bias bicubically over its query grid, then over its key grid.

    The paper (section 3.2) resizes the table (N, N / k^2) itself, which would mix the rows of the grid.

    Args:
        bias: (heads, H, W, H / sr_ratio, W / sr_ratio).
        height, width: query grid of the result, multiples of `sr_ratio`.
        sr_ratio: K/V reduction of the stage.

    Returns:
        (heads, height, width, height / sr_ratio, width / sr_ratio), in the dtype of `bias`; `bias` itself if it already
        has that shape.
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
    return x.reshape(heads, height, width, kh, kw).to(bias.dtype).contiguous()


@register_notrace_function  # Do not trace this: a traced model must check the grad mode on each call.
@torch.fx.wrap
def attention_bias(position_bias: torch.Tensor) -> torch.Tensor:
    """Reshape a position bias (heads, H, W, H / k, W / k) to (1, heads, N, N_kv), padded to a multiple of 8 keys.

    CUDA's fused attention needs aligned rows, and torch would otherwise pad them in every block. The result is detached
    when gradients are disabled: hooks on a block's inputs (such as torch's FLOP counter) fail on a view that requires
    grad, and in inference mode on a Parameter. Traced and exported models do neither, since they may be trained later.
    """
    bias = position_bias.flatten(3).flatten(1, 2).unsqueeze(0)
    if torch.jit.is_tracing():
        return bias
    if not torch.jit.is_scripting():  # TorchScript cannot compile is_exporting.
        if torch.compiler.is_exporting():
            return bias
    bias = F.pad(bias, (0, -bias.shape[3] % 8))
    return bias if torch.is_grad_enabled() else bias.detach()


@contextlib.contextmanager
def _copied_buffers(module: nn.Module):
    """Let `module` update copies of its buffers, so that BatchNorm does not count a recomputed batch twice."""
    originals = [(m, dict(m._buffers)) for m in module.modules()]
    for m, buffers in originals:
        m._buffers.update({name: b.clone() for name, b in buffers.items() if b is not None})
    try:
        yield
    finally:
        for m, buffers in originals:
            m._buffers.update(buffers)


# Blocks, in the paper's order

class GELU(nn.GELU):
    """GELU on the (B, H, W, C) view of a map, which takes half the time of (B, C, H, W) on a CPU."""

    def forward(self, x):
        return F.gelu(x.permute(0, 2, 3, 1), approximate=self.approximate).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, each followed by GELU and BatchNorm (paper section 3.1)."""

    def __init__(
            self, in_chans: int, chs: int, img_size: Tuple[int, int], dynamic_img_size: bool = False,
            gelu: str = 'none', device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_chans = in_chans
        self.img_size = img_size
        self.dynamic_img_size = dynamic_img_size
        self.conv1 = nn.Conv2d(in_chans, chs, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(chs, **dd)
        self.conv2 = nn.Conv2d(chs, chs, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(chs, **dd)
        self.conv3 = nn.Conv2d(chs, chs, 3, padding=1, **dd)
        self.norm3 = nn.BatchNorm2d(chs, **dd)
        self.act = GELU(gelu)

    def forward(self, x):
        x = check_image_size(x, self.img_size, self.dynamic_img_size, self.in_chans)
        # Permute to channels-last memory, since torch.func refuses contiguous(memory_format=torch.channels_last).
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        x = self.norm1(self.act(self.conv1(x)))
        x = self.norm2(self.act(self.conv2(x)))
        return self.norm3(self.act(self.conv3(x)))


class PatchAggregation(nn.Module):
    """2x2 convolution of stride 2, then LayerNorm over channels (paper section 3.1)."""

    def __init__(self, in_chs: int, dim: int, norm_eps: float = 1e-5, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.proj = nn.Conv2d(in_chs, dim, 2, stride=2, **dd)
        self.norm = LayerNorm2d(dim, eps=norm_eps, **dd)

    def forward(self, x):
        return self.norm(self.proj(x))


class LocalPerceptionUnit(nn.Module):
    """LPU(X) = DWConv(X) + X (paper eq. 1)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x):
        return x + self.dw(x)


class SpatialReduction(nn.Module):
    """Reduce the map that K' and V' are computed from: k x k depthwise convolution of stride k, then BatchNorm."""

    def __init__(self, dim: int, ratio: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, ratio, stride=ratio, groups=dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x):
        return self.norm(self.dw(x))

    def reparameterize(self) -> None:
        """Fold BatchNorm into the convolution, for inference."""
        if isinstance(self.norm, _BatchNorm):
            self.dw, self.norm = fuse_conv_bn_eval(self.dw.eval(), self.norm.eval()), nn.Identity()


class LMHSA(nn.Module):
    """Lightweight multi-head self-attention: Softmax(Q K'^T / sqrt(d) + B) V' (paper eq. 3).

    In the paper, K' = DWConv(K) and V' = DWConv(V). As in the authors' code, they are linear maps of
    BatchNorm(DWConv(X)); `sr_ratio` is the paper's k.
    """
    fused_attn: torch.jit.Final[bool]

    def __init__(
            self, dim: int, num_heads: int, sr_ratio: int, qkv_bias: bool = True,
            proj_drop: float = 0., attn_drop: float = 0., device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.head_pad = -self.head_dim % 8  # CUDA's fused 16-bit kernels need a head_dim that is a multiple of 8.
        self.scale = self.head_dim ** -0.5
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.sr = SpatialReduction(dim, sr_ratio, **dd) if sr_ratio > 1 else nn.Identity()
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, bias: Optional[torch.Tensor]):
        # bias: (1, heads, N, N_kv + padding)
        B, C, H, W = x.shape
        q = self.q(x.flatten(2).transpose(1, 2))  # (B, N, C)
        k, v = self.kv(self.sr(x).flatten(2).transpose(1, 2)).chunk(2, dim=-1)  # (B, N_kv, C)
        # (B, heads, N or N_kv, d)
        q, k, v = [t.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for t in [q, k, v]]
        if self.fused_attn:
            if self.head_pad > 0:
                q, k, v = [F.pad(t, (0, self.head_pad)) for t in [q, k, v]]
            if bias is not None:
                # Cast in each block, so that gradients are summed in float32. Slice last, so that rows stay aligned.
                bias = bias.to(q.dtype)[..., :k.shape[2]]
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=self.attn_drop.p if self.training else 0., scale=self.scale)
            if self.head_pad > 0:
                x = x[..., :self.head_dim]
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            if bias is not None:
                attn = attn + bias[..., :k.shape[2]]
            x = self.attn_drop(attn.softmax(dim=-1)) @ v

        x = x.transpose(1, 2).flatten(2)  # (B, N, C)
        return self.proj_drop(self.proj(x)).transpose(1, 2).reshape(B, C, H, W)


class IRFFN(nn.Module):
    """Inverted residual feed-forward network: Conv(F(Conv(X))), F(X) = DWConv(X) + X (paper section 3.2)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0., gelu: str = 'none', device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.expand = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.norm1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.dw = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.norm2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.project = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.norm3 = nn.BatchNorm2d(dim, **dd)
        self.act = GELU(gelu)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        x = self.drop(self.norm1(self.act(self.expand(x))))
        x = self.norm2(self.act(x + self.dw(x)))
        return self.drop(self.norm3(self.project(x)))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold BatchNorm 2 and 3 into the projection, for inference.

        BatchNorm 1 stays: the next convolution pads with zeros, so no bias could replace its shift at the border.
        """
        if isinstance(self.norm2, _BatchNorm) and isinstance(self.norm3, _BatchNorm):
            merge_pre_bn(self.project, self.norm2)
            self.project = fuse_conv_bn_eval(self.project.eval(), self.norm3.eval())
            self.norm2, self.norm3 = nn.Identity(), nn.Identity()


class CMTBlock(nn.Module):
    """Y = LPU(X), Z = Y + LMHSA(LN(Y)), Z + IRFFN(LN(Z)) (paper section 3.2)."""

    def __init__(
            self, dim: int, num_heads: int, sr_ratio: int, mlp_ratio: float, qkv_bias: bool = True,
            proj_drop: float = 0., attn_drop: float = 0., drop_path: float = 0., gelu: str = 'none',
            norm_eps: float = 1e-6, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.lpu = LocalPerceptionUnit(dim, **dd)
        self.norm1 = LayerNorm2d(dim, eps=norm_eps, **dd)
        self.lmhsa = LMHSA(dim, num_heads, sr_ratio, qkv_bias, proj_drop, attn_drop, **dd)
        self.norm2 = LayerNorm2d(dim, eps=norm_eps, **dd)
        self.irffn = IRFFN(dim, int(dim * mlp_ratio), proj_drop, gelu, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x, bias: Optional[torch.Tensor]):
        x = self.lpu(x)
        x = x + self.drop_path1(self.lmhsa(self.norm1(x), bias))
        return x + self.drop_path2(self.irffn(self.norm2(x)))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the LPU's residual into the center tap of its convolution, for inference."""
        if isinstance(self.lpu, LocalPerceptionUnit):
            self.lpu = self.lpu.dw
            self.lpu.weight[:, :, 1, 1] += 1


class CMTStage(nn.Module):
    """Patch aggregation, then blocks (paper section 3.2). As in the authors' code, blocks share a position bias B.

    In the paper, each attention module has its own. B is the paper's table (heads, N, N / k^2) with both grids spelled
    out, (heads, H, W, H / k, W / k): N alone does not distinguish 256x320 from 320x256.
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
        self.aggregation = PatchAggregation(in_chs, dim, 1e-5 if norm_eps is None else norm_eps, **dd)
        key_size = (feat_size[0] // sr_ratio, feat_size[1] // sr_ratio)
        self.register_parameter('position_bias', nn.Parameter(
            torch.empty(num_heads, *feat_size, *key_size, **dd)) if position_bias else None)
        self.blocks = nn.ModuleList([
            CMTBlock(dim, num_heads, sr_ratio, drop_path=rate, norm_eps=1e-6 if norm_eps is None else norm_eps,
                     **block_args, **dd)
            for rate in drop_path])

    def _apply(self, fn, recurse=True):
        # Module.to(memory_format=torch.channels_last) fails on five-dimensional tensors, so pass the bias as a matrix.
        return super()._apply(lambda t: fn(t.flatten(1)).view(t.shape) if t.ndim == 5 else fn(t), recurse)

    def forward(self, x):
        x = self.aggregation(x)
        bias = self.position_bias
        if bias is not None:
            if self.dynamic_img_size:
                bias = resample_position_bias(bias, x.shape[2], x.shape[3], self.sr_ratio)
            bias = attention_bias(bias)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = self._checkpointed(block, x, bias)
            else:
                x = block(x, bias)
        return x

    @torch.jit.ignore
    def _checkpointed(self, block: CMTBlock, x: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        # timm's checkpoint() would count a batch twice in BatchNorm.
        # Under torch.compile, torch's checkpoint() takes no context_fn, and updates buffers only once.
        context = {} if torch.compiler.is_compiling() else dict(
            context_fn=lambda: (contextlib.nullcontext(), _copied_buffers(block)))
        return checkpoint(block, x, bias, use_reentrant=False, **context)


class HeadProjection(nn.Module):
    """1x1 convolution to the classifier's width, BatchNorm and SiLU. As in the released weights, pooling follows."""

    def __init__(self, dim: int, num_features: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.proj = nn.Conv2d(dim, num_features, 1, **dd)
        self.norm = nn.BatchNorm2d(num_features, **dd)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(self.proj(x)))

    def reparameterize(self) -> None:
        """Fold BatchNorm into the convolution, for inference."""
        if isinstance(self.norm, _BatchNorm):
            self.proj, self.norm = fuse_conv_bn_eval(self.proj.eval(), self.norm.eval()), nn.Identity()


class CMT(nn.Module):
    """CMT classifier and backbone.

    Args:
        img_size: input height and width, multiples of 32.
        in_chans: input channels.
        num_classes: classes; 0 removes the classifier.
        global_pool: pooling before the classifier, '' for none, which needs `num_classes=0`.
        stem_chs: channels of the stem.
        embed_dims, depths, num_heads, sr_ratios, mlp_ratios: width, blocks, heads, K/V reduction and IRFFN ratio of
            each stage (paper table 1).
        num_features: width of the head.
        qkv_bias: biases on Q, K and V.
        position_bias: learn a position bias in each stage; MindCV's CMT has none.
        act_layer: 'gelu' (erf) or 'gelu_tanh' (MindCV).
        norm_eps: eps of every LayerNorm (MindCV: 1e-7); None for the released weights' 1e-5 in patch aggregation and
            1e-6 in blocks.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in LMHSA's projection and in the IRFFN.
        attn_drop_rate: dropout on attention.
        drop_path_rate: stochastic depth rate of the last block, rising linearly from 0 at the first.
        dynamic_img_size: accept any multiples of 32, which may change on each call, by resampling the position bias.

    Raises:
        ValueError: the size is not a multiple of 32, the model was not built for it, or `act_layer` is unknown.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3, num_classes: int = 1000,
            global_pool: str = 'avg',
            stem_chs: int = 32,
            embed_dims: Tuple[int, ...] = (64, 128, 256, 512),
            depths: Tuple[int, ...] = (3, 3, 16, 3),
            num_heads: Tuple[int, ...] = (1, 2, 4, 8),
            sr_ratios: Tuple[int, ...] = (8, 4, 2, 1),
            mlp_ratios: Tuple[float, ...] = (4., 4., 4., 4.),
            num_features: int = 1280,
            qkv_bias: bool = True, position_bias: bool = True,
            act_layer: str = 'gelu', norm_eps: Optional[float] = None,
            drop_rate: float = 0., proj_drop_rate: float = 0., attn_drop_rate: float = 0., drop_path_rate: float = 0.,
            dynamic_img_size: bool = False, device=None, dtype=None,
    ):
        model_args = {k: v for k, v in locals().items() if k not in ('self', 'device', 'dtype', '__class__')}
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = check_multiples(*to_2tuple(img_size))
        self.model_args = dict(model_args, img_size=self.img_size)  # for checkpoints; setters update this
        self.dynamic_img_size = dynamic_img_size
        self.feature_info = []
        if act_layer not in ('gelu', 'gelu_tanh'):
            raise ValueError(f"act_layer {act_layer!r}: use 'gelu' or 'gelu_tanh'")
        gelu = 'tanh' if act_layer == 'gelu_tanh' else 'none'  # the `approximate` argument of nn.GELU

        self.stem = Stem(in_chans, stem_chs, self.img_size, dynamic_img_size, gelu, **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=False)
        stages = []
        in_chs = stem_chs
        for i, (dim, depth) in enumerate(zip(embed_dims, depths)):
            reduction = 4 * 2 ** i
            first = sum(depths[:i])
            stages.append(CMTStage(
                in_chs, dim, (self.img_size[0] // reduction, self.img_size[1] // reduction), num_heads[i], sr_ratios[i],
                drop_path[first:first + depth], dynamic_img_size, position_bias, norm_eps, mlp_ratio=mlp_ratios[i],
                qkv_bias=qkv_bias, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, gelu=gelu, **dd))
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
    def _init_weights(m: nn.Module) -> None:
        # Match the authors' code: Kaiming normal with fan-out (not divided by groups), std 0.02 for linear layers.
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
        elif isinstance(m, nn.Linear):
            # Truncate at 5 std. With timm's default bounds of +-2 (100 std), float32 rounds one draw in 2^24 to -2.
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
        """Change the input size, resampling the position bias of each stage."""
        self.img_size = self.stem.img_size = self.model_args['img_size'] = check_multiples(*to_2tuple(img_size))
        for stage, info in zip(self.stages, self.feature_info):
            bias = stage.position_bias
            if bias is None:
                continue
            height, width = (s // info['reduction'] for s in self.img_size)
            resampled = resample_position_bias(bias.detach(), height, width, stage.sr_ratio)
            stage.position_bias = nn.Parameter(resampled, requires_grad=bias.requires_grad)
        update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def fuse(self) -> 'CMT':
        """Return a copy for inference, in eval mode. Its state dict has fewer and different keys.

        This folds BatchNorm after the spatial reduction, around the IRFFN's projection and in the head, and the LPU's
        residual. BatchNorm before padded convolutions stays, and so does FrozenBatchNorm2d. Each child folds itself in
        `reparameterize`, as timm's tools expect.
        """
        return reparameterize_model(self).eval().requires_grad_(False)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier with a new one; keep the pooling if `global_pool` is None."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.model_args.update(num_classes=num_classes, global_pool=global_pool)
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
        """Return the final features (B, num_features, H / 32, W / 32) and a list of the stages' maps (B, C, h, w).

        The arguments are those of timm's models. `norm` is ignored, since the stages end without a norm.
        """
        assert output_fmt == 'NCHW', 'Output format must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a Sequential.
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if torch.jit.is_scripting() or len(stages) == len(self.stages):  # The head reads only the last stage.
            x = self.head_proj(x)
        return x, intermediates

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Remove the stages after the last of `indices`, and the head, which reads the last stage."""
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


# (pattern for a name in this file, released name), where <i> becomes the letter of stage i.
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


def released_name(name: str) -> str:
    for pattern, replacement in _RELEASED_NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r'<(\d)>', lambda m: 'abcd'[int(m[1])], name)


def _with_grids(table: torch.Tensor, stage: CMTStage) -> torch.Tensor:
    """Reshape a released table (heads, N, N_kv) to query and key grids: square if N is a square, else the model's."""
    height = width = math.isqrt(table.shape[1])
    if height * width != table.shape[1]:
        height, width = stage.position_bias.shape[1:3]
    if height * width != table.shape[1] or table.shape[2] * stage.sr_ratio ** 2 != table.shape[1]:
        raise ValueError(
            f'a position bias of {table.shape[1]} x {table.shape[2]} entries is not from a square input: build the '
            'model at its training size (img_size=), load the weights, then call set_input_size')
    return table.reshape(-1, height, width, height // stage.sr_ratio, width // stage.sr_ratio)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: CMT) -> Dict[str, torch.Tensor]:
    """Map weights to the names and sizes of `model`, as timm's `pretrained=True` needs.

    Args:
        state_dict: tensors under released or this project's names, or a checkpoint with them under 'model'.
        model: the model to load them into; position biases of another size are resampled to fit it.

    Returns:
        A state dict for `model.load_state_dict`. It may lack the classifier, and may have stages that `model` lacks.

    Raises:
        ValueError: tensors are missing or unexpected, the grid of a position bias cannot be inferred from its shape, or
            the size or number of classes of a local file differs from `model.pretrained_cfg`.
    """
    state_dict = state_dict.get('model', state_dict)
    bias = state_dict.get('stages.0.position_bias', state_dict.get('relative_pos_a'))
    state_dict, names = to_model(state_dict, model), model.state_dict()
    # With a new head timm loads non-strictly, so missing or extra blocks would go unnoticed.
    errors = [f'{name} missing' for name in names
              if name not in state_dict and not name.startswith('head.') and not name.endswith('.num_batches_tracked')]
    modules = {tuple(name.split('.')[:2]) for name in names}
    errors += [f'{name} unexpected' for name in state_dict
               if name not in names and tuple(name.split('.')[:2]) in modules]
    if errors:
        raise ValueError(f'the weights do not match the model: {len(errors)} tensors differ ({"; ".join(errors[:8])})')
    cfg, classes = getattr(model, 'pretrained_cfg', {}), len(state_dict.get('head.weight', ()))
    wrong = []  # timm would silently resample the position biases or drop the head.
    if bias is not None and (bias.ndim == 5 or math.isqrt(bias.shape[1]) ** 2 == bias.shape[1]):
        grid = bias.shape[1:3] if bias.ndim == 5 else [math.isqrt(bias.shape[1])] * 2
        height, width = [4 * side for side in grid]
        if (height, width) != model.img_size == tuple(cfg.get('input_size', ())[1:]):
            wrong.append(f'input_size=(3, {height}, {width})')
    if 0 < classes == model.num_classes != cfg.get('num_classes'):
        wrong.append(f'num_classes={classes}')
    if cfg.get('file') and wrong:
        raise ValueError(f'the file has {" and ".join(wrong)}: add this to pretrained_cfg_overlay, or use '
                         'weights.load_model')
    return state_dict


def to_model(state_dict: Dict[str, torch.Tensor], model: CMT) -> Dict[str, torch.Tensor]:
    """Map weights to the names and sizes of `model`, as contiguous tensors; keep unknown names.

    Raises:
        ValueError: the grid of a position bias cannot be inferred from its shape.
    """
    state_dict = {name: value.contiguous() for name, value in state_dict.items()}
    for name in model.state_dict():
        released = released_name(name)
        k, v = (state_dict.get(released.replace('.kv.', half)) for half in ('.k.', '.v.'))
        if '.kv.' in released and k is not None and v is not None and k.shape == v.shape and k.ndim:
            state_dict[name] = torch.cat([state_dict.pop(released.replace('.kv.', half)) for half in ('.k.', '.v.')])
        elif released in state_dict and name not in state_dict:
            state_dict[name] = state_dict.pop(released)
    for i, stage in enumerate(model.stages):
        bias = state_dict.get(f'stages.{i}.position_bias')
        if bias is not None and stage.position_bias is not None and bias.ndim in (3, 5) and 0 not in bias.shape:
            bias = _with_grids(bias, stage) if bias.ndim == 3 else bias
            height, width = stage.position_bias.shape[1:3]
            state_dict[f'stages.{i}.position_bias'] = resample_position_bias(bias, height, width, stage.sr_ratio)
    return state_dict


def to_released(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Map weights under this project's names and shapes to those of the authors' code; K and V are copies.

    Raise ValueError for a grid that is not square but has a square number of positions: its table would be ambiguous.
    """
    out = {}
    for name, value in state_dict.items():
        released = released_name(name)
        if '.attn.kv.' in released:
            k, v = value.chunk(2)  # Copied below: huggingface_hub refuses two views of one tensor.
            out[released.replace('.kv.', '.k.')], out[released.replace('.kv.', '.v.')] = k.clone(), v.clone()
        elif released.startswith('relative_pos_'):
            height, width = value.shape[1:3]
            if height != width and math.isqrt(height * width) ** 2 == height * width:
                raise ValueError(f"the authors' code would read the {height}x{width} position bias as a square one")
            out[released] = value.flatten(3).flatten(1, 2)
        else:
            out[released] = value
    return out


class Variant(NamedTuple):
    """Describe a published model."""
    img_size: int  # pixels
    model_args: Dict[str, Any]  # arguments of CMT that differ between the variants (paper table 1)
    released_file: str
    paper_gmacs: float  # 1e9 multiply-adds per image, called FLOPs in the paper (table 2)
    paper_top1: float  # on ImageNet-1k, %


MODELS = {
    'cmt_ti': Variant(160, dict(
        stem_chs=16, embed_dims=(46, 92, 184, 368), depths=(2, 2, 10, 2), mlp_ratios=(3.6,) * 4, drop_rate=0.1),
        'cmt_tiny.pth', 0.6, 79.2),
    'cmt_xs': Variant(192, dict(
        stem_chs=16, embed_dims=(52, 104, 208, 416), depths=(3, 3, 12, 3), mlp_ratios=(3.77,) * 4, drop_rate=0.1),
        'cmt_xs.pth', 1.5, 81.8),
    'cmt_s': Variant(224, dict(
        stem_chs=32, embed_dims=(64, 128, 256, 512), depths=(3, 3, 16, 3), mlp_ratios=(4.,) * 4, drop_rate=0.1),
        'cmt_small.pth', 4.0, 83.5),
    'cmt_b': Variant(256, dict(
        stem_chs=38, embed_dims=(76, 152, 304, 608), depths=(4, 4, 20, 4), mlp_ratios=(4.,) * 4, drop_rate=0.3),
        'cmt_base.pth', 9.3, 84.5),
}


def _cfg(url: str = '', size: int = 224, **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, size, size), 'pool_size': (size // 32, size // 32),
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1', 'classifier': 'head',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2107.06263', 'origin_url': 'https://github.com/ggjy/CMT.pytorch',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    f'{name}.in1k': _cfg(f'https://github.com/ggjy/CMT.pytorch/releases/download/release-v1/{variant.released_file}',
                         variant.img_size) for name, variant in MODELS.items()})


def _create_cmt(variant: str, pretrained: bool, **kwargs) -> CMT:
    # Released checkpoints contain an argparse.Namespace of training arguments. Allow torch.load to unpickle it, which
    # runs no code. Do so on every call, since timm's load_checkpoint clears the list of allowed types.
    torch.serialization.add_safe_globals([argparse.Namespace])
    if kwargs.get('dynamic_img_size', False):
        kwargs['pretrained_cfg_overlay'] = dict(kwargs.get('pretrained_cfg_overlay') or {}, fixed_input_size=False)
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    return build_model_with_cfg(
        CMT, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3)),
        **{'img_size': cfg.input_size[-2:], **MODELS[variant].model_args, **kwargs},
    )


@register_model
def cmt_ti(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-Ti at 160 px: 9.49 M parameters, 0.6 G multiply-adds."""
    return _create_cmt('cmt_ti', pretrained, **kwargs)


@register_model
def cmt_xs(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-XS at 192 px: 15.2 M parameters, 1.5 G multiply-adds."""
    return _create_cmt('cmt_xs', pretrained, **kwargs)


@register_model
def cmt_s(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-S at 224 px: 26.3 M parameters (paper: 25.1 M), 4.0 G multiply-adds."""
    return _create_cmt('cmt_s', pretrained, **kwargs)


@register_model
def cmt_b(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-B at 256 px: 45.7 M parameters, 9.3 G multiply-adds."""
    return _create_cmt('cmt_b', pretrained, **kwargs)


ALIASES = {'cmt_tiny': 'cmt_ti', 'cmt_xsmall': 'cmt_xs', 'cmt_small': 'cmt_s', 'cmt_base': 'cmt_b'}
register_model_deprecations(__name__, ALIASES)
