"""scripts/export.py: logits and metadata of exported models; mistakes."""
import json
import re

import pytest
import timm
import torch
from torchvision.transforms.functional import to_pil_image

import export
import nano
from engine import Preprocessor
from transforms import build_transform


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Write a checkpoint with EMA, statistics and classes; its EMA differs from its weights."""
    state = {kind: nano.warm(seed, num_classes=3).state_dict() for seed, kind in enumerate(('model', 'model_ema'))}
    path = tmp_path_factory.mktemp('export') / 'cats.pth'
    torch.save({**state, 'epoch': 1, 'classes': ['cat', 'dog', 'eel'], 'args': {'model': 'cmt_nano'}}, path)
    return path


def reference(checkpoint, kind, images, **kwargs):
    model = timm.create_model('cmt_nano', num_classes=3, img_size=64, **kwargs).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)[kind])
    with torch.no_grad():
        return model(images)


def run(path):
    """Load an exported model without this project; return a function and the metadata."""
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


@pytest.mark.parametrize('suffix, allowed, fuse', [('onnx', 1e-4, True), ('pt2', 1e-5, False), ('ts', 1e-5, True)])
def test_logits_and_metadata(checkpoint, tmp_path, capsys, suffix, allowed, fuse):
    if suffix == 'onnx':
        for package in ('onnx', 'onnxruntime', 'onnxscript'):
            pytest.importorskip(package)
    path = tmp_path / f'cats.{suffix}'
    export.main([str(checkpoint), str(path), *['--fuse'] * fuse])
    assert 'EMA' in capsys.readouterr().out
    exported, metadata = run(path)
    assert metadata == {
        'model': 'cmt_nano', 'input_size': [3, 64, 64], 'crop_pct': 0.875,
        'interpolation': 'bicubic', 'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225],
        'classes': ['cat', 'dog', 'eel']}
    if suffix == 'ts':
        assert len(exported.state_dict()) < len(torch.load(checkpoint, weights_only=True)['model'])
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            logits = exported(x)
        torch.testing.assert_close(logits, reference(checkpoint, 'model_ema', x), rtol=0, atol=allowed)
    assert (logits - reference(checkpoint, 'model', x)).abs().max() > 0.01
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.fixture(scope='module')
def labeled(tmp_path_factory):
    """Write a checkpoint and 24 photographs in class folders, whose classes are its predictions."""
    folder, generator, model = tmp_path_factory.mktemp('labeled'), torch.Generator().manual_seed(0), nano.warm(
        num_classes=3)
    pixels = torch.cat([torch.nn.functional.interpolate(
        torch.rand(1, 3, 5, 5, generator=generator), size=(80, 90), mode='bicubic').clamp(0, 1) for _ in range(24)])
    images = [to_pil_image(one) for one in pixels]
    x = torch.stack([build_transform(False, 64)(image) for image in images])
    with torch.no_grad():
        logits = model(Preprocessor(torch.device('cpu'))(x, torch.zeros(24))[0])
        model.head.bias -= logits.mean(0)
    for i, label in enumerate((logits - logits.mean(0)).argmax(1).tolist()):
        (folder / 'photos' / 'abc'[label]).mkdir(parents=True, exist_ok=True)
        images[i].save(folder / 'photos' / 'abc'[label] / f'{i}.png')
    torch.save({'format': 1, 'model_args': model.model_args, 'model': model.state_dict(), 'args': {}, 'epoch': 1,
                'classes': ['a', 'b', 'c']}, folder / 'abc.pth')
    return folder / 'abc.pth', folder / 'photos'


def printed(text):
    """Return equal predictions, accuracy of the model and of the file (%), and the number of images."""
    return [float(share) for share in re.findall(r'([\d.]+) %', text)], int(re.search(r'\((\d+) images\)', text)[1])


def test_int8_is_compared_on_images_that_were_not_calibrated(labeled, tmp_path, capsys):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    checkpoint, photos = labeled
    for flags in ([], ['--eval-data', str(photos), '--max-accuracy-loss', '100']):
        export.main([str(checkpoint), str(tmp_path / 'a.onnx'), '--overwrite', '--int8', str(photos), *flags])
        shares, images = printed(capsys.readouterr().out)
        assert images == 12 and shares[0] > 80
        assert shares[1:] == ([100, shares[0]] if flags else [])  # The labels are the model's predictions.
    assert run(tmp_path / 'a.onnx')[1]['classes'] == ['a', 'b', 'c']
    nodes = onnx.load(tmp_path / 'a.onnx').graph.node
    assert sum(any(a.name == 'axis' for a in node.attribute) for node in nodes) > 20  # a scale for each channel


def test_a_file_that_loses_accuracy_is_not_written(labeled, mistake, monkeypatch, tmp_path):
    pytest.importorskip('onnxscript')
    (checkpoint, photos), quantize = labeled, export.quantize
    monkeypatch.setattr(export, 'quantize', lambda content, calibration: quantize(
        content, [(images / 1000, targets) for images, targets in calibration]))  # ranges of other images
    flags = ['--int8', str(photos), '--eval-data', str(photos)]
    assert '--max-accuracy-loss' in mistake(export, checkpoint, 'a.onnx', *flags)
    export.main([str(checkpoint), str(tmp_path / 'a.onnx'), *flags, '--max-accuracy-loss', '100'])


@pytest.mark.parametrize('suffix', ['onnx', 'pt2', 'ts'])
def test_half_takes_and_returns_float32(labeled, tmp_path, capsys, suffix):
    if suffix == 'onnx':
        pytest.importorskip('onnxscript')
    checkpoint, photos = labeled
    x, logits = torch.randn(2, 3, 64, 64), []
    for flags in ([], ['--half', '--eval-data', str(photos)]):
        export.main([str(checkpoint), str(tmp_path / f'a.{suffix}'), '--overwrite', *flags])
        logits.append(run(tmp_path / f'a.{suffix}')[0](x))
    assert printed(capsys.readouterr().out.splitlines()[-2])[1] == 24
    assert logits[1].dtype == torch.float32
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.02 * logits[0].abs().max()


def test_opset_18_has_no_gelu(checkpoint, tmp_path):
    pytest.importorskip('onnxscript')
    import onnx
    export.main([str(checkpoint), str(tmp_path / 'a.onnx'), '--opset', '18'])
    model = onnx.load(tmp_path / 'a.onnx')
    assert {entry.domain: entry.version for entry in model.opset_import}[''] == 18
    operators = {node.op_type for node in model.graph.node}
    assert 'Erf' in operators and 'Gelu' not in operators


@pytest.mark.parametrize('flags, kind, sizes', [
    (['--dynamic-img-size', '--no-model-ema'], 'model', [(64, 64), (32, 96)]),
    (['--input-size', '32', '96'], 'model_ema', [(32, 96)]),
])
def test_torchscript_of_other_sizes(checkpoint, tmp_path, flags, kind, sizes):
    path = tmp_path / 'a.ts'
    export.main([str(checkpoint), str(path), *flags])
    exported = run(path)[0]
    for size in sizes:
        x = torch.randn(2, 3, *size)
        expected = reference(checkpoint, kind, x, dynamic_img_size=True)
        torch.testing.assert_close(exported(x), expected, rtol=0, atol=1e-5)
    with pytest.raises(torch.jit.Error, match='33x64'):
        exported(torch.randn(1, 3, 33, 64))


@pytest.mark.parametrize('argv, named', [
    (['CKPT', 'a.tflite'], '.onnx'),
    (['CKPT', 'a.onnx', '--dynamic-img-size'], '--dynamic-img-size'),
    (['CKPT', 'a.ts', '--input-size', '50'], '32'),
    (['CKPT', 'nowhere/a.ts'], 'nowhere/a.ts'),
    (['CKPT', 'a.pt2', '--int8', '.'], '--int8'),
    (['CKPT', 'a.ts', '--opset', '18'], '--opset'),
    (['CKPT', 'a.onnx', '--opset', '12'], '12'),
    (['CKPT', 'a.onnx', '--int8', 'nowhere'], 'nowhere'),
    (['CKPT', 'a.onnx', '--int8', '.'], 'no images'),
    (['CKPT', 'a.onnx', '--eval-data', '.'], 'no class folders'),
    (['CKPT', 'a.onnx', '--input-size', '32', '96', '--eval-data', '.'], '32x96'),
    (['resnet18', 'a.ts'], 'resnet18'),
])
def test_mistakes_are_named_and_write_nothing(checkpoint, mistake, argv, named):
    assert named in mistake(export, *(checkpoint if arg == 'CKPT' else arg for arg in argv))


def test_only_overwrite_replaces_a_file(checkpoint, tmp_path, mistake):
    path, copy = tmp_path / 'model.PT', tmp_path / 'copy.pt'
    path.write_text('mine')
    copy.write_bytes(checkpoint.read_bytes())
    assert '--overwrite' in mistake(export, copy, path)
    for overwrite in ([], ['--overwrite']):
        assert 'copy.pt' in mistake(export, copy, copy, *overwrite)
    export.main([str(copy), str(path), '--overwrite'])
    run(path)


@pytest.mark.parametrize('error', [1e-4, float('nan')])
def test_a_file_with_other_logits_is_not_written(checkpoint, monkeypatch, mistake, error):
    """Let torch load another model than it saved."""
    load = torch.jit.load

    def load_another(file):
        exported = load(file)
        return lambda x: exported(x) + error

    monkeypatch.setattr(torch.jit, 'load', load_another)
    assert mistake(export, checkpoint, 'a.ts')
