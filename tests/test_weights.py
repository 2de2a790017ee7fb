"""weights.py: files of MindSpore, of the authors' release and of this project; files without weights of a CMT."""
import argparse
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

import cmt
import convert_checkpoint
import mindspore
import nano
import train
import weights

MINDCV = Path(__file__).parent / 'mindcv_cmt_nano.ckpt'  # saved by MindSpore 2.7.1, see test_mindcv_file


def small(seed=0, **kwargs):
    """Return nano.small() with noise on every tensor, running statistics included."""
    model = nano.small(seed, **kwargs)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.5 + torch.rand_like(value) if name.endswith('var') else value + 0.1 * torch.randn_like(value))
    return model.eval()


def build(source, *args, **kwargs):
    """Build the model of a file or of a checkpoint."""
    found = weights.Weights.of(source, 'own') if isinstance(source, dict) else weights.read_weights(str(source))
    return weights.build_model(found, *args, **kwargs)


def same(a, b):
    return nano.same(a.state_dict(), b.state_dict())


# MindSpore

def test_mindcv_file():
    """Compare with MindSpore's logits of MindCV's CMT: stem_channel=8, fc_dim=64, 10 classes, sizes of nano.SMALL."""
    found = weights.read_weights(str(MINDCV))
    model = weights.build_model(found, img_size=64)
    assert found.kind == 'mindspore' and model.img_size == (64, 64) and not model.training
    check_mindcv_logits(model)
    check_mindcv_logits(torch.jit.script(model))
    name, model_args = weights.identify(found)
    again = timm.create_model(name, img_size=64, num_classes=10, **model_args).eval()
    again.load_state_dict(model.state_dict())
    check_mindcv_logits(again)
    saved = {'model': model.state_dict(), 'args': {'input_size': 64}}  # as a run saves it
    check_mindcv_logits(build(saved))
    with pytest.raises(ValueError, match='no position bias'):
        cmt.to_released(model.state_dict())


def keep_in(seen):
    return lambda model, *_: seen.append(model) or dict(acc1=0, acc5=0, loss=0, count=0)


def check_mindcv_logits(model):
    expected = np.loadtxt(MINDCV.with_name('mindcv_cmt_nano_logits.txt'))
    x = np.random.RandomState(64).standard_normal((2, 3, 64, 64))
    with torch.no_grad():
        assert np.abs(model(torch.tensor(x, dtype=torch.float32)).numpy() - expected).max() < 1e-4


@pytest.mark.parametrize('asked', [[], ['--model', 'cmt_s']])
def test_eval_builds_mindcvs_form_from_the_file(monkeypatch, asked):
    seen = []
    monkeypatch.setattr(train, 'evaluate', keep_in(seen))
    nano.train(['--eval', '--resume', MINDCV, '--data-set', 'DIGITS', '--input-size', 64, '--device', 'cpu',
                '--num-workers', 0, *asked])
    check_mindcv_logits(seen[0].eval())


def mindcv_tensors(stem, dims, depths, ratios, sr, features, classes):
    """Draw weights of MindCV's CMT under MindSpore's names."""
    rng, out = np.random.RandomState(0), {}

    def layer(name, *shape):
        out[f'{name}.weight'] = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        out[f'{name}.bias'] = 0.1 * rng.standard_normal(shape[0])

    def norm(name, dim, batch=True):
        out[f'{name}.gamma'] = 1 + 0.1 * rng.standard_normal(dim)
        out[f'{name}.beta'] = 0.1 * rng.standard_normal(dim)
        if batch:
            out[f'{name}.moving_mean'] = 0.1 * rng.standard_normal(dim)
            out[f'{name}.moving_variance'] = 0.5 + rng.random_sample(dim)

    for i in (1, 2, 3):
        layer(f'stem_conv{i}', stem, 3 if i == 1 else stem, 3, 3)
        norm(f'stem_norm{i}', stem)
    for c, before, dim, depth, ratio, k in zip('abcd', (stem, *dims), dims, depths, ratios, sr):
        layer(f'patch_embed_{c}.proj', dim, before, 2, 2)
        norm(f'patch_embed_{c}.norm', dim, batch=False)
        for i in range(depth):
            block, hidden = f'blocks_{c}.{i}', int(dim * ratio)
            layer(f'{block}.proj', dim, 1, 3, 3)
            norm(f'{block}.norm1', dim, batch=False)
            norm(f'{block}.norm2', dim, batch=False)
            for part in ('q', 'k', 'v', 'proj'):
                layer(f'{block}.attn.{part}', dim, dim)
            if k > 1:
                layer(f'{block}.attn.sr.0', dim, 1, k, k)
                norm(f'{block}.attn.sr.1', dim)
            layer(f'{block}.mlp.conv1.0', hidden, dim, 1, 1)
            norm(f'{block}.mlp.conv1.2', hidden)
            layer(f'{block}.mlp.proj', hidden, 1, 3, 3)
            norm(f'{block}.mlp.proj_bn', hidden)
            layer(f'{block}.mlp.conv2.0', dim, hidden, 1, 1)
            norm(f'{block}.mlp.conv2.1', dim)
    layer('_fc', features, dims[-1], 1, 1)
    norm('_bn', features)
    layer('head', classes, features)
    return {name: value.astype(np.float32) for name, value in out.items()}


