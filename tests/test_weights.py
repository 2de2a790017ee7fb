"""Weights of any origin: MindSpore, the authors' release, other tools, this project; and files that hold none."""
import argparse
import contextlib
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import cmt
import convert_checkpoint
import export
import mindspore
import nano
import train
import weights

MINDCV = Path(__file__).parent / 'mindcv_cmt_nano.ckpt'  # saved by MindSpore 2.7.1, see test_mindcv_file
MINDCV_FORM = dict(position_bias=False, act_layer='gelu_tanh', norm_eps=1e-7)
FILE = dict(num_classes=3, img_size=64)  # arguments of cmt_nano in the tests of other tools' files


def small(seed=0, **kwargs):
    """Return nano.small() with noise on every tensor, running statistics included."""
    model = nano.small(seed, **kwargs)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.5 + torch.rand_like(value) if name.endswith('var') else value + 0.1 * torch.randn_like(value))
    return model.eval()


def of(checkpoint, use_ema=False):
    return weights.Weights.from_checkpoint(checkpoint, 'a.pth', use_ema)


def build(source, **kwargs):
    """Build the model of a file or of a checkpoint."""
    return weights.build_model(of(source) if isinstance(source, dict) else weights.read_weights(str(source)), **kwargs)


def same(a, b):
    return nano.same(a.state_dict(), b.state_dict())


@contextlib.contextmanager
def models_called():
    """Collect the CMTs that are called, in the order of their first calls."""
    models = []

    def hook(module, _):
        if isinstance(module, cmt.CMT) and module not in models:
            models.append(module)

    handle = register_module_forward_pre_hook(hook)
    yield models
    handle.remove()


# MindSpore

def check_mindcv_logits(model):
    expected = np.loadtxt(MINDCV.with_name('mindcv_cmt_nano_logits.txt'))
    x = np.random.RandomState(64).standard_normal((2, 3, 64, 64))
    with torch.no_grad():
        assert np.abs(model(torch.tensor(x, dtype=torch.float32)).numpy() - expected).max() < 1e-4


def test_mindcv_file():
    """Compare with MindSpore's logits of MindCV's CMT: stem_channel=8, fc_dim=64, 10 classes, sizes of nano.SMALL."""
    model = build(MINDCV, img_size=64)
    assert model.img_size == (64, 64) and not model.training
    check_mindcv_logits(model)
    check_mindcv_logits(torch.jit.script(model))
    check_mindcv_logits(build(mindspore.read(MINDCV), img_size=64))  # MindSpore's names in any other file


@pytest.mark.parametrize('more', [[], ['--model', 'cmt_s']])
def test_eval_builds_mindcvs_form_from_the_file(more):
    with models_called() as models:
        nano.train(['--eval', '--resume', MINDCV, '--data-set', 'DIGITS', '--input-size', 64, '--device', 'cpu',
                    '--num-workers', 0, *more])
    check_mindcv_logits(models[0].eval())


def mindspore_tensors(**sizes):
    """Return a model in MindCV's form, and its tensors under MindSpore's names."""
    model = small(**MINDCV_FORM, **sizes)
    released, tensors = cmt.to_released(model.state_dict()), {}
    norms = {name.removesuffix('.weight') for name, value in released.items() if value.ndim == 1}
    names = dict(weight='gamma', bias='beta', running_mean='moving_mean', running_var='moving_variance')
    for name, value in released.items():
        path, _, last = name.rpartition('.')
        if path and last != 'num_batches_tracked':
            tensors[f'{path}.{names[last] if path in norms else last}'] = value.numpy()
    return model, tensors


