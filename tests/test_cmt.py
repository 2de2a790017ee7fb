"""The model: golden values, initialisation, resampling, and what timm asks of its models.

timm's own tests accept a model from outside. They are in its source distribution, not in the wheel:

    pip download --no-deps --no-binary :all: timm==1.0.31 && tar xf timm-1.0.31.tar.gz
    PYTHONPATH=. pytest -p cmt timm-1.0.31/tests/test_models.py -k "cmt_ti and not pretrained"
"""
import argparse
import copy
import functools
import http.server
import io
import json
import math
import pickle
import re
import threading
import zlib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import set_fused_attn, use_fused_attn
from torch.fx import symbolic_trace
from torch.utils.flop_counter import FlopCounterMode

import cmt
from nano import same, small

# what the authors' code computes in float64: state, logits, loss, gradient norms, running statistics
GOLDEN = np.load(Path(__file__).parent / 'golden.npz')
FIGURES = json.loads(GOLDEN['json'].tobytes())


ONE_BLOCK = dict(depths=(1, 1, 1, 1))  # for what takes seconds a block


def images(*size, chans=3):
    return torch.randn(2, chans, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[False, True], ids=['plain', 'fused'])
def attention(request):
    before = use_fused_attn()
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(before)


def drawn(name, shape):
    """The weights that the golden values were computed with, from their released names."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7fffffff)
    z, kind = rng.standard_normal(shape), name.rsplit('.', 1)[-1]
    if kind == 'num_batches_tracked':
        return torch.tensor(0)
    if kind == 'running_var':
        z = 0.5 + rng.random_sample(shape)
    elif kind in ('running_mean', 'bias'):
        z = 0.1 * z
    elif kind == 'weight' and len(shape) == 1:
        z = 1 + 0.1 * z
    elif not name.startswith('relative_pos'):
        z = z / np.sqrt(np.prod(shape[1:]))
    return torch.tensor(z)


def golden_model(name):
    model = timm.create_model(name, drop_rate=0., dtype=torch.float64)
    released = {key: drawn(key, shape) for key, shape in FIGURES[name]['state'].items()}
    model.load_state_dict(cmt.checkpoint_filter_fn(released, model))
    size = FIGURES[name]['img_size']
    return model, released, torch.tensor(np.random.RandomState(size).standard_normal((2, 3, size, size)))


def check_close(result, golden):
    assert np.abs(result.detach().cpu().numpy() - golden).max() <= 1e-9 * np.abs(golden).max()


# golden values and names

def check_golden_values(name, device='cpu'):
    """Compare logits, loss, gradients and running statistics with those of the authors' code, in float64."""
    model, _, x = golden_model(name)
    figures, x = FIGURES[name], x.to(device)
    model.to(device)
    with torch.no_grad():
        check_close(model.eval()(x), GOLDEN[f'{name}.eval_logits'])

    logits = model.train()(x)
    check_close(logits, GOLDEN[f'{name}.train_logits'])
    loss = F.cross_entropy(logits, torch.tensor([1, 2], device=device))
    assert loss.item() == pytest.approx(figures['train_loss'], rel=1e-9)
    loss.backward()
    gradients = cmt.to_released({key: p.grad for key, p in model.named_parameters()})
    assert set(gradients) == set(figures['grad_norm'])
    for key, norm in figures['grad_norm'].items():
        result = gradients[key].norm().item()
        assert result < 1e-12 if norm < 1e-12 else result == pytest.approx(norm, rel=1e-9), key
    after = cmt.to_released(model.state_dict())
    for key, norm in {**figures['running_mean_after'], **figures['running_var_after']}.items():
        assert after[key].norm().item() == pytest.approx(norm, rel=1e-9), key


@pytest.mark.parametrize('name, attention', [
    ('cmt_ti', False), ('cmt_ti', True), ('cmt_xs', True), ('cmt_s', True), ('cmt_b', True)], indirect=['attention'])
def test_golden_values(name, attention):
    assert cmt.LMHSA(64, 1, 8).fused_attn == attention
    check_golden_values(name)