def mindcv_logits(tensors, x, depths, sr):
    """Compute MindCV's forward pass from its names."""
    w = {name: torch.tensor(value) for name, value in tensors.items()}

    def conv(x, name, **kwargs):
        return F.conv2d(x, w[f'{name}.weight'], w[f'{name}.bias'], **kwargs)

    def dw(x, name, **kwargs):
        return conv(x, name, groups=x.shape[1], **kwargs)

    def linear(x, name):
        return x @ w[f'{name}.weight'].T + w[f'{name}.bias']

    def bn(x, name):
        mean, var, gamma, beta = (
            w[f'{name}.{p}'].view(-1, 1, 1) for p in ('moving_mean', 'moving_variance', 'gamma', 'beta'))
        return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta

    def ln(x, name):  # over the last dimension
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-7) * w[f'{name}.gamma'] + w[f'{name}.beta']

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))

    for i in (1, 2, 3):
        x = bn(gelu(conv(x, f'stem_conv{i}', stride=2 if i == 1 else 1, padding=1)), f'stem_norm{i}')
    for c, depth, k, heads in zip('abcd', depths, sr, (1, 2, 4, 8)):
        x = conv(x, f'patch_embed_{c}.proj', stride=2)
        B, C, H, W = x.shape
        x = ln(x.flatten(2).mT, f'patch_embed_{c}.norm').mT.reshape(B, C, H, W)
        for i in range(depth):
            name = f'blocks_{c}.{i}'
            x = x + dw(x, f'{name}.proj', padding=1)
            tokens = x.flatten(2).mT  # (B, N, C)
            y = ln(tokens, f'{name}.norm1')
            reduced = y
            if k > 1:
                reduced = bn(dw(y.mT.reshape(B, C, H, W), f'{name}.attn.sr.0', stride=k), f'{name}.attn.sr.1')
                reduced = reduced.flatten(2).mT
            q, key, value = (linear(a, f'{name}.attn.{p}').unflatten(2, (heads, -1)).transpose(1, 2)
                             for a, p in ((y, 'q'), (reduced, 'k'), (reduced, 'v')))
            attention = torch.softmax(q @ key.mT / np.sqrt(C / heads), dim=-1) @ value
            tokens = tokens + linear(attention.transpose(1, 2).flatten(2), f'{name}.attn.proj')
            y = ln(tokens, f'{name}.norm2').mT.reshape(B, C, H, W)
            y = bn(gelu(conv(y, f'{name}.mlp.conv1.0')), f'{name}.mlp.conv1.2')
            y = bn(gelu(y + dw(y, f'{name}.mlp.proj', padding=1)), f'{name}.mlp.proj_bn')
            y = bn(conv(y, f'{name}.mlp.conv2.0'), f'{name}.mlp.conv2.1')
            x = tokens.mT.reshape(B, C, H, W) + y
    x = bn(conv(x, '_fc'), '_bn')
    return linear((x * torch.sigmoid(x)).mean((2, 3)), 'head')