def varint(number):
    out = b''
    while number > 127:
        number, out = number >> 7, out + bytes([number & 127 | 128])
    return out + bytes([number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def write_mindspore(path, tensors, slices=1, crc=False):
    """Write a MindSpore file: tensors in slices, with a checksum at the end or without."""
    out = b''
    for name, value in tensors.items():
        dims = b''.join(varint(1 << 3) + varint(dim) for dim in value.shape)
        content = value.tobytes()
        step = -(-len(content) // slices // 4) * 4
        for at in range(0, len(content), step):
            tensor = dims + field(2, b'Float32') + field(3, content[at:at + step])
            out += field(1, field(1, name.encode()) + field(2, tensor))
    path.write_bytes(out + (b'crc_num' + zlib.crc32(out).to_bytes(10, 'big') if crc else b''))


@pytest.mark.parametrize('sizes, img_size, layout', [
    (dict(stem_chs=6, embed_dims=(10, 12, 20, 40), depths=(2, 1, 1, 3), mlp_ratios=(3.8,) * 4, sr_ratios=(4, 2, 2, 1),
          num_features=48, num_classes=1), (64, 96), {}),
    (dict(stem_chs=8, embed_dims=(8, 8, 16, 32), depths=(1,) * 4, mlp_ratios=(2.5, 3.6, 1, 4), num_features=20,
          num_classes=300), (96, 32), dict(slices=3, crc=True)),
])
def test_mindspore_files_of_other_sizes(tmp_path, sizes, img_size, layout):
    source, tensors = mindspore_tensors(**sizes)
    write_mindspore(tmp_path / 'a.ckpt', tensors, **layout)
    read = mindspore.read(tmp_path / 'a.ckpt')
    assert {name: value.numpy().tobytes() for name, value in read.items()} == \
        {name: value.tobytes() for name, value in tensors.items()}
    write_mindspore(tmp_path / 'b.ckpt', {f'network._backbone.{name}': value for name, value in tensors.items()} | {
        'epoch_num': np.zeros(1, np.float32)}, **layout)
    source.set_input_size(img_size)
    x = torch.randn(2, 3, *img_size)
    for name in ('a.ckpt', 'b.ckpt'):
        model = build(tmp_path / name, img_size=img_size)
        assert same(model, source)
        assert torch.equal(model(x), source(x))


@pytest.mark.parametrize('form', [MINDCV_FORM, {}], ids=['MindCV', 'released'])
@pytest.mark.parametrize('name', cmt.MODELS)
def test_shapes_of_published_weights_give_the_model(name, form):
    model = timm.create_model(name, device='meta', **form)
    again = cmt.CMT(**weights.model_args_of(model.state_dict()), device='meta')
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert [stage.blocks[0].lmhsa.num_heads for stage in again.stages] == [1, 2, 4, 8]


@pytest.mark.parametrize('origin', ['MindCV', 'other size'])
def test_runs_keep_the_form_of_their_weights(flags, tmp_path, origin):
    """A run from such weights is killed and resumed, evaluated, exported, and fine-tuned."""
    source, size = MINDCV, 32
    if origin == 'other size':  # weights of 32 px for a run at 96 px
        source, size = tmp_path / 'a.pth', 96
        torch.save({'model': small(num_classes=3, img_size=32).state_dict()}, source)
    run = [*flags[2:], '--input-size', size, '--finetune', source, '--epochs', 2]
    nano.train([*run, '--output-dir', tmp_path / 'whole'])
    with nano.at_step(8, nano.die), pytest.raises(nano.Killed):
        nano.train([*run, '--output-dir', tmp_path / 'run'])
    nano.train([*run, '--output-dir', tmp_path / 'run', '--resume', 'auto'])
    nano.assert_same_run(tmp_path / 'whole', tmp_path / 'run')

    best = tmp_path / 'run' / 'checkpoint_best.pth'
    content = nano.read(best.parent, best.name)
    model = cmt.CMT(**content['model_args']).eval()
    model.load_state_dict(content['model'])
    with models_called() as models:
        nano.train(['--eval', '--resume', best])
    assert same(models[0], model)
    nano.train([*flags[2:], '--input-size', size, '--finetune', best, '--epochs', 1])
    x = torch.randn(2, 3, size, size)
    assert torch.equal(build(best)(x), model(x))
    assert build(best, num_classes=7, img_size=64)(x[..., :32, :32].repeat(1, 1, 2, 2)).shape == (2, 7)
    export.main([str(best), str(tmp_path / 'a.ts')])
    torch.testing.assert_close(torch.jit.load(tmp_path / 'a.ts')(x), model(x), rtol=0, atol=1e-5)
    convert_checkpoint.main([str(best), str(tmp_path / 'folder')])
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()(x), model(x))


def test_own_files_are_built_from_their_arguments(flags, tmp_path):
    """These arguments follow from no name and no shape, and the name is registered nowhere."""
    model = small(act_layer='gelu_tanh', norm_eps=0.1, global_pool='max', drop_rate=0.3)
    content = {'format': 1, 'model_args': model.model_args, 'model': model.state_dict(), 'args': {'model': 'mine'}}
    torch.save(content, tmp_path / 'a.pth')
    x = torch.randn(2, 3, 64, 64)
    built = build(tmp_path / 'a.pth')
    assert torch.equal(built(x), model(x)) and built.head_drop.p == 0.3
    convert_checkpoint.main([str(tmp_path / 'a.pth'), str(tmp_path / 'a')])
    assert torch.equal(build(tmp_path / 'a')(x), model(x))
    run = [*flags[2:], '--finetune', tmp_path / 'a.pth', '--output-dir', tmp_path / 'run']
    nano.train([*run, '--epochs', 1])
    nano.train([*run, '--epochs', 2, '--resume', 'auto'])
    assert nano.read(tmp_path / 'run')['model_args']['norm_eps'] == 0.1 and nano.epochs(tmp_path / 'run') == [0, 1]


# files of every origin

@pytest.mark.parametrize('wrap, use_ema', [
    (lambda a, b: a, False),
    (lambda a, b: {f'module.{name}': value for name, value in a.items()}, True),
    (lambda a, b: {'model': a, 'model_ema': b, 'epoch': 3, 'args': argparse.Namespace(lr=1)}, False),
    (lambda a, b: {'model': b, 'model_ema': a, 'epoch': 3}, True),
    (lambda a, b: {'model': a, 'model_ema': None}, True),
], ids=['bare', 'wrapped', 'model', 'EMA', 'no EMA'])
@pytest.mark.parametrize('released', [False, True])
def test_every_nesting_is_loaded(tmp_path, wrap, use_ema, released):
    source, other = small(1), small(2)
    states = [cmt.to_released(m.state_dict()) if released else m.state_dict() for m in (source, other)]
    torch.save(wrap(*states), tmp_path / 'a.pth')
    timm.models.load_checkpoint(small(), str(tmp_path / 'a.pth'), strict=False)  # forbids Namespace afterwards
    model = weights.build_model(weights.read_weights(str(tmp_path / 'a.pth'), use_ema))
    assert same(model, source) and model.img_size == (64, 64)


def test_an_epoch_in_progress_is_not_a_trained_one():
    state = small().state_dict()
    assert [of({'model': state, 'epoch': 3, 'meters': meters}).epoch for meters in ([], [[0.]])] == [3, 2]


def test_what_was_loaded_resampled_and_left_new_is_named():
    source, model = small(1), small(2, img_size=96, num_classes=7, in_chans=1)
    fresh = model.head.weight.clone()
    line = weights.load_weights(model, of({'model': source.state_dict()}), new_head=True)
    for words in ('a.pth', '64x64', '96x96', 'head.weight', 'stem.conv1.weight'):
        assert words in line
    assert '\n' not in line and torch.equal(model.head.weight, fresh)
    assert torch.allclose(model.stem.conv1.weight, source.stem.conv1.weight.sum(1, keepdim=True))
    source.set_input_size(96)  # tests/test_cmt.py compares it with bicubic interpolation by hand
    for name, value in source.state_dict().items():
        assert name.startswith(('head.', 'stem.conv1')) or torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize('change, name', [
    (lambda s: s.pop('stages.0.blocks.0.lmhsa.q.weight'), 'stages.0.blocks.0.lmhsa.q.weight'),
    (lambda s: s.update({'stages.0.blocks.7.lpu.dw.weight': torch.zeros(1)}), 'stages.0.blocks.7'),
    (lambda s: s.update({'_fc.bias': torch.zeros(1)}), '_fc.bias'),
    (lambda s: s.update({'head.bias': torch.zeros(2)}), 'head.bias'),
    (lambda s: [s.pop(name) for name in list(s) if 'position_bias' in name], 'position_bias'),
], ids=['missing', 'deeper', 'twice', 'shape', 'no bias'])
def test_tensors_that_do_not_fit_are_named(change, name):
    state = small(1).state_dict()
    change(state)
    with pytest.raises(ValueError, match=rf'a\.pth[^\n]*{name}'):
        weights.load_weights(small(), of(state))


# checkpoints of other tools

def load(checkpoint, source):
    """Load a checkpoint into a new cmt_nano, compare it with `source`, and return the line about it."""
    model = timm.create_model('cmt_nano', **FILE)
    line = weights.load_weights(model, of(checkpoint))
    assert same(model, source)
    return line


def with_wrappers(name):
    """Add wrappers' components in the middle of a name."""
    return re.sub(r'(\.\d\.)', r'\1_checkpoint_wrapped_module._orig_mod.', re.sub('(attn|lmhsa)', r'module.\1', name))


@pytest.mark.parametrize('released', [False, True])
@pytest.mark.parametrize('prefix, removed', [
    ('', None), ('model.', 'model.'), ('encoder.model.', 'encoder.model.'), ('_orig_mod.module.', None),
    ('module.model._orig_mod.', 'model.'), ('_fsdp_wrapped_module.backbone.', 'backbone.')])
def test_one_prefix_and_names_of_wrappers_are_removed(prefix, removed, released):
    source = timm.create_model('cmt_nano', **FILE)
    state = cmt.to_released(source.state_dict()) if released else source.state_dict()
    state = {prefix + with_wrappers(name): value for name, value in state.items()}
    line = load({'state_dict': state, 'epoch': 1, 'global_step': 2}, source)
    assert not removed or removed in line


@pytest.mark.parametrize('prefix, others', [
    ('module.', {'n_averaged': 1}), ('model.', {'criterion.weight': 3, 'n_averaged': 1}),
    ('backbone.', {'neck.stem.conv1.weight': 1, 'head.weight': 9, 'backbone.aux.weight': 1})])
def test_tensors_of_other_modules_are_left_out_and_named(prefix, others):
    source = timm.create_model('cmt_nano', **FILE)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    state.update({name: torch.zeros(size) for name, size in others.items()})
    for checkpoint in (state, {'model': state}):
        line = load(checkpoint, source)
        assert all(name in line for name in others)
    assert 'optimizer' in load({**source.state_dict(), 'optimizer': {'state': {}}}, source)


@pytest.mark.parametrize('first, second, names', [
    ('student.', 'teacher.', ('student.', 'teacher.')), ('', 'ema.', ('ema.',)), ('module.', '', ('module.stem',)),
    ('model.', 'model.ema.module.', ('model.', 'model.ema.'))])
def test_two_models_in_one_state_dict_are_refused(first, second, names):
    state = timm.create_model('cmt_nano', **FILE).state_dict()
    for change in (dict, cmt.to_released):
        two = {prefix + name: value for prefix in (first, second) for name, value in change(state).items()}
        with pytest.raises(ValueError, match=r'a\.pth') as error:
            of(two)
        assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize('keys, is_ema', [
    (('model', 'state_dict', 'model_state_dict', 'net', 'network', 'weights', 'params', 'module'), False),
    (('model_ema', 'state_dict_ema', 'ema', 'ema_state_dict', 'params_ema'), True)])
def test_keys_of_weights_and_of_their_ema(keys, is_ema):
    states = [timm.create_model('cmt_nano', **FILE).state_dict() for _ in range(2)]
    for key in keys:
        for content in (states[0], {'module': states[0], 'updates': 3}):
            assert nano.same(of({'epoch': 1, key: content, 'optimizer': {'state': {}}}).state, dict(states[0]))
            if is_ema:
                for use_ema in (True, False):
                    state = of({'net': states[1], key: content}, use_ema).state
                    assert nano.same(state, dict(states[not use_ema]))


def test_a_file_without_a_known_key_names_its_keys():
    with pytest.raises(ValueError, match=r'a\.pth.*student'):
        of({'student': small().state_dict(), 5: 6})


def test_files_with_a_prefix(tmp_path, capsys):
    """Read and convert safetensors and a Lightning checkpoint."""
    source = small(1)
    state = {f'model.{name}': value for name, value in source.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / 'a.safetensors')
    torch.save({'state_dict': state, 'epoch': 2, 'hyper_parameters': {'lr': 1.}}, tmp_path / 'a.ckpt')
    for name in ('a.safetensors', 'a.ckpt'):
        assert same(build(tmp_path / name), source)
        convert_checkpoint.main([str(tmp_path / name), str(tmp_path / f'{name}.pth')])
        assert 'model.' in capsys.readouterr().out
        assert same(build(tmp_path / f'{name}.pth'), source)


@pytest.mark.parametrize('name', ['resnet10t', 'iformer_t'])  # The second has modules named `module`.
def test_teachers_of_other_families(tmp_path, name):
    """Their names are unknown: keys and wrappers' components are removed, prefixes are not."""
    source = timm.create_model(name, num_classes=2)
    for prefix in ('', '_orig_mod.module.', 'model.'):
        torch.save({'net': {prefix + k: v for k, v in source.state_dict().items()}, 'epoch': 1}, tmp_path / 'a.pth')
        if prefix != 'model.':
            assert same(weights.build_teacher(name, str(tmp_path / 'a.pth'), ['a', 'b']), source)
    with pytest.raises(ValueError, match='a.pth'):
        weights.build_teacher(name, str(tmp_path / 'a.pth'), ['a', 'b'])


# through timm

def by_timm(checkpoint, **kwargs):
    """Load by timm's pretrained=True."""
    return timm.create_model('cmt_nano', pretrained=True, pretrained_cfg_overlay={
        'state_dict': checkpoint, 'num_classes': 3}, **{**FILE, **kwargs})


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=37), dict(features_only=True)])
@pytest.mark.parametrize('change, name', [
    (lambda s: {name: v for name, v in s.items() if 'stages.2' not in name}, 'stages.2.position_bias'),
    (lambda s: {**s, 'stages.1.blocks.1.lpu.dw.bias': torch.zeros(16)}, 'stages.1.blocks.1.lpu.dw.bias'),
    (lambda s: {'conv1.weight': torch.zeros(4, 3, 7, 7)}, 'stem.conv1.weight'),
], ids=['no stage 2', 'deeper', 'resnet'])
def test_pretrained_weights_that_do_not_fit_are_refused(change, name, kwargs):
    """timm loads non-strictly if the head is new, so missing blocks could go unnoticed."""
    state = change(dict(timm.create_model('cmt_nano', **FILE).state_dict()))
    with pytest.raises(ValueError, match=name):
        by_timm(state, **kwargs)


