"""scripts/convert_checkpoint.py: every format there and back, bit by bit; mistakes."""
import argparse
import hashlib
import json
import logging

import pytest
import safetensors.torch
import timm
import torch

import cmt
import convert_checkpoint
import nano
import weights
from test_weights import MINDCV, check_mindcv_logits


def drawn_state(name='cmt_nano', seed=0, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    return {key: (value + 0.1 * torch.randn(value.shape, dtype=torch.float64)).to(dtype)
            if value.is_floating_point() else value + 7
            for key, value in timm.create_model(name, **kwargs).state_dict().items()}


@pytest.fixture
def run_file(tmp_path):
    """Write a checkpoint as train.py does, and return it."""
    state = {
        'model': drawn_state(num_classes=3, img_size=64), 'model_ema': drawn_state(seed=1, num_classes=3, img_size=64),
        'optimizer': {}, 'epoch': 4, 'classes': ['cat', 'dog', 'eel'], 'args': {'model': 'cmt_nano', 'input_size': 64}}
    torch.save(state, tmp_path / 'run.pth')
    return state


@pytest.fixture
def mistake(mistake):
    """Turn the log off: some mistakes are found after reading a file, which is logged."""
    logging.disable(logging.INFO)
    yield mistake
    logging.disable(logging.NOTSET)


def convert(folder, *argv):
    convert_checkpoint.main([str(folder / argv[0]), str(folder / argv[1]), *argv[2:]])


@pytest.mark.parametrize('name, dtype', [
    *(('cmt_nano', dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    *(pytest.param(name, torch.float32, marks=pytest.mark.soak) for name in cmt.MODELS)])
def test_released_names_and_back_are_the_same_bits(tmp_path, name, dtype):
    states = {kind: drawn_state(name, i, dtype, num_classes=3) for i, kind in enumerate(('model', 'model_ema'))}
    released = {kind: cmt.to_released(state) for kind, state in states.items()}
    arguments = argparse.Namespace(model=name, lr=1e-3)
    torch.save({**released, 'optimizer': {'state': {}}, 'epoch': 9, 'args': arguments}, tmp_path / 'a.pth')
    for kind, flags in (('model_ema', []), ('model', ['--no-model-ema'])):
        convert(tmp_path, 'a.pth', 'b.pth', '--overwrite', *flags)
        convert(tmp_path, 'b.pth', 'c.pth', '--overwrite', '--format', 'released')
        ours, back = (torch.load(tmp_path / name, weights_only=True) for name in ('b.pth', 'c.pth'))
        assert ours['epoch'] == back['epoch'] == 9 and 'model_ema' not in {**ours, **back}
        assert nano.same(ours['model'], states[kind])
        assert {k: v.shape for k, v in back['model'].items()} == {k: v.shape for k, v in released[kind].items()}
        assert nano.same({k: back['model'][k] for k in released[kind]}, released[kind])
    convert(tmp_path, 'c.pth', 'folder')
    opened = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    reference = weights.build_model(weights.read_weights(str(tmp_path / 'a.pth')))
    x = torch.randn(1, 3, *reference.img_size)
    assert torch.equal(opened(x), reference(x))


def test_a_folder_that_timm_opens(run_file, tmp_path, capsys):
    convert(tmp_path, 'run.pth', 'out')
    printed = capsys.readouterr().out
    for name in ('model.safetensors', 'config.json'):
        assert hashlib.sha256((tmp_path / 'out' / name).read_bytes()).hexdigest() in printed
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {*convert_checkpoint.FILES}
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    reference = timm.create_model('cmt_nano', num_classes=3, img_size=64).eval()
    reference.load_state_dict(run_file['model_ema'])
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), reference(x))
    assert model.pretrained_cfg['label_names'] == ['cat', 'dog', 'eel']
    assert model.pretrained_cfg['input_size'] == (3, 64, 64) and model.pretrained_cfg['crop_pct'] == 0.875
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert not {'license', 'origin_url'} & set(config['pretrained_cfg'])  # those of the published weights
    assert config['num_classes'] == 3 and 'num_classes' not in config['model_args']  # transformers passes its own
    convert(tmp_path, 'out', 'copy')
    assert json.loads((tmp_path / 'copy' / 'config.json').read_text()) == config

    # Every reader of files accepts the folder.
    for source in (str(tmp_path / 'out'), f'local-dir:{tmp_path / "out"}'):
        opened = weights.read_weights(source)
        again = weights.build_model(opened)
        assert nano.same(again.state_dict(), reference.state_dict())
        assert torch.equal(again(x), reference(x)) and opened.class_names(again) == ['cat', 'dog', 'eel']

    # timm's arguments still apply: other classes, channels and size.
    other = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, num_classes=5, img_size=96, in_chans=1)
    assert other(torch.randn(1, 1, 96, 96)).shape == (1, 5)