@pytest.mark.parametrize('name', FIGURES)
def test_released_names_load_strictly_and_back_bit_by_bit(name):
    model, released, _ = golden_model(name)
    assert sum(p.numel() for p in model.parameters()) == FIGURES[name]['params']
    back = cmt.to_released(model.state_dict())
    assert set(back) == set(released)
    assert all(back[key].shape == released[key].shape and torch.equal(back[key], released[key]) for key in back)
    again = cmt.checkpoint_filter_fn({'model': model.state_dict()}, model)
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    released['blocks_e.weight'] = torch.zeros(1)
    with pytest.raises(RuntimeError, match='blocks_e.weight'):
        model.load_state_dict(cmt.checkpoint_filter_fn(released, model))


# initialisation: the golden values cannot see it

def check_initialisation(model):
    for key, module in model.named_modules():
        for name, p in module.named_parameters(prefix=key, recurse=False):
            if name.endswith('bias') and p.ndim == 1:
                assert torch.all(p == 0), name
                continue
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                assert torch.all(p == 1), name
                continue
            if isinstance(module, nn.Conv2d):
                std = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            else:
                std = 1. if name.endswith('position_bias') else 0.02
            # n samples estimate std with a relative error of 1 / sqrt(2n), and the mean with std / sqrt(n).
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
            assert std != 0.02 or p.abs().max() < 0.1001, name


@pytest.mark.parametrize('name', FIGURES)
def test_initialisation(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    # The paper's convolutions, 1x1 ones included, and the linear layers of attention are drawn differently.
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    linear = re.compile(r'lmhsa\.(q|kv|proj)$|^head$')
    assert kinds == {name: nn.Linear if linear.search(name) else nn.Conv2d for name in kinds}
    check_initialisation(model)
    model.reset_classifier(2000)
    assert model.head.weight.shape == (2000, 1280)
    check_initialisation(model)


# the position bias and the size of the input

def cubic_matrix(size, new_size):
    """(new_size, size): bicubic interpolation, a = -0.75, half-pixel centres, borders clamped (Keys 1981)."""
    def kernel(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1
        return a * (t ** 3 - 5 * t ** 2 + 8 * t - 4) if t < 2 else 0.
    matrix = np.zeros((new_size, size))
    for i in range(new_size):
        centre = (i + 0.5) * size / new_size - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), size - 1)] += kernel(centre - j)
    return matrix


@pytest.mark.parametrize('old, new', [((64, 64), (96, 96)), ((96, 64), (64, 160))])
@pytest.mark.parametrize('form', ['loading', 'set_input_size', 'dynamic'])
def test_position_bias_is_resampled_over_queries_and_keys(old, new, form):
    source = small(img_size=old, dtype=torch.float64)
    if form == 'loading':
        model = small(img_size=new, dtype=torch.float64)
        model.load_state_dict(cmt.checkpoint_filter_fn(source.state_dict(), model))
    else:
        model = copy.deepcopy(source)
        model.stages[0].position_bias.requires_grad_(False)
        model.set_input_size(new)
        assert [s.position_bias.requires_grad for s in model.stages] == [False, True, True, True]
    for i, (a, b) in enumerate(zip(source.stages, model.stages)):
        table, reduction, k = a.position_bias.detach().numpy(), 4 * 2 ** i, a.sr_ratio
        sizes = [(o // s, n // s) for s in (reduction, reduction * k) for o, n in zip(old, new)]
        expected = np.einsum('nhwij,ah,bw,ci,dj->nabcd', table, *(cubic_matrix(*pair) for pair in sizes), optimize=True)
        assert b.position_bias.shape == expected.shape
        assert np.abs(b.position_bias.detach().numpy() - expected).max() < 1e-12
    if form == 'dynamic':
        dynamic = small(img_size=old, dtype=torch.float64, dynamic_img_size=True).eval()
        x = images(*new).double()
        assert torch.allclose(dynamic(x), model.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('size', [64, (64, 256)])  # The latter has as many positions as 128 px.
def test_released_tables_of_another_size(size):
    source = small(img_size=128)
    model = small(img_size=size)
    model.load_state_dict(cmt.checkpoint_filter_fn(cmt.to_released(source.state_dict()), model))
    source.set_input_size(size)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), model.state_dict().values()))
    with pytest.raises(ValueError, match='384'):  # 16 x 24 or any other grid
        cmt.checkpoint_filter_fn(cmt.to_released(small(img_size=(64, 96)).state_dict()), small(img_size=64))
    with pytest.raises(ValueError, match='16x64'):
        cmt.to_released(small(img_size=(64, 256)).state_dict())