def test_pretrained_weights_without_classifier_and_counts_fit():
    source = timm.create_model('cmt_nano', **FILE)
    state = {name: value for name, value in source.state_dict().items()
             if not name.startswith('head.') and not name.endswith('num_batches_tracked')}
    model = by_timm(state, num_classes=7)
    assert torch.equal(model.head_proj.proj.weight, source.head_proj.proj.weight) and model.head.weight.shape == (7, 32)
    by_timm(state, features_only=True)
    source.prune_intermediate_layers([1])  # a backbone of two stages takes their weights if loading is not strict
    source.load_state_dict(cmt.checkpoint_filter_fn(state, source), strict=False)


def test_timms_own_functions_load_checkpoints(tmp_path):
    source, model = (timm.create_model('cmt_nano', **FILE) for _ in range(2))
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'plain.pth')
    assert same(timm.create_model('cmt_nano', checkpoint_path=str(tmp_path / 'plain.pth'), **FILE), source)
    torch.save({'model': cmt.to_released(source.state_dict())}, tmp_path / 'a.pth')
    timm.models.load_checkpoint(model, str(tmp_path / 'a.pth'), filter_fn=cmt.checkpoint_filter_fn)
    assert same(model, source)


# through the command line

@pytest.mark.parametrize('flag', [('--eval', '--resume'), ('--finetune',)])
def test_files_without_weights_of_the_model_are_named(tmp_path, capsys, flag):
    state = timm.create_model('cmt_nano').state_dict()
    torch.save({'model': state}, tmp_path / 'whole.pth')
    safetensors.torch.save_file(state, tmp_path / 'whole.safetensors')
    damaged = {
        'empty.pth': b'', 'short.pth': (tmp_path / 'whole.pth').read_bytes()[:9999],
        'short.ckpt': MINDCV.read_bytes()[:200000],
        'short.safetensors': (tmp_path / 'whole.safetensors').read_bytes()[:-4]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    torch.save(timm.create_model('resnet18', num_classes=1).state_dict(), tmp_path / 'resnet.pth')
    model = timm.create_model('cmt_s', img_size=32, num_classes=10, dtype=torch.bfloat16)
    torch.save({'model': cmt.to_released(model.state_dict())}, tmp_path / 's.pth')
    for path, words, *more in (
            *((tmp_path / name, name) for name in [*damaged, 'resnet.pth']),
            ('nowhere.pth', 'nowhere.pth'), ('cmt_small.pth', 'cmt_small.pth'),
            (tmp_path / 's.pth', '--model cmt_s', '--model', 'cmt_ti')):
        argv = [*more, *flag, path, '--data-set', 'DIGITS', '--device', 'cpu', '--num-workers', 0, '--input-size', 32]
        assert train.cli([str(arg) for arg in argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith('train.py: error: ') and err.count('\n') == 1 and words in err, err


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


def test_released_files_resume_without_moments(released, flags, tmp_path):
    """Train an epoch at a learning rate too low to change weights."""
    path, states = released
    still = ['--lr', 1e-30, '--warmup-lr', 1e-30, '--min-lr', 1e-30, '--model-ema-decay', 1]
    nano.train([*flags, *still, '--resume', path, '--output-dir', tmp_path, '--epochs', 2, '--test-freq', 5])
    assert [line['epoch'] for line in nano.log(tmp_path)] == [1]
    last = nano.read(tmp_path)
    assert {float(state['step']) for state in last['optimizer']['state'].values()} == {6}
    for name, value in last['model'].items():
        if 'running_' not in name and 'num_batches' not in name:
            for saved, state in ((value, states[0]), (last['model_ema'][name], states[1])):
                assert torch.allclose(saved, state[name], rtol=0, atol=1e-20), name


@pytest.mark.parametrize('ema', [True, False])
def test_released_files_are_evaluated(released, flags, ema):
    path, states = released
    with models_called() as models:
        nano.train([*flags, '--eval', '--resume', path, *([] if ema else ['--no-model-ema'])])
    assert nano.same(dict(models[0].state_dict()), dict(states[ema]))