def varint(number):
    out = b''
    while number > 127:
        number, out = number >> 7, out + bytes([number & 127 | 128])
    return out + bytes([number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def write_mindspore(path, tensors, packed=False, slices=1, crc=False):
    """Write a MindSpore file: dims packed or not, tensors in slices, with a checksum at the end or without."""
    out = b''
    for name, value in tensors.items():
        dims = field(1, b''.join(map(varint, value.shape))) if packed else \
            b''.join(varint(1 << 3) + varint(dim) for dim in value.shape)
        content = value.tobytes()
        step = -(-len(content) // slices // 4) * 4
        for at in range(0, len(content), step):
            tensor = dims + field(2, b'Float32') + field(3, content[at:at + step])
            out += field(1, field(1, name.encode()) + field(2, tensor))
    path.write_bytes(out + (b'crc_num' + zlib.crc32(out).to_bytes(10, 'big') if crc else b''))


@pytest.mark.parametrize('sizes, img_size, layout', [
    ((4, (8, 16, 16, 24), (1, 2, 1, 1), (4, 4, 4, 4), (8, 4, 2, 1), 32, 3), (32, 32), {}),
    ((6, (10, 12, 20, 40), (2, 1, 1, 3), (3.8, 3.8, 3.8, 3.8), (4, 2, 2, 1), 48, 1), (64, 96), dict(packed=True)),
    ((8, (8, 8, 16, 32), (1, 1, 1, 1), (2.5, 3.6, 1, 4), (8, 4, 2, 1), 20, 300), (96, 32), dict(slices=3, crc=True)),
])
def test_mindspore_files_of_other_sizes(tmp_path, sizes, img_size, layout):
    tensors = mindcv_tensors(*sizes)
    write_mindspore(tmp_path / 'a.ckpt', tensors, **layout)
    read = mindspore.read(tmp_path / 'a.ckpt')
    assert {name: value.numpy().tobytes() for name, value in read.items()} == \
        {name: value.tobytes() for name, value in tensors.items()}
    model = build(tmp_path / 'a.ckpt', img_size=img_size)
    x = torch.randn(2, 3, *img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mindcv_logits(tensors, x, sizes[2], sizes[4])
        assert (model(x) - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize('form', [dict(position_bias=False, act_layer='gelu_tanh', norm_eps=1e-7), {}])
@pytest.mark.parametrize('name, ratio', [*((name, None) for name in cmt.MODELS), ('cmt_ti', 2.), ('cmt_xs', 3.8)])
def test_files_of_the_published_widths_are_known_by_name(name, ratio, form):
    ratios = {'mlp_ratios': (ratio,) * 4} if ratio else {}
    model = timm.create_model(name, device='meta', **form, **ratios)
    found, args = weights.identify(weights.Weights.of(model.state_dict(), 'own'))
    again = timm.create_model(found, device='meta', **args)
    assert found == name and {key: args[key] for key in form} == form
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_damaged_mindspore_files(tmp_path):
    tensors = mindcv_tensors(4, (8,) * 4, (1,) * 4, (2,) * 4, (8, 4, 2, 1), 8, 2)
    write_mindspore(tmp_path / 'whole.ckpt', tensors, crc=True)
    data, path = (tmp_path / 'whole.ckpt').read_bytes(), tmp_path / 'a.ckpt'
    for end in (1, 2, 30, len(data) // 2, len(data) - 1, len(data) - 18):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r'a\.ckpt'):
            build(path, img_size=32)
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(ValueError, match='checksum'):
        weights.read_file(path)
    path.write_bytes(b'\xff' * 1_000_000)  # refused at once
    with pytest.raises(ValueError, match='not of MindSpore'):
        mindspore.read(path)


# files of every origin

@pytest.mark.parametrize('change', [
    lambda state: {name: torch.empty(0) for name in state},
    lambda state: {**state, 'blocks_a.0.attn.k.weight': state['blocks_a.0.attn.k.weight'][:, :3]},
    lambda state: {**state, 'head.weight': torch.tensor(0.)},
    lambda state: {**state, 'relative_pos_b': state['relative_pos_b'][None]},
    lambda state: {**state, 'patch_embed_c.proj.weight': state['patch_embed_c.proj.weight'].flatten()},
    lambda state: {**state, 'blocks_b.0.mlp.conv1.0.weight': torch.empty(0, 16, 1, 1)},
], ids=['all empty', 'half a key', 'number', 'bias', 'flat', 'nothing hidden'])
def test_tensors_of_odd_shapes_are_an_error_of_one_line(change):
    state = change(cmt.to_released(small().state_dict()))
    with pytest.raises(ValueError) as error:
        weights.build_model(weights.Weights.of({'model': state}, 'odd.pth'))
    assert str(error.value).startswith(('odd.pth ', 'odd.pth: '))
    with pytest.raises(ValueError):
        weights.load_weights(small(), weights.Weights.of({'model': state}, 'odd.pth'))


def test_other_input_channels_come_from_three_alone():
    with pytest.raises(ValueError, match='only from 3'):
        build({'model': small(in_chans=4).state_dict()}, in_chans=1)


@pytest.mark.parametrize('wrap, use_ema, kind', [
    (lambda a, b: a, False, 'bare'),
    (lambda a, b: {f'module.{name}': value for name, value in a.items()}, True, 'bare'),
    (lambda a, b: {'model': a, 'model_ema': b, 'epoch': 3, 'args': argparse.Namespace(lr=1)}, False, 'model'),
    (lambda a, b: {'model': b, 'model_ema': a, 'epoch': 3}, True, 'model_ema'),
    (lambda a, b: {'model': a, 'model_ema': None}, True, 'model'),
    (lambda a, b: {'state_dict': a, 'state_dict_ema': b}, False, 'state_dict'),
])
@pytest.mark.parametrize('released', [False, True])
def test_every_nesting_is_loaded(tmp_path, wrap, use_ema, kind, released):
    source, other = small(1), small(2)
    states = [cmt.to_released(m.state_dict()) if released else m.state_dict() for m in (source, other)]
    torch.save(wrap(*states), tmp_path / 'a.pth')
    found = weights.read_weights(str(tmp_path / 'a.pth'), use_ema)
    model = weights.build_model(found)
    assert same(model, source) and found.kind == kind and model.img_size == (64, 64)


def test_an_epoch_in_progress_is_not_a_trained_one():
    state = small().state_dict()
    epochs = [weights.Weights.of({'model': state, 'epoch': 3, 'meters': meters}, 'x').epoch for meters in ([], [[0.]])]
    assert epochs == [3, 2]


def test_one_line_reports_what_was_loaded():
    source, model = small(1), small(2, img_size=96, num_classes=7, in_chans=1)
    fresh = model.head.weight.clone()
    line = weights.load_weights(model, weights.Weights.of({'model': source.state_dict()}, 'a.pth'), new_head=True)
    count = len(source.state_dict()) - 2
    assert line == (f'a.pth: weights (model), {count} tensors; 4 position biases resampled from 64x64 to 96x96; '
                    'newly initialised: head.weight, head.bias; '
                    'stem.conv1.weight adapted from 3 to 1 input channels')
    assert torch.equal(model.head.weight, fresh)
    assert torch.allclose(model.stem.conv1.weight, source.stem.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(model.head_proj.proj.weight, source.head_proj.proj.weight)


@pytest.mark.parametrize('change, words', [
    (lambda s: s.pop('stages.0.blocks.0.lmhsa.q.weight'), 'stages.0.blocks.0.lmhsa.q.weight missing'),
    (lambda s: s.update({'stages.0.blocks.7.lpu.dw.weight': torch.zeros(1)}), r'stages\.0\.blocks\.7\.\S* left over'),
    (lambda s: s.update({'_fc.bias': torch.zeros(1)}), '_fc.bias left over'),
    (lambda s: s.update({'head.bias': torch.zeros(2)}), r'head.bias \(2,\) for \(5,\)'),
    (lambda s: [s.pop(name) for name in list(s) if 'position_bias' in name], 'position_bias missing'),
])
def test_nothing_is_half_loaded(change, words):
    state, model, before = small(1).state_dict(), small(2), small(2)
    change(state)
    with pytest.raises(ValueError, match=rf'a\.pth does not fit[^\n]*{words}'):
        weights.load_weights(model, weights.Weights.of(state, 'a.pth'))
    assert same(model, before)


def test_released_files_load_after_timm_has_read_a_file(released, tmp_path):
    path, states = released
    torch.save(states[0], tmp_path / 'a.pth')
    sizes = dict(stem_chs=4, embed_dims=(8, 16, 16, 32), depths=(1,) * 4, num_heads=(1, 2, 2, 4), mlp_ratios=(2,) * 4,
                 num_features=32, img_size=32, num_classes=3)
    for read in (lambda: dict(weights.read_weights(str(path)).state),
                 lambda: cmt.to_released(timm.create_model('cmt_ti', pretrained=True, pretrained_cfg_overlay={
                     'url': path.as_uri(), 'num_classes': 3}, cache_dir=tmp_path, **sizes).state_dict())):
        timm.create_model('cmt_nano', num_classes=3, checkpoint_path=str(tmp_path / 'a.pth'))
        assert nano.same(read(), cmt.to_released(states[0]))


# checkpoints of other tools

FILE = dict(num_classes=3, img_size=64)  # of cmt_nano


def by_timm(checkpoint, **kwargs):
    """Load by timm's pretrained=True."""
    return timm.create_model('cmt_nano', pretrained=True, pretrained_cfg_overlay={
        'state_dict': checkpoint, 'num_classes': 3}, **{**FILE, **kwargs})


def both_ways(checkpoint, source, caplog):
    """Load by load_weights and by timm's pretrained=True, compare the weights, and return the note that both made."""
    model = timm.create_model('cmt_nano', **FILE)
    caplog.clear()
    line = weights.load_weights(model, weights.Weights.of(checkpoint, 'a.pth'))
    assert same(model, source) and same(by_timm(checkpoint), source)
    note = line.partition(' tensors')[2].removeprefix('; ')
    assert [r.getMessage() for r in caplog.records if r.name == 'cmt'] == ([f'weights: {note}'] if note else [])
    return note


def with_wrappers(name):
    """Add wrappers' components in the middle of a name."""
    return re.sub(r'(\.\d\.)', r'\1_checkpoint_wrapped_module._orig_mod.', re.sub('(attn|lmhsa)', r'module.\1', name))


@pytest.mark.parametrize('released', [False, True])
@pytest.mark.parametrize('prefix, removed', [
    ('', ''), ('model.', 'model.'), ('net.', 'net.'), ('encoder.model.', 'encoder.model.'), ('module.', ''),
    ('_orig_mod.module.', ''), ('module.model._orig_mod.', 'model.'), ('_fsdp_wrapped_module.backbone.', 'backbone.')])
def test_one_prefix_and_names_of_wrappers_are_taken_off(caplog, prefix, removed, released):
    source = timm.create_model('cmt_nano', **FILE)
    state = cmt.to_released(source.state_dict()) if released else source.state_dict()
    state = {prefix + with_wrappers(name): value for name, value in state.items()}
    note = both_ways({'state_dict': state, 'epoch': 1, 'global_step': 2}, source, caplog)
    assert note == (f'prefix {removed} removed' if removed else '')


@pytest.mark.parametrize('prefix, others, note', [
    ('', {'n_averaged': 1}, '1 other left out: n_averaged'),
    ('module.', {'n_averaged': 1}, '1 other left out: n_averaged'),
    ('model.', {'criterion.weight': 3, 'n_averaged': 1},
     'prefix model. removed; 2 others left out: criterion.weight, n_averaged'),
    ('backbone.', {'neck.stem.conv1.weight': 1, 'head.weight': 9, 'backbone.aux.weight': 1, 'stages.0.weight': 2},
     'prefix backbone. removed; 4 others left out: neck.stem.conv1.weight, head.weight, backbone.aux.weight, ...')])
def test_what_is_of_no_cmt_is_left_out_and_said(caplog, prefix, others, note):
    source = timm.create_model('cmt_nano', **FILE)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    state.update({name: torch.zeros(size) for name, size in others.items()})
    for checkpoint in (state, {'model': state}):
        assert both_ways(checkpoint, source, caplog) == note
    note = both_ways({**source.state_dict(), 'epoch': 3, 'optimizer': {'state': {}}}, source, caplog)
    assert note == '2 others left out: epoch, optimizer'


def test_real_wrappers(caplog):
    """Average, compile and wrap a model as their users do, and save the state dict that comes of it."""
    source = timm.create_model('cmt_nano', **FILE)
    averaged = torch.optim.swa_utils.AveragedModel(source)
    assert 'n_averaged' in averaged.state_dict()
    assert both_ways(averaged.state_dict(), source, caplog) == '1 other left out: n_averaged'
    module = torch.nn.Module()
    module.net, module.criterion = torch.compile(torch.nn.DataParallel(source)), torch.nn.Linear(2, 2)
    note = both_ways({'state_dict': module.state_dict(), 'hyper_parameters': {'lr': 1}}, source, caplog)
    assert note == 'prefix net. removed; 2 others left out: criterion.weight, criterion.bias'


@pytest.mark.parametrize('first, second, names', [
    ('student.', 'teacher.', 'student. and teacher.'), ('', 'ema.', '(none) and ema.'), ('module.', '', 'module.stem'),
    ('model.', 'model.ema.module.', 'model. and model.ema.'), ('a.', 'b.c.', 'a. and b.c.')])
def test_two_models_in_one_state_dict_are_an_error(first, second, names):
    state = timm.create_model('cmt_nano', **FILE).state_dict()
    for change in (dict, cmt.to_released):
        two = {prefix + name: value.clone() for prefix in (first, second) for name, value in change(state).items()}
        for load in (lambda two=two: weights.Weights.of(two, 'a.pth'), lambda two=two: by_timm({'model': two})):
            with pytest.raises(ValueError, match='save the weights of one of them') as error:
                load()
            assert names in str(error.value) and '\n' not in str(error.value)


def test_a_tower_that_is_no_cmt_is_no_second_model(caplog):
    source = timm.create_model('cmt_nano', **FILE)
    other = timm.create_model('efficientformer_l1').state_dict()
    assert 'stem.conv1.weight' in other
    state = {f'student.{name}': value for name, value in source.state_dict().items()}
    state.update({f'teacher.{name}': value for name, value in other.items()})
    note = both_ways(state, source, caplog)
    assert note.startswith(f'prefix student. removed; {len(other)} others left out: teacher.stem.conv1.weight, ')


@pytest.mark.parametrize('key', [*cmt.WEIGHT_KEYS, *cmt.EMA_KEYS])
def test_keys_that_weights_lie_under(caplog, key):
    source = timm.create_model('cmt_nano', **FILE)
    state, other = dict(source.state_dict()), timm.create_model('cmt_nano', **FILE).state_dict()
    for content in (state, {'module': state, 'updates': 3}):
        both_ways({'epoch': 1, key: content, 'optimizer': {'state': {}}}, source, caplog)
    for content in (state, {'module': state}):
        kind = weights.Weights.of({key: content}, 'a.pth').kind
        assert kind == ('model_ema' if key in cmt.EMA_KEYS else key)
    if key in cmt.EMA_KEYS:
        for use_ema, expected in ((True, state), (False, other)):
            assert nano.same(weights.Weights.of({'net': other, key: {'module': state}}, 'a.pth', use_ema).state,
                             dict(expected))
        both_ways({key: other, 'params': state}, source, caplog)


def test_keys_without_tensors_are_passed_over(caplog):
    source = timm.create_model('cmt_nano', **FILE)
    checkpoint = {'ema': 0.999, 'model': {'name': 'nano'}, 'net': {}, 'classes': 3, 'state_dict': source.state_dict()}
    both_ways(checkpoint, source, caplog)
    assert weights.Weights.of(checkpoint, 'a.pth', use_ema=True).classes_for(source) is None
    for checkpoint, keys in (({'student': source.state_dict(), 'epoch': 3, 5: 6}, 'student, epoch, 5'), ({}, 'none'),
                             ({'model': {'a': 1}}, 'model'), ({str(i): i for i in range(99)}, '6, 7, ...')):
        with pytest.raises(ValueError, match=rf"^a\.pth: it holds no weights .*keys are .*{keys}: save .* 'model'$"):
            weights.Weights.of(checkpoint, 'a.pth')
    with pytest.raises(ValueError, match=r'holds no CMT \(step, \.\.\.; 1 other left out: generator\)'):
        build({'step': torch.zeros(1), 'generator': dict(source.state_dict())})


def test_files_with_a_prefix(tmp_path, capsys):
    """Read, convert and open safetensors and a Lightning checkpoint; one that would run code stays refused."""
    source = small(1)
    state = {f'model.{name}': value for name, value in source.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / 'a.safetensors')
    torch.save({'state_dict': state, 'epoch': 2, 'hyper_parameters': {'lr': 1.}}, tmp_path / 'a.ckpt')
    for name in ('a.safetensors', 'a.ckpt'):
        assert same(build(tmp_path / name), source)
        convert_checkpoint.main([str(tmp_path / name), str(tmp_path / f'{name}.pth')])
        assert 'prefix model. removed' in capsys.readouterr().out
        assert same(build(tmp_path / f'{name}.pth'), source)
    torch.save({'state_dict': state, 'hyper_parameters': Path('a')}, tmp_path / 'code.ckpt')
    with pytest.raises(ValueError, match=r'code\.ckpt was not loaded: it asks for pathlib'):
        weights.read_weights(str(tmp_path / 'code.ckpt'))


def test_mindspores_names_under_a_prefix(tmp_path):
    tensors = mindcv_tensors(4, (8, 16, 16, 24), (1, 2, 1, 1), (4,) * 4, (8, 4, 2, 1), 32, 3)
    models = []
    for prefix in ('', 'network._backbone.'):
        others = {'epoch_num': np.zeros(1, np.float32)} if prefix else {}
        write_mindspore(tmp_path / 'a.ckpt', {**{prefix + name: v for name, v in tensors.items()}, **others})
        models.append(build(tmp_path / 'a.ckpt', img_size=64))
    assert same(*models)


def test_teachers_of_other_families():
    """Such weights have any names: keys and wrappers' names are removed, prefixes not."""
    class Inner(torch.nn.Module):
        """Have a module of one's own named `module`, as timm's iformer has."""
        def __init__(self):
            super().__init__()
            self.module, self.first = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    source = Inner()
    for wrap in (dict, lambda s: {f'_orig_mod.module.{name}': value for name, value in s.items()}):
        model = Inner()
        weights.load_weights(model, weights.Weights.of({'net': wrap(source.state_dict()), 'epoch': 1}, 'a.pth'))
        assert same(model, source)
    with pytest.raises(ValueError, match='first.weight missing'):
        weights.load_weights(model, weights.Weights.of(
            {'net': {f'model.{name}': value for name, value in source.state_dict().items()}}, 'a.pth'))


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=37), dict(num_classes=0), dict(features_only=True),
                                    dict(in_chans=1), dict(in_chans=4, num_classes=2)])
@pytest.mark.parametrize('change, words', [
    (lambda s: {name: v for name, v in s.items() if 'stages.2' not in name}, 'stages.2.position_bias missing'),
    (lambda s: {**s, 'stages.1.blocks.1.lpu.dw.bias': torch.zeros(16)}, '1 tensors differ .*lpu.dw.bias left over'),
    (lambda s: {'conv1.weight': torch.zeros(4, 3, 7, 7)}, r'\d+ tensors .*stem.conv1.weight missing.*; \.\.\.'),
    (lambda s: {'student': s}, 'stem.conv1.weight missing.*1 other left out: student'),
    (lambda s: {name.replace('.', '_'): v for name, v in s.items()}, 'stem.conv1.weight missing'),
], ids=['no stage 2', 'deeper', 'resnet', 'key', 'names'])
def test_pretrained_weights_that_do_not_fit_are_an_error(change, words, kwargs):
    state = change(dict(timm.create_model('cmt_nano', **FILE).state_dict()))
    with pytest.raises(ValueError, match=rf'^these weights do not fit the model: [^\n]*{words}[^\n]*$'):
        by_timm(state, **kwargs)


def test_pretrained_weights_without_classifier_and_counts_fit():
    source = timm.create_model('cmt_nano', **FILE)
    state = {f'backbone.{name}': value for name, value in source.state_dict().items()
             if not name.startswith('head.') and not name.endswith('num_batches_tracked')}
    model = by_timm(state, num_classes=7)
    assert torch.equal(model.head_proj.proj.weight, source.head_proj.proj.weight) and model.head.weight.shape == (7, 32)
    by_timm(state, features_only=True)
    source.prune_intermediate_layers([1])  # a backbone of two stages takes its part, if its user is not strict
    source.load_state_dict(cmt.checkpoint_filter_fn(state, source), strict=False)


def test_timms_own_ways_of_loading(tmp_path):
    source, model = (timm.create_model('cmt_nano', **FILE) for _ in range(2))
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'plain.pth')
    assert same(timm.create_model('cmt_nano', checkpoint_path=str(tmp_path / 'plain.pth'), **FILE), source)
    torch.save({'model': {f'model.{name}': v for name, v in source.state_dict().items()}}, tmp_path / 'a.pth')
    timm.models.load_checkpoint(model, str(tmp_path / 'a.pth'), filter_fn=cmt.checkpoint_filter_fn)
    assert same(model, source)


# through the command line

def refused(capsys, monkeypatch, words, *argv):
    monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, argv), '--data-set', 'DIGITS', '--device', 'cpu',
                                      '--num-workers', '0', '--input-size', '32'])
    assert train.cli() == 2
    err = capsys.readouterr().err
    assert err.startswith('train.py: error: ') and err.count('\n') == 1 and words in err, err


