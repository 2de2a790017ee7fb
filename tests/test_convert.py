"""scripts/convert_checkpoint.py: every format there and back, bit by bit; mistakes."""
import argparse
import hashlib
import json
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from test_weights import MINDCV, check_mindcv_logits

import cmt
import convert_checkpoint
import nano
import utils
import weights


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
def mistake(mistake, monkeypatch):
    """Leave out the log, whose line about the file comes before some mistakes are found."""
    monkeypatch.setattr(utils, 'setup_logging', lambda: None)
    return mistake


def convert(folder, *argv):
    convert_checkpoint.main([str(folder / argv[0]), str(folder / argv[1]), *argv[2:]])


@pytest.mark.parametrize('name, dtype', [
    *(('cmt_nano', dtype) for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    *(pytest.param(name, torch.float32, marks=pytest.mark.soak) for name in cmt.MODELS)])
def test_released_names_and_back_are_the_same_bits(tmp_path, name, dtype):
    states = {kind: drawn_state(name, i, dtype, num_classes=3) for i, kind in enumerate(('model', 'model_ema'))}
    released = {kind: cmt.to_released(state) for kind, state in states.items()}
    arguments = argparse.Namespace(model=name, lr=1e-3)
    torch.save({**released, 'optimizer': {'state': {}}, 'epoch': 9, 'args': arguments}, tmp_path / 'a.pth')
    convert(tmp_path, 'a.pth', 'b.pth')
    convert(tmp_path, 'b.pth', 'c.pth', '--format', 'released')
    own, back = (torch.load(tmp_path / name, weights_only=True) for name in ('b.pth', 'c.pth'))
    assert own['epoch'] == back['epoch'] == 9
    for kind, state in states.items():
        assert nano.same(own[kind], state)
        assert {k: v.shape for k, v in back[kind].items()} == {k: v.shape for k, v in released[kind].items()}
        assert nano.same({k: back[kind][k] for k in released[kind]}, released[kind])
    convert(tmp_path, 'c.pth', 'folder', '--weights', 'model')
    opened = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    reference = weights.build_model(weights.read_weights(str(tmp_path / 'a.pth')))
    x = torch.randn(1, 3, *reference.img_size)
    assert torch.equal(opened(x), reference(x))
    assert own['args'] == {'model': name, 'input_size': reference.img_size[0]}


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
    assert not {'license', 'origin_url'} & set(config['pretrained_cfg'])  # those of the published weights
    convert(tmp_path, 'out', 'copy')
    assert json.loads((tmp_path / 'copy' / 'config.json').read_text()) == config

    # every reader of files accepts the folder
    for source in (str(tmp_path / 'out'), f'local-dir:{tmp_path / "out"}'):
        found = weights.read_weights(source)
        again = weights.build_model(found)
        assert nano.same(again.state_dict(), reference.state_dict()) and weights.identify(found)[0] == 'cmt_nano'
        assert torch.equal(again(x), reference(x)) and found.classes_for(again) == ['cat', 'dog', 'eel']
    resumed = weights.find_checkpoint(str(tmp_path / 'out'), None, False)[1]
    assert nano.same(dict(resumed['model']), dict(found.state))
    with pytest.raises(ValueError, match='other classes'):
        weights.build_teacher(None, str(tmp_path / 'out'), ['cat', 'dog', 'fox'])
    assert weights.build_teacher('cmt_nano', str(tmp_path / 'out'), ['cat', 'dog', 'eel']).num_classes == 3
    with pytest.raises(ValueError, match='no checkpoint at'):
        weights.read_weights(str(tmp_path))

    # other classes, channels and size, as from any folder of timm
    other = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, num_classes=5, img_size=96, in_chans=1)
    assert other(torch.randn(1, 1, 96, 96)).shape == (1, 5)