def test_choice_of_weights_and_overwrite(run_file, tmp_path, monkeypatch):
    for choice, kind, flags in (('ema', 'model_ema', []), ('model', 'model', ['--no-model-ema'])):
        convert(tmp_path, 'run.pth', f'{choice}.safetensors', *flags)
        assert nano.same(dict(sorted(run_file[kind].items())),
                         dict(sorted(safetensors.torch.load_file(tmp_path / f'{choice}.safetensors').items())))
        convert(tmp_path, 'run.pth', f'{choice}.pth', *flags)
        state = torch.load(tmp_path / f'{choice}.pth', weights_only=True)
        assert nano.same(state['model'], run_file[kind]) and 'model_ema' not in state
        assert state['classes'] == ['cat', 'dog', 'eel'] and state['epoch'] == 4
    monkeypatch.chdir(tmp_path)
    convert_checkpoint.main(['ema.safetensors', 'model.pth', '--overwrite'])
    assert nano.same(torch.load(tmp_path / 'model.pth', weights_only=True)['model'], run_file['model_ema'])


def test_mindspore_file(tmp_path, mistake):
    """timm opens MindCV's form with its own arithmetic; released names cannot hold it."""
    for out in ('out.pth', 'direct'):
        convert_checkpoint.main([str(MINDCV), str(tmp_path / out)])
    convert(tmp_path, 'out.pth', 'out')
    for name in ('out.pth', 'direct', 'out'):
        source = weights.read_weights(str(tmp_path / name))
        check_mindcv_logits(weights.build_model(source, img_size=64))
        if name != 'out.pth':
            folder = f'local-dir:{tmp_path / name}'
            check_mindcv_logits(timm.create_model(folder, pretrained=True, img_size=64).eval())
            opened, again = timm.create_model(folder, pretrained=True).eval(), weights.build_model(source)
            x = torch.randn(2, 3, *opened.img_size)
            assert torch.equal(opened(x), again(x)) and opened.num_classes == 10
    assert mistake(convert_checkpoint, 'out.pth', 'back.pth', '--format', 'released')


@pytest.mark.parametrize('argv, named', [
    (['run.pth', 'there'], '--overwrite'),
    (['run.pth', 'there.pth', '--format', 'dir', '--overwrite'], 'there.pth'),
    (['run.pth', 'nowhere/a.pth'], 'nowhere'),
    (['gone.pth', 'out'], 'gone.pth'),
    (['run.pth', 'run.pth', '--overwrite'], 'run.pth'),
    (['text.pth', 'out'], 'text.pth'),
    (['resnet.pth', 'out'], 'resnet.pth'),
    (['run.pth', 'out', '--model', 'cmt_s'], 'run.pth'),
])
def test_mistakes_write_nothing(run_file, tmp_path, mistake, argv, named):
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'file').write_text('mine')
    (tmp_path / 'there.pth').write_text('mine')
    (tmp_path / 'text.pth').write_text('not weights')
    torch.save({'conv1.weight': torch.zeros(4, 3, 7, 7)}, tmp_path / 'resnet.pth')
    assert named in mistake(convert_checkpoint, *argv)