@pytest.mark.parametrize('flag', [('--eval', '--resume'), ('--finetune',)])
def test_files_without_weights_of_the_model(tmp_path, capsys, monkeypatch, flag):
    torch.save({'model': timm.create_model('cmt_nano').state_dict()}, tmp_path / 'whole.pth')
    safetensors.torch.save_file(timm.create_model('cmt_nano').state_dict(), tmp_path / 'whole.safetensors')
    for name, content in {
            'empty.pth': b'', 'text.pth': b'hello world\n' * 50, 'empty.ckpt': b'', 'text.ckpt': b'hello world\n' * 50,
            'short.pth': (tmp_path / 'whole.pth').read_bytes()[:20000], 'short.ckpt': MINDCV.read_bytes()[:200000],
            'empty.safetensors': b'', 'short.safetensors': (tmp_path / 'whole.safetensors').read_bytes()[:-4]}.items():
        (tmp_path / name).write_bytes(content)
        refused(capsys, monkeypatch, f'{name} is cut short, damaged or no checkpoint', *flag, tmp_path / name)
    torch.save(timm.create_model('resnet18', num_classes=1).state_dict(), tmp_path / 'resnet.pth')
    refused(capsys, monkeypatch, 'resnet.pth does not fit the model: it holds no CMT', *flag, tmp_path / 'resnet.pth')
    for name in ('nowhere.pth', 'cmt_small.pth'):
        refused(capsys, monkeypatch, f'no checkpoint at {name}', *flag, name)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'checkpoint_best.pth').touch()
    for name in ('run', 'run/checkpoint_ema_best.pth'):
        refused(capsys, monkeypatch, 'run contains checkpoint_best.pth)', *flag, tmp_path / name)
    state = timm.create_model('cmt_s', img_size=32, num_classes=10, dtype=torch.bfloat16).state_dict()
    torch.save({'model': cmt.to_released(state)}, tmp_path / 's.pth')
    refused(capsys, monkeypatch, 'it holds cmt_s: give --model cmt_s', '--model', 'cmt_ti', *flag, tmp_path / 's.pth')


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """Write a file as the authors' code does."""
    path = tmp_path_factory.mktemp('released') / 'released.pth'
    states = [timm.create_model('cmt_nano', num_classes=3).state_dict() for _ in range(2)]
    model, ema = (cmt.to_released(state) for state in states)
    moments = {i: dict(step=7, exp_avg=torch.ones(1), exp_avg_sq=torch.ones(1)) for i in range(3)}
    torch.save({'model': model, 'model_ema': ema, 'epoch': 0, 'args': argparse.Namespace(model='cmt_nano', lr=1.),
                'optimizer': {'state': moments, 'param_groups': [{'lr': 1., 'params': [0]}, {'params': [1, 2]}]}}, path)
    return path, states


