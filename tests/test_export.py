"""scripts/export.py: logits of the exported models, what they tell of themselves, and what is refused."""
import json

import pytest
import timm
import torch
from test_cmt import FIGURES, drawn

import cmt
import export
import nano  # noqa: F401


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A checkpoint whose average differs from its weights, with statistics and classes."""
    torch.manual_seed(0)
    state = {}
    for kind in ('model', 'model_ema'):
        model = timm.create_model('cmt_nano', num_classes=3, img_size=64).train()
        with torch.no_grad():
            model(torch.randn(8, 3, 64, 64))
            model.head.weight.mul_(20)
        state[kind] = model.state_dict()
    path = tmp_path_factory.mktemp('export') / 'cats.pth'
    torch.save({**state, 'epoch': 1, 'classes': ['cat', 'dog', 'eel'], 'args': {'model': 'cmt_nano'}}, path)
    return path


def reference(checkpoint, kind, images, **kwargs):
    model = timm.create_model('cmt_nano', num_classes=3, img_size=64, **kwargs).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)[kind])
    with torch.no_grad():
        return model(images)


def run(path):
    """An exported model as whoever gets the file runs it, and its metadata."""
    if path.suffix == '.onnx':
        session = pytest.importorskip('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider'])
        metadata = session.get_modelmeta().custom_metadata_map['cmt']
        return lambda x: torch.from_numpy(session.run(['logits'], {'images': x.numpy()})[0]), json.loads(metadata)
    extra = {'cmt': ''}
    if path.suffix == '.pt2':
        model = torch.export.load(path, extra_files=extra).module()
    else:
        model = torch.jit.load(path, _extra_files=extra)
    return model, json.loads(extra['cmt'])


@pytest.mark.parametrize('suffix, allowed', [('onnx', 1e-4), ('pt2', 1e-5), ('ts', 1e-5)])
def test_logits_and_metadata(checkpoint, tmp_path, capsys, suffix, allowed):
    if suffix == 'onnx':
        for package in ('onnx', 'onnxruntime', 'onnxscript'):
            pytest.importorskip(package)
    path = tmp_path / f'cats.{suffix}'
    export.main([str(checkpoint), str(path)])
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 and 'cmt_nano (average of the weights) at 64x64, 3 classes' in said
    exported, metadata = run(path)
    assert metadata == {
        'model': 'cmt_nano', 'input_size': [3, 64, 64], 'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225],
        'classes': ['cat', 'dog', 'eel']}
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            logits = exported(x)
        torch.testing.assert_close(logits, reference(checkpoint, 'model_ema', x), rtol=0, atol=allowed)
    assert (logits - reference(checkpoint, 'model', x)).abs().max() > 0.01
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_torchscript_of_any_size_and_of_the_weights_themselves(checkpoint, tmp_path):
    path = tmp_path / 'a.ts'
    export.main([str(checkpoint), str(path), '--dynamic-img-size', '--model-weights'])
    exported = run(path)[0]
    for size in ((64, 64), (32, 96)):
        x = torch.randn(2, 3, *size)
        expected = reference(checkpoint, 'model', x, dynamic_img_size=True)
        torch.testing.assert_close(exported(x), expected, rtol=0, atol=1e-5)
    with pytest.raises(Exception, match='multiples of 32'):
        exported(torch.randn(1, 3, 33, 64))


def test_rectangular_input(checkpoint, tmp_path):
    path = tmp_path / 'a.ts'
    export.main([str(checkpoint), str(path), '--input-size', '32', '96'])
    x = torch.randn(2, 3, 32, 96)
    expected = reference(checkpoint, 'model_ema', x, dynamic_img_size=True)
    torch.testing.assert_close(run(path)[0](x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('argv, reason', [
    (['CKPT', 'a.tflite'], 'must end in'),
    (['CKPT', 'a.onnx', '--dynamic-img-size'], 'one input size'),
    (['CKPT', 'a.pt2', '--dynamic-img-size'], 'one input size'),
    (['CKPT', 'a.ts', '--input-size', '50'], 'multiples of 32'),
    (['CKPT', 'a.ts', '--input-size', '32', '64', '96'], 'height and width'),
    (['CKPT', 'nowhere/a.ts'], 'no folder'),
    (['CKPT', 'a.ts', '--random-weights'], 'unknown model'),
    (['resnet18', 'a.ts', '--random-weights'], 'resnet18 is no CMT'),
    (['resnet18', 'a.ts'], 'resnet18 is no CMT'),
    (['missing.pth', 'a.ts'], 'no checkpoint at missing.pth, nor a model of that name (cmt_b, '),
])
def test_mistakes(checkpoint, tmp_path, monkeypatch, capsys, argv, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        export.main([str(checkpoint) if arg == 'CKPT' else arg for arg in argv])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == '' and not any(tmp_path.iterdir())
    assert ': error: ' in said.err and reason in said.err and said.err.count('\n') == 1


def test_nothing_is_replaced_unasked(checkpoint, tmp_path, capsys):
    path, own = tmp_path / 'model.PT', tmp_path / 'own.pt'
    path.write_text('mine')
    own.write_bytes(checkpoint.read_bytes())
    for argv, reason in ((path, 'is there already'), (own, 'the checkpoint itself'), (tmp_path, 'must end in')):
        with pytest.raises(SystemExit):
            export.main([str(own), str(argv)])
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main([str(own), str(own), '--overwrite'])
    assert path.read_text() == 'mine' and own.read_bytes() == checkpoint.read_bytes()
    export.main([str(own), str(path), '--overwrite'])
    run(path)


def test_fuse_is_refused_by_a_model_that_cannot(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(cmt.CMT, 'fuse', raising=False)
    with pytest.raises(SystemExit):
        export.main([str(checkpoint), str(tmp_path / 'a.ts'), '--fuse'])
    assert 'no fuse()' in capsys.readouterr().err


def test_nothing_is_written_that_disagrees(checkpoint, tmp_path, monkeypatch, capsys):
    def wrong(model, images, metadata):
        return b'', lambda x: model(x) + 1e-4

    monkeypatch.setitem(export.FORMATS, '.ts', (wrong, 1e-5))
    with pytest.raises(SystemExit) as stop:
        export.main([str(checkpoint), str(tmp_path / 'a.ts')])
    assert stop.value.code == 2 and 'differ by' in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.soak
@pytest.mark.parametrize('suffix', ['onnx', 'pt2', 'ts'])
@pytest.mark.parametrize('name', ['cmt_ti', 'cmt_xs', 'cmt_s', 'cmt_b'])
def test_published_models(name, suffix, tmp_path, capsys):
    """Released names, tensors drawn as those of the golden values."""
    state = {key: drawn(key, shape) for key, shape in FIGURES[name]['state'].items()}
    torch.save({'model': state}, tmp_path / 'released.pth')
    export.main([str(tmp_path / 'released.pth'), str(tmp_path / f'{name}.{suffix}')])
    with capsys.disabled():
        print(capsys.readouterr().out)