def test_the_number_of_classes_is_in_the_config_once(run_file, tmp_path, monkeypatch):
    """transformers hands its own number beside model_args, and create_model refuses a second one."""
    convert(tmp_path, 'run.pth', 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['num_classes'] == 3 and 'num_classes' not in config['model_args']
    monkeypatch.setattr('timm.models._hub.hf_hub_download',
                        lambda repo_id, filename, **_: str(tmp_path / 'out' / filename))
    for source in (f'local-dir:{tmp_path / "out"}', 'hf-hub:someone/digits'):
        model = timm.create_model(source, pretrained=True)
        assert nano.same(dict(model.state_dict()), run_file['model_ema'])
        assert timm.create_model(source).num_classes == 3
        assert timm.create_model(source, pretrained=True, num_classes=5).num_classes == 5
    model = timm.create_model(config['architecture'], num_classes=4, **config['model_args'])
    assert model.num_classes == 4 and model.img_size == (64, 64)


def test_weights_of_choice_and_a_file_replaced_from_another_folder(run_file, tmp_path):
    for choice, kind in (('ema', 'model_ema'), ('model', 'model')):
        convert(tmp_path, 'run.pth', f'{choice}.safetensors', '--weights', choice)
        assert nano.same(dict(sorted(run_file[kind].items())),
                    dict(sorted(safetensors.torch.load_file(tmp_path / f'{choice}.safetensors').items())))
        convert(tmp_path, 'run.pth', f'{choice}.pth', '--weights', choice)
        state = torch.load(tmp_path / f'{choice}.pth', weights_only=True)
        assert nano.same(state['model'], run_file[kind]) and 'model_ema' not in state
        assert state['classes'] == ['cat', 'dog', 'eel'] and state['epoch'] == 4
    done = subprocess.run([sys.executable, convert_checkpoint.__file__, 'ema.safetensors', 'model.pth', '--overwrite'],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert nano.same(torch.load(tmp_path / 'model.pth', weights_only=True)['model'], run_file['model_ema'])


def test_mindspore_file(tmp_path, mistake):
    """timm opens MindCV's form with its own arithmetic; released names have no place for it."""
    for out in ('out.pth', 'direct'):
        convert_checkpoint.main([str(MINDCV), str(tmp_path / out)])
    convert(tmp_path, 'out.pth', 'out')
    for name in ('out.pth', 'direct', 'out'):
        found = weights.read_weights(str(tmp_path / name))
        check_mindcv_logits(weights.build_model(found, img_size=64))
        if name != 'out.pth':
            source = f'local-dir:{tmp_path / name}'
            check_mindcv_logits(timm.create_model(source, pretrained=True, img_size=64).eval())
            opened, again = timm.create_model(source, pretrained=True).eval(), weights.build_model(found)
            x = torch.randn(2, 3, *opened.img_size)
            assert torch.equal(opened(x), again(x)) and opened.stages[0].position_bias is None
            assert opened.num_classes == 10
    assert 'position bias' in mistake(convert_checkpoint, 'out.pth', 'back.pth', '--format', 'released')


@pytest.mark.parametrize('argv, reason', [
    (['run.pth', 'there'], '--overwrite'),
    (['run.pth', 'there.pth'], '--overwrite'),
    (['run.pth', 'there.pth', '--format', 'dir', '--overwrite'], 'is a file'),
    (['run.pth', 'there', '--format', 'pth', '--overwrite'], 'is a folder'),
    (['run.pth', 'nowhere/a.pth'], 'no folder'),
    (['gone.pth', 'out'], 'gone.pth'),
    (['resnet18', 'out'], 'resnet18 is no CMT'),
    (['run.pth', 'run.pth', '--overwrite'], 'give another name'),
    (['text.pth', 'out'], 'text.pth'),
    (['resnet.pth', 'out'], 'resnet.pth'),
    (['plain.pth', 'out', '--weights', 'ema'], 'contains no EMA'),
    (['run.pth', 'out', '--model', 'cmt_s'], 'run.pth'),
])
def test_mistakes_write_nothing(run_file, tmp_path, mistake, argv, reason):
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'file').write_text('mine')
    (tmp_path / 'there.pth').write_text('mine')
    (tmp_path / 'text.pth').write_text('not weights')
    torch.save({'conv1.weight': torch.zeros(4, 3, 7, 7)}, tmp_path / 'resnet.pth')
    torch.save({'model': run_file['model']}, tmp_path / 'plain.pth')
    assert reason in mistake(convert_checkpoint, *argv)
