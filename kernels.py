"""Triton kernels for CUDA: x + DW3x3(x) with what surrounds it, and attention with a learned position bias.

Off by default, and no model needs them: cmt.use_kernels() lets all models of the process run on them wherever their
tensors are on CUDA, in float32, bfloat16 or float16. Sums are in float32 and in a fixed order, without atomics, so that
a step gives the same bits each time. With TRITON_INTERPRET=1 they run on the CPU, slowly: that is how they are tested
where there is no GPU. What loops run to is a constant: the interpreter of older Tritons can't count to anything else.
"""
import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: torch.Tensor) -> bool:
    """Whether the kernels take tensors like this one."""
    return (x.is_cuda or INTERPRETED and x.is_cpu) and x.dtype in DTYPES


# ---------------------------------------------------------------------------------------------------------------------
# depthwise 3x3. cuDNN's takes several passes in bfloat16, and the identity as a centre tap can't be told from 1 there:
# here weights that come in float32, and the identity, stay so. A program works on BLOCK_W pixels of a row and BLOCK_C
# channels.

@triton.jit
def _pixels(x, row, h, w, H, W, c, C):
    """Of the row h of an image, which is the row `row` of the batch: (BLOCK_W, BLOCK_C), zero outside."""
    at = (row.to(tl.int64) * W + w)[:, None] * C + c[None, :]
    return tl.load(x + at, mask=_inside(h, w, H, W)[:, None] & (c < C)[None, :], other=0.).to(tl.float32)