@pytest.mark.filterwarnings('ignore')
def test_released_files_go_on(released, flags, tmp_path, capsys, monkeypatch):
    path, states = released
    seen = []
    monkeypatch.setattr(train, 'train_one_epoch', lambda step, *_, **__: seen.append(step) or iter(()))
    nano.train([*flags, '--resume', path, '--output-dir', tmp_path / 'run', '--epochs', 2, '--test-freq', 5])
    assert [line['epoch'] for line in nano.log(tmp_path / 'run')] == [1]
    assert seen[0].optimizer.state_dict()['state'] == {}
    assert 'has no optimizer state of this project: moments start at zero' in capsys.readouterr().out
    last = nano.read(tmp_path / 'run')
    assert nano.same(last['model'], dict(states[0])) and nano.same(last['model_ema'], dict(states[1]))


@pytest.mark.parametrize('ema', [True, False])
def test_released_files_are_evaluated(released, flags, monkeypatch, ema):
    path, states = released
    seen = []
    monkeypatch.setattr(train, 'evaluate', keep_in(seen))
    nano.train([*flags, '--eval', '--resume', path, *([] if ema else ['--no-model-ema'])])
    assert nano.same(dict(seen[0].state_dict()), dict(states[ema]))


def test_a_run_that_began_from_a_size_of_no_name(tmp_path):
    """The tensors decide, whatever model name the run's arguments contain."""
    tensors = mindcv_tensors(4, (8, 16, 16, 24), (1, 2, 1, 1), (4,) * 4, (8, 4, 2, 1), 32, 3)
    write_mindspore(tmp_path / 'a.ckpt', tensors)
    source = weights.read_weights(str(tmp_path / 'a.ckpt'))
    model = weights.build_model(source, img_size=64)
    for saved in weights.identify(source)[0], 'cmt_small':
        run = weights.Weights.of({'model': model.state_dict(), 'args': {'model': saved, 'input_size': 64}}, 'run')
        assert same(weights.build_model(run), model) and weights.identify(run)[1] == weights.identify(source)[1]
    with pytest.raises(ValueError, match='does not fit'):
        build(timm.create_model('cmt_ti', img_size=32).state_dict(), 'cmt_xs')