@pytest.mark.parametrize('size', [32, (96, 64), (64, 64)])
def test_weights_of_another_size_can_be_saved(tmp_path, size):
    """safetensors refuses tensors that are not contiguous, and huggingface_hub refuses views of a larger tensor."""
    model, other = small(seed=1), small(img_size=size)
    (tmp_path / 'hub').mkdir()
    mapped = cmt.checkpoint_filter_fn(model.to(memory_format=torch.channels_last).state_dict(), other)
    assert not model.stem.conv1.weight.is_contiguous()
    model = small(seed=1)
    model.set_input_size(size)
    for state in (mapped, model.state_dict(), cmt.to_released(mapped), cmt.to_released(model.state_dict())):
        safetensors.torch.save_file(state, tmp_path / 'model.safetensors')
        huggingface_hub.save_torch_state_dict(state, tmp_path / 'hub')
        for path in (tmp_path / 'model.safetensors', tmp_path / 'hub' / 'model.safetensors'):
            other.load_state_dict(cmt.checkpoint_filter_fn(safetensors.torch.load_file(path), other))
            assert all(torch.equal(value, mapped[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize('make', [lambda m: m, symbolic_trace, torch.jit.script], ids=['eager', 'fx', 'script'])
@pytest.mark.parametrize('dynamic', [False, True])
def test_images_of_a_wrong_size_or_layout_are_refused(make, dynamic):
    """The error names the shape, and the nearest size that works."""
    model = make(small(dynamic_img_size=dynamic).eval())
    for shape, words in (
            ((3, 64, 64), r'\(3, 64, 64\)'), ((2, 64, 64, 3), r'\(2, 64, 64, 3\)'),
            ((1, 3, 8, 64, 64), r'\(1, 3, 8, 64, 64\)'), ((1, 3, 70, 64), '70x64.*32.*64x64'),
            ((1, 3, 100, 80), '100x80.*96x96'), ((1, 3, 65, 0), '65x0.*64x32')):
        with pytest.raises((ValueError, torch.jit.Error), match=f'(?s){words}'):
            model(torch.randn(shape))
    if dynamic:
        assert model(images(96, 32)).shape == (2, 5)
    else:
        with pytest.raises((ValueError, torch.jit.Error), match='(?s)96x64.*64x64'):
            model(images(96, 64))


@pytest.mark.parametrize('size, nearest', [(70, '64x64'), (0, '32x32'), ((60, 112), '64x128')])
def test_a_wrong_size_is_refused_at_construction(size, nearest):
    for build in (lambda: small(img_size=size), lambda: small().set_input_size(size)):
        with pytest.raises(ValueError, match=nearest):
            build()


@pytest.mark.parametrize('dynamic', [False, True])
def test_features_only(dynamic):
    model = timm.create_model('cmt_ti', features_only=True, img_size=64, dynamic_img_size=dynamic).eval()
    assert [tuple(f.shape[1:]) for f in model(images(64, 64))] == [(46, 16, 16), (92, 8, 8), (184, 4, 4), (368, 2, 2)]
    with pytest.raises(ValueError, match='70x64'):
        model(images(70, 64))
    if dynamic:
        assert model(images(96, 64))[3].shape == (2, 368, 3, 2)


# what a user of timm expects

def test_dropout_rates_and_the_rise_of_drop_path():
    model = small(drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.5)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(path, 'drop_prob', 0.) for b in blocks for path in (b.drop_path1, b.drop_path2)]
    assert rates == pytest.approx([r for r in (0., 0.1, 0.2, 0.3, 0.4, 0.5) for _ in range(2)])
    lmhsa = blocks[0].lmhsa
    assert (model.head_drop.p, lmhsa.proj_drop.p, blocks[0].irffn.drop.p, lmhsa.attn_drop.p) == (0.1, 0.2, 0.2, 0.3)
    assert [timm.create_model(n, device='meta').head_drop.p for n in FIGURES] == [0.1, 0.1, 0.1, 0.3]


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed, x = small(), small(), images(64, 64)
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        model.train()(x).square().sum().backward()
    assert torch.equal(plain(x), checkpointed(x))
    for p, q in zip(plain.parameters(), checkpointed.parameters()):
        assert torch.equal(p.grad, q.grad)
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers()):  # the recomputed batch counts once
        assert torch.equal(a, b), name


# tools that act on modules

@pytest.mark.parametrize('train, checkpointing', [(False, False), (True, True)])
def test_every_module_is_called_once_and_its_output_counts(train, checkpointing, attention):
    model, calls = small().train(train), {}
    model.set_grad_checkpointing(checkpointing)
    kinds = nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    assert not [name for name, m in model.named_modules() if list(m.parameters(recurse=False)) and
                not isinstance(m, kinds) and not isinstance(m, cmt.CMTStage)]  # which owns the position bias
    for name, module in modules:
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    x = images(64, 64)
    expected = model(x)
    assert calls == {name: 1 for name, _ in modules}
    for name, module in modules:
        handle = module.register_forward_hook(lambda _, __, output: output + torch.randn_like(output))
        assert not torch.equal(model(x), expected), name
        handle.remove()


@pytest.mark.filterwarnings('ignore')
def test_a_trace_passes_its_check_and_trains():
    """torch.jit.trace runs the model again without gradients, and compares the graphs."""
    model, x = small(**ONE_BLOCK).eval(), images(64, 64)
    traced = torch.jit.trace(model, x[:1])
    assert torch.allclose(traced(x), model(x), atol=1e-6)
    traced(x).square().sum().backward()
    assert all(p.grad is not None for p in traced.parameters())


def test_torch_func(attention):
    model, x = small().eval(), images(64, 64)
    assert torch.allclose(torch.func.vmap(lambda image: model(image[None])[0])(x), model(x), atol=1e-5)

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(len(x)):
        for name, gradient in torch.func.grad(loss)(weights, x[i]).items():
            assert torch.allclose(gradients[name][i], gradient, rtol=1e-3, atol=1e-4), name


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('attention, dynamic', [(False, False), (True, True)], indirect=['attention'])
def test_script_fx_export_and_pickle(dynamic, attention):
    model, x = small(dynamic_img_size=dynamic, **ONE_BLOCK).eval(), images(64, 64)
    expected = model(x)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    assert torch.allclose(torch.jit.load(buffer)(x), expected, atol=1e-6)
    assert torch.equal(symbolic_trace(model)(x), expected)
    with torch.no_grad():  # The graph decides at each call whether to detach the bias.
        graph = symbolic_trace(model.train())
    graph(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model = small(dynamic_img_size=dynamic, **ONE_BLOCK).eval()
    exported = torch.export.export(model, (x,), dynamic_shapes={'x': {0: torch.export.Dim('batch', min=1, max=64)}})
    assert torch.allclose(exported.module()(x[:1]), expected[:1], atol=1e-6)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_intermediates_and_pruning():
    model, x = small().eval(), images(64, 64)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and final.shape == (2, 64, 2, 2)
    assert [m.shape[1:] for m in maps] == [(12, 16, 16), (24, 8, 8), (48, 4, 4), (96, 2, 2)]
    assert torch.equal(model.forward_intermediates(x, indices=[1])[0], final)
    last, early = model.forward_intermediates(x, indices=[1], stop_early=True)
    alone = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert len(early) == len(alone) == 1 and all(torch.equal(m, maps[1]) for m in (last, *early, *alone))
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.stages) == 3 and model.num_features == 48 and isinstance(model.head_proj, nn.Identity)
    assert torch.equal(model(x), maps[2])


def test_channels_last_as_timm_asks_for_it():
    model, x = small(), images(64, 64)
    expected = model.eval()(x)
    for form in (model, model.fuse()):
        form = form.to(memory_format=torch.channels_last)
        assert torch.allclose(form(x), expected, atol=1e-5)


def test_the_input_size_of_a_cfg_is_the_models():
    model = timm.create_model('cmt_ti', pretrained_cfg_overlay=dict(input_size=(3, 96, 64)), device='meta')
    assert model.img_size == (96, 64) and model.pretrained_cfg['input_size'] == (3, 96, 64)
    assert timm.create_model('cmt_ti', device='meta').img_size == (160, 160)
    assert timm.create_model('cmt_ti', img_size=64, device='meta').img_size == (64, 64)


def test_reset_classifier():
    model = small().to(torch.float64).eval()
    model.head_proj.requires_grad_(False)
    model.reset_classifier(7)
    assert model.head.weight.dtype == torch.float64 and not model.head.training
    assert model(images(64, 64).double()).shape == (2, 7) and not model.head_proj.proj.weight.requires_grad
    model.reset_classifier(0)
    assert model(images(64, 64).double()).shape == (2, 64)
    model.reset_classifier(0, '')
    assert model(images(64, 64).double()).shape == (2, 64, 2, 2)
    assert small(in_chans=1, num_classes=0)(images(64, 64, chans=1)).shape == (2, 64)


def test_meta_device_half_precision_and_autocast(attention):
    model = small(device='meta', drop_path_rate=0.1)
    model.set_input_size(96)
    model.reset_classifier(3)
    assert all(t.is_meta for t in model.state_dict().values())
    for dynamic, size in ((False, 64), (True, 96)):
        model, x = small(dynamic_img_size=dynamic).eval(), images(size, 64)
        expected = model(x)
        assert model(x[:0]).shape == (0, 5)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.allclose(model(x).float(), expected, atol=0.03)
        assert torch.allclose(model.to(torch.bfloat16)(x.bfloat16()).float(), expected, atol=0.03)


@pytest.fixture
def server(tmp_path):
    """Serve tmp_path over HTTP, and return the address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{serving.server_port}'
        serving.shutdown()


def test_pretrained_downloads_a_released_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    source = timm.create_model('cmt_ti')
    torch.save({'model': cmt.to_released(source.state_dict()), 'args': argparse.Namespace(lr=1)}, tmp_path / 'ti.pth')
    pretrained = functools.partial(
        timm.create_model, 'cmt_ti', pretrained=True, pretrained_cfg_overlay=dict(url=f'{server}/ti.pth'))
    torch.save(source.state_dict(), tmp_path / 'plain.pth')
    timm.create_model('cmt_ti', checkpoint_path=str(tmp_path / 'plain.pth'))  # timm forbids Namespace afterwards
    assert same(pretrained().state_dict(), source.state_dict())
    assert (tmp_path / 'cache/hub/checkpoints/ti.pth').is_file()
    model = pretrained(in_chans=4, num_classes=7, img_size=(96, 128)).eval()
    assert model(images(96, 128, chans=4)).shape == (2, 7)
    assert torch.equal(model.head_proj.proj.weight, source.head_proj.proj.weight)
    features = pretrained(features_only=True)
    assert torch.equal(features.stages_3.blocks[0].lmhsa.kv.weight, source.stages[3].blocks[0].lmhsa.kv.weight)


def test_cfgs_name_the_released_files():
    release = 'https://github.com/ggjy/CMT.pytorch/releases/download/release-v1/'
    files = dict(cmt_ti='cmt_tiny', cmt_xs='cmt_xs', cmt_s='cmt_small', cmt_b='cmt_base')
    for name, figures in FIGURES.items():
        cfg, size = timm.get_pretrained_cfg(f'{name}.in1k'), figures['img_size']
        assert cfg.url == f'{release}{files[name]}.pth'
        assert cfg.input_size == (3, size, size) and cfg.pool_size == (size // 32, size // 32)
        assert (cfg.crop_pct, cfg.interpolation, cfg.fixed_input_size) == (0.875, 'bicubic', True)
    assert not timm.create_model('cmt_ti', device='meta', dynamic_img_size=True).pretrained_cfg['fixed_input_size']


@pytest.mark.parametrize('train, dynamic', [(False, True), (True, False)])
def test_torchs_counter_of_operations(train, dynamic):
    model, x, counts = small(dynamic_img_size=dynamic).train(train), images(64, 64), []
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context(), FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    # Without gradients torch uses its fused attention kernel, and the counter misses the products in it.
    assert counts[0] == counts[2] and 0.94 * counts[1] < counts[0] <= counts[1]
    names = {name.removeprefix('CMT.') for name in counter.get_flop_counts()}
    assert {name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))} <= names
