"""scripts/convert_checkpoint.py: every format there and back, bit by bit; what is refused."""
import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from test_cmt import FIGURES, drawn

import checkpoints
import cmt
import convert_checkpoint
import nano

SCRIPT = Path(convert_checkpoint.__file__)
MINDCV = Path(__file__).parent / 'mindcv_cmt_nano.ckpt'  # see test_weights.py


def weights(name='cmt_nano', seed=0, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    return {key: (value + 0.1 * torch.randn(value.shape, dtype=torch.float64)).to(dtype)
            if value.is_floating_point() else value + 7
            for key, value in timm.create_model(name, **kwargs).state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def run_file(tmp_path):
    """A checkpoint as train.py leaves one."""
    state = {
        'model': weights(num_classes=3, img_size=64), 'model_ema': weights(seed=1, num_classes=3, img_size=64),
        'optimizer': {}, 'epoch': 4, 'classes': ['cat', 'dog', 'eel'], 'args': {'model': 'cmt_nano', 'input_size': 64}}
    torch.save(state, tmp_path / 'run.pth')
    return state


def convert(folder, *argv):
    convert_checkpoint.main([str(folder / argv[0]), str(folder / argv[1]), *argv[2:]])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_released_names_and_back_are_the_same_bits(tmp_path, dtype):
    released = {kind: cmt.to_released(weights(seed=i, dtype=dtype, num_classes=3))
                for i, kind in enumerate(('model', 'model_ema'))}
    arguments = argparse.Namespace(model='cmt_nano', lr=1e-3)
    torch.save({**released, 'optimizer': {'state': {}}, 'epoch': 9, 'args': arguments}, tmp_path / 'a.pth')
    convert(tmp_path, 'a.pth', 'b.pth')
    convert(tmp_path, 'b.pth', 'c.pth', '--format', 'released')
    own, back = (torch.load(tmp_path / name, weights_only=True) for name in ('b.pth', 'c.pth'))
    assert own['epoch'] == back['epoch'] == 9 and own['args']['model'] == 'cmt_nano'
    for i, kind in enumerate(('model', 'model_ema')):
        assert same(own[kind], weights(seed=i, dtype=dtype, num_classes=3))
        assert {k: v.shape for k, v in back[kind].items()} == {k: v.shape for k, v in released[kind].items()}
        assert same({k: back[kind][k] for k in released[kind]}, released[kind])


def test_a_folder_that_timm_opens(run_file, tmp_path, capsys):
    convert(tmp_path, 'run.pth', 'out')
    said = capsys.readouterr().out
    for name in ('model.safetensors', 'config.json'):
        assert hashlib.sha256((tmp_path / 'out' / name).read_bytes()).hexdigest() in said
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['config.json', 'model.safetensors']
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    reference = timm.create_model('cmt_nano', num_classes=3, img_size=64).eval()
    reference.load_state_dict(run_file['model_ema'])
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), reference(x))
    assert model.pretrained_cfg['label_names'] == ['cat', 'dog', 'eel']
    assert model.pretrained_cfg['input_size'] == (3, 64, 64) and model.pretrained_cfg['crop_pct'] == 0.875
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert 'origin_url' not in config['pretrained_cfg']

    # the folder is read as any file is
    for source in (str(tmp_path / 'out'), f'local-dir:{tmp_path / "out"}'):
        again, info = checkpoints.build_model(None, source)
        assert torch.equal(again(x), reference(x)) and info['classes'] == ['cat', 'dog', 'eel']
    assert nano.same(checkpoints.find_checkpoint(str(tmp_path / 'out'), None, False)[1]['model'],
                     checkpoints.read_weights(str(tmp_path / 'out'))['model'])
    with pytest.raises(ValueError, match='other classes'):
        checkpoints.build_teacher(None, str(tmp_path / 'out'), ['cat', 'dog', 'fox'])
    assert checkpoints.build_teacher('cmt_nano', str(tmp_path / 'out'), ['cat', 'dog', 'eel']).num_classes == 3
    with pytest.raises(ValueError, match='no checkpoint at'):
        checkpoints.read_weights(str(tmp_path))

    # other classes, channels and size, as from any folder of timm
    other = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, num_classes=5, img_size=96, in_chans=1)
    assert other(torch.randn(1, 1, 96, 96)).shape == (1, 5)


def test_weights_of_choice(run_file, tmp_path):
    for choice, kind in (('ema', 'model_ema'), ('model', 'model')):
        convert(tmp_path, 'run.pth', f'{choice}.safetensors', '--weights', choice)
        assert same(dict(sorted(run_file[kind].items())),
                    dict(sorted(safetensors.torch.load_file(tmp_path / f'{choice}.safetensors').items())))
        convert(tmp_path, 'run.pth', f'{choice}.pth', '--weights', choice)
        state = torch.load(tmp_path / f'{choice}.pth', weights_only=True)
        assert same(state['model'], run_file[kind]) and 'model_ema' not in state
        assert state['classes'] == ['cat', 'dog', 'eel'] and state['epoch'] == 4
    convert(tmp_path, 'ema.safetensors', 'again.pth')
    assert same(torch.load(tmp_path / 'again.pth', weights_only=True)['model'], run_file['model_ema'])


def mindcv_file(folder):
    """Weights without position bias, as a file of this project."""
    torch.manual_seed(0)
    model = timm.create_model('cmt_ti', num_classes=3, img_size=32, position_bias=False, act_layer='gelu_tanh',
                              norm_eps=1e-7, depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 32), num_features=16).eval()
    torch.save({'model': model.state_dict()}, folder / 'mindcv.pth')
    return model