# 1x1 convolutions up to commit 9777bd7 were linear layers, under the same names

POINTWISE = re.compile(r'(irffn\.(expand|project)|head_proj\.proj|mlp\.conv[12]\.0|_fc)\.weight$')


def as_linear(state):
    """Store 1x1 convolutions as (out, in), in place of (out, in, 1, 1)."""
    changed = {name: value.flatten(1) if POINTWISE.search(name) else value for name, value in state.items()}
    assert any(value.ndim == 2 and state[name].ndim == 4 for name, value in changed.items())
    return changed


@pytest.mark.parametrize('released', [False, True])
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_1x1_convolutions_stored_as_linear_layers(tmp_path, suffix, released):
    """Load, identify and convert such files, bit by bit."""
    source = small(1)
    state = as_linear(cmt.to_released(source.state_dict()) if released else source.state_dict())
    path = tmp_path / f'a.{suffix}'
    if suffix == 'pth':
        torch.save({'model': state, 'model_ema': as_linear(small(2).state_dict())}, path)
    else:
        safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, path)
    assert same(build(path), source)
    for name, published in (('cmt_ti', True), ('cmt_nano', False)):
        model = timm.create_model(name, device='meta')
        linear = as_linear(cmt.to_released(model.state_dict()) if released else model.state_dict())
        run = {} if published else {'args': {'model': name}}
        found = weights.Weights.of({'model': linear, **run}, 'own')
        assert weights.identify(found) == (name, {}) and found.model_args['img_size'] == model.img_size

    for out, *flags in (('b.pth',), ('c.pth', '--format', 'released'), ('d.safetensors',), ('e',)):
        convert_checkpoint.main([str(path), str(tmp_path / out), '--weights', 'model', *flags])
        assert same(build(tmp_path / out), source)
    back = weights.read_file(tmp_path / 'c.pth')['model']
    assert nano.same(back, dict(cmt.to_released(source.state_dict()))) and back['_fc.weight'].ndim == 4
    convert_checkpoint.main([str(tmp_path / 'c.pth'), str(tmp_path / 'f.pth')])
    assert nano.same(weights.read_file(tmp_path / 'f.pth')['model'], dict(source.state_dict()))