@triton.jit
def _inside(h, w, H, W):
    h += 0 * w  # Triton 3.9's interpreter makes integers of a scalar truth and a vector of them
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def _depthwise_forward(
        x, weight, bias, scale, shift, out, H, W, C, IDENTITY: tl.constexpr, BIAS: tl.constexpr, AFFINE: tl.constexpr,
        GELU: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles = tl.cdiv(W, BLOCK_W)
    row = tl.program_id(0) // tiles
    h = row % H
    w = (tl.program_id(0) % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    sums = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    if AFFINE:
        a = tl.load(scale + c, mask=in_c, other=0.).to(tl.float32)
        b = tl.load(shift + c, mask=in_c, other=0.).to(tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            y, z = h + (i - 1), w + (j - 1)
            value = _pixels(x, row + (i - 1), y, z, H, W, c, C)
            if AFFINE:  # padding is with zeros that come after it
                value = tl.where(_inside(y, z, H, W)[:, None], value * a[None, :] + b[None, :], 0.)
            tap = tl.load(weight + c * 9 + (i * 3 + j), mask=in_c, other=0.).to(tl.float32)
            sums += value * tap[None, :]
            if IDENTITY and i == 1 and j == 1:
                sums += value
    if BIAS:
        sums += tl.load(bias + c, mask=in_c, other=0.).to(tl.float32)[None, :]
    if GELU:
        sums = 0.5 * sums * (1. + tl.math.erf(sums * 0.7071067811865476))
    at = (row.to(tl.int64) * W + w)[:, None] * C + c[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(w < W)[:, None] & in_c[None, :])


@triton.jit
def _depthwise_backward(
        grad, x, weight, grad_x, sums, rows, H, W: tl.constexpr, C, ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
        BLOCK_C: tl.constexpr):
    """Both gradients of x + DW(x) in one pass: ROWS rows of pixels, whose weight gradients are summed up by program.

    sums: (programs, 10, C), the nine taps and the bias.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    tap = tl.arange(0, 16)[:, None]  # those from 10 on fill up to a power of two
    own = tl.zeros((16, BLOCK_C), tl.float32)
    for r in range(ROWS):
        row = tl.program_id(0) * ROWS + r
        if row < rows:
            h = row % H
            for first in range(0, W, BLOCK_W):
                w = first + tl.arange(0, BLOCK_W)
                value = _pixels(x, row, h, w, H, W, c, C)
                gradient = _pixels(grad, row, h, w, H, W, c, C)
                result = gradient  # of the identity
                own += tl.where(tap == 9, tl.sum(gradient, axis=0)[None, :], 0.)
                for i in tl.static_range(3):
                    for j in tl.static_range(3):
                        # where this pixel was the tap's source
                        gradient = _pixels(grad, row - (i - 1), h - (i - 1), w - (j - 1), H, W, c, C)
                        weights = tl.load(weight + c * 9 + (i * 3 + j), mask=in_c, other=0.).to(tl.float32)
                        result += gradient * weights[None, :]
                        own += tl.where(tap == i * 3 + j, tl.sum(gradient * value, axis=0)[None, :], 0.)
                at = (row.to(tl.int64) * W + w)[:, None] * C + c[None, :]
                tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=(w < W)[:, None] & in_c[None, :])
    at = (tl.program_id(0) * 10 + tap) * C + c[None, :]
    tl.store(sums + at, own, mask=(tap < 10) & in_c[None, :])


def _blocks(width: int, channels: int) -> dict:
    return dict(BLOCK_W=triton.next_power_of_2(min(width, 16)), BLOCK_C=min(triton.next_power_of_2(channels), 64))


@torch.library.custom_op('cmt::depthwise', mutates_args=())
def _depthwise(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None,
        shift: torch.Tensor | None, identity: bool, gelu: bool) -> torch.Tensor:
    B, C, H, W = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    out, blocks = torch.empty_like(x), _blocks(W, C)
    grid = (B * H * triton.cdiv(W, blocks['BLOCK_W']), triton.cdiv(C, blocks['BLOCK_C']))
    bias, scale, shift = (t if t is None else t.contiguous() for t in (bias, scale, shift))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _depthwise_forward[grid](
            x, weight.contiguous(), bias, scale, shift, out, H, W, C, IDENTITY=identity, BIAS=bias is not None,
            AFFINE=scale is not None, GELU=gelu, **blocks)
    return out


@_depthwise.register_fake
def _(x, weight, bias, scale, shift, identity, gelu):
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op('cmt::depthwise_backward', mutates_args=())
def _depthwise_gradients(
        grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of x, and (10, C) those of weight and bias, in float32."""
    B, C, H, W = x.shape
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    grad_x, blocks, rows = torch.empty_like(x), _blocks(W, C), 16
    programs = triton.cdiv(B * H, rows)
    sums = x.new_empty(programs, 10, C, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _depthwise_backward[programs, triton.cdiv(C, blocks['BLOCK_C'])](
            grad, x, weight.contiguous(), grad_x, sums, B * H, H, W, C, ROWS=rows, **blocks)
    return grad_x, sums.sum(0)


@_depthwise_gradients.register_fake
def _(grad, x, weight):
    return torch.empty_like(x, memory_format=torch.channels_last), x.new_empty(10, x.shape[1], dtype=torch.float32)


def _save_depthwise(ctx, inputs, output):
    x, weight, bias, scale, _, identity, gelu = inputs
    assert scale is None and identity and not gelu, 'only x + DW(x) is for training'
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _depthwise_autograd(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x, sums = _depthwise_gradients(grad, x, weight)
    grad_weight = sums[:9].t().reshape(weight.shape).to(weight.dtype)
    return grad_x, grad_weight, sums[9].to(ctx.bias_dtype) if ctx.bias_dtype else None, None, None, None, None


_depthwise.register_autograd(_depthwise_autograd, setup_context=_save_depthwise)


def add_depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x + DW3x3(x), in the dtype of x (B, C, H, W); `weight` (C, 1, 3, 3) and `bias` (C,) may be of a wider one."""
    return _depthwise(x, weight, bias, None, None, True, False)


def affine_depthwise_gelu(
        x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
) -> torch.Tensor:
    """GELU(DW3x3(x * scale + shift)), padded with zeros behind the affine map: inference, one pass over memory."""
    return _depthwise(x, weight, bias, scale.flatten(), shift.flatten(), False, True)


# ---------------------------------------------------------------------------------------------------------------------
# attention: keys are few (25 to 64 at the published sizes), so that a program holds all of them. Fused attention of the
# libraries takes no learned bias, or gives its gradient a batch dimension.

@triton.jit
def _tile(x, stride, first, count, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first to first + BLOCK of (count, D): (BLOCK, BLOCK_D), zero outside."""
    n, d = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return tl.load(x + n.to(tl.int64)[:, None] * stride + d[None, :],
                   mask=(n < count)[:, None] & (d < D)[None, :], other=0.)


@triton.jit
def _probabilities(q, k, bias, first, N, M, scale, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Softmax(Q K^T * scale + B) of one head's tile of queries: (BLOCK_N, BLOCK_M)."""
    n, m = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    scores = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
    if BIAS:
        scores += tl.load(bias + n[:, None] * M + m[None, :], mask=(n < N)[:, None] & (m < M)[None, :],
                          other=0.).to(tl.float32)
    scores = tl.where((m < M)[None, :], scores, float('-inf'))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _attention_forward(
        q, k, v, bias, out, q_batch, q_head, q_row, k_batch, k_head, k_row, out_batch, out_head, out_row, heads, N, M,
        D, scale, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    first = tl.program_id(1) * BLOCK_N
    b, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    queries = _tile(q + b * q_batch + head * q_head, q_row, first, N, D, BLOCK_N, BLOCK_D)
    keys = _tile(k + b * k_batch + head * k_head, k_row, 0, M, D, BLOCK_M, BLOCK_D)
    values = _tile(v + b * k_batch + head * k_head, k_row, 0, M, D, BLOCK_M, BLOCK_D)
    weights = _probabilities(queries, keys, bias + head * N * M, first, N, M, scale, BIAS, BLOCK_N, BLOCK_M)
    result = tl.dot(weights.to(values.dtype), values, input_precision='ieee')
    n, d = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    tl.store(out + b * out_batch + head * out_head + n[:, None] * out_row + d[None, :],
             result.to(out.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _attention_backward_queries(
        grad, q, k, v, bias, grad_q, grad_bias, g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
        dq_batch, dq_head, dq_row, B, heads, N, M, D, scale, CHUNK: tl.constexpr, BIAS: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradients of a tile of queries, image by image of a chunk, and the sum over these images of its bias's.

    grad_bias: (chunks, heads, N, M).
    """
    first, head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    n, m, d = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(CHUNK):
        b = (tl.program_id(2) * CHUNK + i).to(tl.int64)
        if b < B:
            gradient = _tile(grad + b * g_batch + head * g_head, g_row, first, N, D, BLOCK_N, BLOCK_D)
            queries = _tile(q + b * q_batch + head * q_head, q_row, first, N, D, BLOCK_N, BLOCK_D)
            keys = _tile(k + b * k_batch + head * k_head, k_row, 0, M, D, BLOCK_M, BLOCK_D)
            values = _tile(v + b * k_batch + head * k_head, k_row, 0, M, D, BLOCK_M, BLOCK_D)
            weights = _probabilities(queries, keys, bias + head * N * M, first, N, M, scale, BIAS, BLOCK_N, BLOCK_M)
            of_weights = tl.dot(gradient, tl.trans(values), input_precision='ieee')
            of_scores = weights * (of_weights - tl.sum(weights * of_weights, axis=1)[:, None])
            sums += of_scores
            result = tl.dot(of_scores.to(keys.dtype), keys, input_precision='ieee') * scale
            tl.store(grad_q + b * dq_batch + head * dq_head + n[:, None] * dq_row + d[None, :],
                     result.to(grad_q.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])
    if BIAS:
        at = (tl.program_id(2) * heads + head).to(tl.int64) * N * M + n[:, None] * M + m[None, :]
        tl.store(grad_bias + at, sums, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _attention_backward_keys(
        grad, q, k, v, bias, grad_k, grad_v, g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
        heads, N: tl.constexpr, M, D, scale, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr):
    """Gradients of the keys and values of a head of an image; grad_k and grad_v: (B, heads, M, D), contiguous."""
    b, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    keys = _tile(k + b * k_batch + head * k_head, k_row, 0, M, D, BLOCK_M, BLOCK_D)
    values = _tile(v + b * k_batch + head * k_head, k_row, 0, M, D, BLOCK_M, BLOCK_D)
    of_keys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    of_values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):  # queries behind the last are zero, and so is their gradient
        gradient = _tile(grad + b * g_batch + head * g_head, g_row, first, N, D, BLOCK_N, BLOCK_D)
        queries = _tile(q + b * q_batch + head * q_head, q_row, first, N, D, BLOCK_N, BLOCK_D)
        weights = _probabilities(queries, keys, bias + head * N * M, first, N, M, scale, BIAS, BLOCK_N, BLOCK_M)
        of_weights = tl.dot(gradient, tl.trans(values), input_precision='ieee')
        of_scores = weights * (of_weights - tl.sum(weights * of_weights, axis=1)[:, None])
        of_keys += tl.dot(tl.trans(of_scores.to(queries.dtype)), queries, input_precision='ieee') * scale
        of_values += tl.dot(tl.trans(weights.to(gradient.dtype)), gradient, input_precision='ieee')
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at = (b * heads + head) * M * D + m[:, None] * D + d[None, :]
    inside = (m < M)[:, None] & (d < D)[None, :]
    tl.store(grad_k + at, of_keys.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + at, of_values.to(grad_v.dtype.element_ty), mask=inside)


MOST_KEYS, MOST_DIMS = 128, 128  # a program holds (128, 128) of keys and of values
PROGRAMS = 1024  # a few for each processor of a large GPU: as many partial sums of a bias's gradient as that takes


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)  # 16: the least that matrix products take


def _launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
    """Q, K and V with contiguous rows and K and V in one layout, their strides, and the sizes of blocks."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    blocks = dict(BLOCK_N=_block(q.shape[2], 64), BLOCK_M=_block(k.shape[2], MOST_KEYS),
                  BLOCK_D=_block(q.shape[3], MOST_DIMS))
    return q, k, v, (*q.stride()[:3], *k.stride()[:3]), blocks


def _keys_options(width: int) -> dict:
    # loads ahead of a loop that holds so much would not fit into shared memory, and wide heads not into registers
    return dict(num_stages=1, num_warps=8 if width > 64 else 4)


def _like_tokens(q: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, d) in the memory of (B, N, heads, d), which a linear layer takes as it is."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


@torch.library.custom_op('cmt::attention', mutates_args=())
def _attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    (B, heads, N, D), M = q.shape, k.shape[2]
    q, k, v, strides, blocks = _launch(q, k, v)
    out = _like_tokens(q)
    with torch.cuda.device_of(q):
        _attention_forward[B * heads, triton.cdiv(N, blocks['BLOCK_N'])](
            q, k, v, q if bias is None else bias.contiguous(), out, *strides, *out.stride()[:3], heads, N, M, D, scale,
            BIAS=bias is not None, **blocks)
    return out


@_attention.register_fake
def _(q, k, v, bias, scale):
    return _like_tokens(q)


@torch.library.custom_op('cmt::attention_backward', mutates_args=())
def _attention_gradients(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
        scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (B, heads, N, D), M = q.shape, k.shape[2]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    q, k, v, strides, blocks = _launch(q, k, v)
    table = q if bias is None else bias.contiguous()
    grad_q, grad_k, grad_v = _like_tokens(q), q.new_empty(B, heads, M, D), q.new_empty(B, heads, M, D)
    tiles = triton.cdiv(N, blocks['BLOCK_N'])
    chunk = max(1, B * heads * tiles // PROGRAMS)
    chunks = triton.cdiv(B, chunk)
    grad_bias = q.new_empty((chunks, heads, N, M) if bias is not None else (0,), dtype=torch.float32)
    with torch.cuda.device_of(q):
        _attention_backward_queries[tiles, heads, chunks](
            grad, q, k, v, table, grad_q, grad_bias, *grad.stride()[:3], *strides, *grad_q.stride()[:3], B, heads, N, M,
            D, scale, chunk, BIAS=bias is not None, **blocks)
        _attention_backward_keys[(B * heads,)](
            grad, q, k, v, table, grad_k, grad_v, *grad.stride()[:3], *strides, heads, N, M, D, scale,
            BIAS=bias is not None, **blocks, **_keys_options(blocks['BLOCK_D']))
    return grad_q, grad_k, grad_v, grad_bias.sum(0).to(table.dtype) if bias is not None else grad_bias


@_attention_gradients.register_fake
def _(grad, q, k, v, bias, scale):
    return (_like_tokens(q), torch.empty_like(k, memory_format=torch.contiguous_format),
            torch.empty_like(v, memory_format=torch.contiguous_format),
            q.new_empty((0,), dtype=torch.float32) if bias is None else
            torch.empty_like(bias, memory_format=torch.contiguous_format))


def _save_attention(ctx, inputs, output):
    q, k, v, bias, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias)


def _attention_autograd(ctx, grad):
    grad_q, grad_k, grad_v, grad_bias = _attention_gradients(grad, *ctx.saved_tensors, ctx.scale)
    return grad_q, grad_k, grad_v, None if ctx.saved_tensors[3] is None else grad_bias, None


_attention.register_autograd(_attention_autograd, setup_context=_save_attention)


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether attention() takes tensors like these, and is worth it: not in float32, which has no matrix units."""
    return (takes(q) and q.dtype == k.dtype == v.dtype != torch.float32
            and k.shape[2] <= MOST_KEYS and q.shape[3] <= MOST_DIMS)


def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Softmax(Q K^T * scale + B) V of (B, heads, N, d), (B, heads, N_kv, d) and (heads, N, N_kv)."""
    return _attention(q, k, v, bias, scale)