def test_mindcv_form(tmp_path, capsys):
    """Opens in timm with its own arithmetic; the authors' code has no place for it."""
    model = mindcv_file(tmp_path)
    convert(tmp_path, 'mindcv.pth', 'out')
    opened = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = torch.randn(2, 3, *opened.img_size)
    reference, _ = checkpoints.build_model(None, str(tmp_path / 'mindcv.pth'))
    again, _ = checkpoints.build_model(None, str(tmp_path / 'out'))
    assert torch.equal(opened(x), reference(x)) and torch.equal(again(x), reference(x))
    assert opened.stages[0].position_bias is None and opened.num_classes == model.num_classes
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        convert(tmp_path, 'mindcv.pth', 'back.pth', '--format', 'released')
    said = capsys.readouterr().err
    assert stop.value.code == 2 and 'position bias' in said and said.count('\n') == 1
    assert not (tmp_path / 'back.pth').exists()


def test_mindspore_file(tmp_path):
    convert_checkpoint.main([str(MINDCV), str(tmp_path / 'out')])
    convert_checkpoint.main([str(MINDCV), str(tmp_path / 'out.pth')])
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, img_size=64).eval()
    again, _ = checkpoints.build_model(None, str(tmp_path / 'out.pth'), img_size=64)
    x = torch.from_numpy(np.random.RandomState(64).standard_normal((2, 3, 64, 64))).float()
    expected = torch.from_numpy(np.loadtxt(MINDCV.with_name('mindcv_cmt_nano_logits.txt'))).float()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)
    assert torch.equal(again.eval()(x), model(x))


@pytest.mark.parametrize('argv, reason', [
    (['run.pth', 'there'], '--overwrite'),
    (['run.pth', 'there.pth'], '--overwrite'),
    (['run.pth', 'there.pth', '--format', 'dir', '--overwrite'], 'is a file'),
    (['run.pth', 'there', '--format', 'pth', '--overwrite'], 'is a folder'),
    (['run.pth', 'nowhere/a.pth'], 'no folder'),
    (['gone.pth', 'out'], 'gone.pth'),
    (['resnet18', 'out'], 'nor a model of that name'),
    (['run.pth', 'run.pth', '--overwrite'], 'give another name'),
    (['text.pth', 'out'], 'text.pth'),
    (['resnet.pth', 'out'], 'resnet.pth'),
    (['plain.pth', 'out', '--weights', 'ema'], 'no average'),
    (['run.pth', 'out', '--model', 'cmt_s'], 'run.pth'),
])
def test_mistakes_write_nothing(run_file, tmp_path, capsys, argv, reason):
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'file').write_text('mine')
    (tmp_path / 'there.pth').write_text('mine')
    (tmp_path / 'text.pth').write_text('not weights')
    torch.save({'conv1.weight': torch.zeros(4, 3, 7, 7)}, tmp_path / 'resnet.pth')
    torch.save({'model': run_file['model']}, tmp_path / 'plain.pth')
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob('*'))}
    with pytest.raises(SystemExit) as stop:
        convert(tmp_path, *argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and ': error: ' in said and reason in said and said.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob('*'))} == before


def test_overwrite(run_file, tmp_path):
    (tmp_path / 'out.pth').write_text('old')
    convert(tmp_path, 'run.pth', 'out.pth', '--overwrite')
    assert same(torch.load(tmp_path / 'out.pth', weights_only=True)['model'], run_file['model'])


def test_command_line_from_another_folder(tmp_path):
    torch.save(weights('cmt_nano'), tmp_path / 'bare.pth')
    done = subprocess.run([sys.executable, SCRIPT, 'bare.pth', 'out.pth'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(torch.load(tmp_path / 'out.pth', weights_only=True)['model'], weights('cmt_nano'))


@pytest.mark.soak
@pytest.mark.parametrize('name', ['cmt_ti', 'cmt_xs', 'cmt_s', 'cmt_b'])
def test_published_models_to_released_names_and_back(name, tmp_path):
    """Tensors drawn as those of the golden values, in a file like the authors'; local-dir: gives equal logits."""
    released = {key: drawn(key, shape) for key, shape in FIGURES[name]['state'].items()}
    released = {key: value.float() if value.is_floating_point() else value for key, value in released.items()}
    average = {key: value + 1 for key, value in released.items()}
    torch.save({'model': released, 'model_ema': average, 'optimizer': {}, 'epoch': 299,
                'args': argparse.Namespace(model=name, lr=5e-4)}, tmp_path / 'a.pth')
    convert(tmp_path, 'a.pth', 'b.pth')
    convert(tmp_path, 'b.pth', 'c.pth', '--format', 'released')
    back = torch.load(tmp_path / 'c.pth', weights_only=True)
    for kind, state in (('model', released), ('model_ema', average)):
        assert same({key: back[kind][key] for key in state}, state) and set(back[kind]) == set(state)
    convert(tmp_path, 'c.pth', 'dir', '--weights', 'model')
    opened = timm.create_model(f'local-dir:{tmp_path / "dir"}', pretrained=True).eval()
    reference, _ = checkpoints.build_model(None, str(tmp_path / 'a.pth'), use_ema=False)
    x = torch.randn(1, 3, *reference.img_size)
    with torch.no_grad():
        assert torch.equal(opened(x), reference(x))
