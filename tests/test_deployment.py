"""docs/deployment*.md: the commands and code of its sections, run as a reader would, each in a fresh process.

`pytest -m soak -s tests/test_deployment.py` converts with every package that is installed and prints the table of
docs/results.md, on a trained digits run (CHECKPOINT=output/digits/checkpoint_best.pth; without it, it trains one in
five minutes).
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import nano
from datasets import Digits

ROOT = Path(__file__).parents[1]
PAGE = ''.join(path.read_text() for path in sorted(ROOT.glob('docs/deployment*.md')))
SECTIONS = {text.split('\n')[0]: text for text in PAGE.split('\n## ')[1:]}
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}

# name: (section, packages, flags of export.py and changes in the section's code)
FORMS = {
    'eager': ('torch.export', [], {}), 'fused': ('torch.export', [], {}), 'compiled': ('torch.export', [], {}),
    'ONNX Runtime': ('ONNX Runtime', ['onnx', 'onnxruntime', 'onnxscript'], {}),
    'ONNX Runtime, `--half`': ('ONNX Runtime', ['onnx', 'onnxruntime', 'onnxscript'], {'--fuse': '--fuse --half'}),
    'ONNX Runtime, `--int8`': ('ONNX Runtime', ['onnx', 'onnxruntime', 'onnxscript'], {
        '--fuse': '--fuse --int8 pets/train'}),
    'torch.export': ('torch.export', [], {}),
    'TorchScript': ('TorchScript', [], {}),
    'AOTInductor': ('AOTInductor', [], {}),
    'OpenVINO': ('OpenVINO', ['openvino', 'onnxscript'], {}),
    'OpenVINO, bfloat16': ('OpenVINO', ['openvino', 'onnxscript'], {", {'INFERENCE_PRECISION_HINT': 'f32'}": ''}),
    'NNCF, int8': ('NNCF', ['nncf', 'openvino', 'onnxscript'], {}),
    'ncnn': ('ncnn', ['ncnn', 'pnnx'], {}),
    'ExecuTorch': ('ExecuTorch', ['executorch'], {}),
    'LiteRT': ('LiteRT (TensorFlow Lite)', ['litert_torch'], {}),
}

# One thread, where a package does not ask for the cores that the process may use.
ONE_THREAD = {
    "session = ": 'options = onnxruntime.SessionOptions()\noptions.intra_op_num_threads = 1\nsession = ',
    "'pets.onnx')\nmetadata = session": "'pets.onnx', options)\nmetadata = session",
    'ncnn.Net()\n': 'ncnn.Net()\nnet.opt.num_threads = 1\n',
}

# Run after a section's code, whose `classify` has stored the model. Print its figures beside those of torch.
MEASURE = '''
import glob, json, os, statistics, sys, time
import numpy as np, torch
sys.path.insert(0, ROOT)
import cmt
from weights import load_model

measured, reference = classify.model, load_model('output/pets/checkpoint_best.pth')
if FORM == 'eager':
    measured = lambda images: reference(torch.from_numpy(images))
if FORM in ('fused', 'compiled'):
    import torch._inductor.config
    torch._inductor.config.freezing = True
    fused = reference.fuse()
    fused = torch.compile(fused) if FORM == 'compiled' else fused
    measured = lambda images: fused(torch.from_numpy(images))
torch.set_grad_enabled(False)
files = sorted(glob.glob('pets/val/*/*'))
pixels = np.concatenate([preprocess(file, classify.metadata) for file in files])
expected = reference(torch.from_numpy(pixels))
scores = torch.cat([torch.as_tensor(np.array(measured(image[None]))).reshape(1, -1) for image in pixels])
targets = torch.tensor([int(os.path.basename(os.path.dirname(file))) for file in files])
difference = (scores - expected).abs().amax(1) / expected.abs().amax(1).clamp(min=1)
accuracy, torchs = (100 * (s.argmax(1) == targets).double().mean().item() for s in (scores, expected))
figures = {'accuracy': accuracy, 'loss': torchs - accuracy, 'difference': difference.max().item()}
for batch in (1, 8):
    x, ratios = np.resize(pixels, (batch, *pixels.shape[1:])), []
    try:
        if np.array(measured(x)).shape[0] != batch:
            continue
    except Exception:
        continue
    for _ in range(15):
        began = time.process_time()
        measured(x)
        middle = time.process_time()
        reference(torch.from_numpy(x))
        ratios.append((time.process_time() - middle) / (middle - began))
    figures[f'speed{batch}'] = statistics.median(ratios), min(ratios), max(ratios)
print(json.dumps(figures))
'''


def code(section):
    return re.findall(r'^```python\n(.*?)^```', SECTIONS[section], re.DOTALL | re.MULTILINE)[0]


def lay_out(folder, model, classes, images):
    """Write the files that the page names: a checkpoint, pictures (split, class, name, image) and classify.py."""
    (folder / 'output/pets').mkdir(parents=True)
    torch.save({'format': 1, 'model_args': model.model_args, 'model': model.state_dict(), 'args': {}, 'epoch': 1,
                'classes': classes}, folder / 'output/pets/checkpoint_best.pth')
    for split, label, name, image in images:
        (folder / 'pets' / split / label).mkdir(parents=True, exist_ok=True)
        image.save(folder / 'pets' / split / label / name)
    (folder / 'classify.py').write_text(code('Preprocessing'))
    return folder


def python(folder, *argv):
    done = subprocess.run([sys.executable, *argv], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def export(folder, section, changes):
    """Run the commands of a section that export, with changes to its flags."""
    for command in re.findall(r'^    python (scripts/export.py.*?)(?:\s+#.*)?$', SECTIONS[section], re.MULTILINE):
        for old, new in changes.items():
            command = command.replace(old, new)
        script, *argv = shlex.split(command)
        python(folder, ROOT / script, *argv, '--overwrite')


def run(folder, section, changes, before='', after=''):
    """Run the code of a section in a fresh process, between other code."""
    text = code(section)
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / 'run.py').write_text(f'{before}\n{text}\n{after}')
    return python(folder, 'run.py')


def predictions(folder):
    """Return the probabilities (%) of predict.py's five classes for photo.jpg."""
    result = python(folder, ROOT / 'scripts/predict.py', 'output/pets/checkpoint_best.pth', 'photo.jpg', '--json')
    return {one['class']: 100 * one['probability'] for one in json.loads(result)[0]['predictions']}


def printed(output):
    return {name: float(share) for name, share in re.findall(r'^(.*): ([\d.]+)%$', output, re.MULTILINE)}


@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    """Lay out a small model with a photograph that is rotated by EXIF and not square."""
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 7), size=(211, 150), mode='bicubic').clamp(0, 1)
    image = Image.fromarray((pixels[0].permute(1, 2, 0) * 255).byte().numpy())
    model = nano.small(num_classes=6).train()
    with torch.no_grad():
        model(torch.randn(16, 3, 64, 64))
        model.head.weight.mul_(30)
    folder = lay_out(tmp_path_factory.mktemp('pets'), model, ['cat', 'dog', 'eel', 'fox', 'Öl', 'ß'], [])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / 'photo.jpg', exif=exif)
    return folder


@pytest.fixture(scope='module')
def predicted(pets):
    return predictions(pets)


@pytest.mark.parametrize('form, foreign', [
    ('ONNX Runtime', {'torch', 'onnx', 'cmt'}),
    pytest.param('torch.export', {'torchvision', 'timm', 'cmt'}, marks=pytest.mark.soak),
    ('TorchScript', {'torchvision', 'timm', 'cmt'})])
def test_a_fresh_process_classifies_as_predict_does(pets, predicted, form, foreign):
    for package in FORMS[form][1]:
        pytest.importorskip(package)
    export(pets, form, {})
    output = run(pets, form, {}, after=f'import sys; assert not {foreign} & set(sys.modules)')
    assert printed(output) == pytest.approx(predicted, abs=0.011)
    assert len(set(printed(output).values())) > 3


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Lay out a trained digits run (configs/digits.yaml), its digits and, as photograph, one of them."""
    from weights import load_model
    checkpoint = os.environ.get('CHECKPOINT')
    if not checkpoint:
        run = tmp_path_factory.mktemp('run')
        python(ROOT, 'train.py', '--config', 'configs/digits.yaml', '--output-dir', run)
        checkpoint = run / 'checkpoint_best.pth'
    images = [(split, str(label), f'{i:04d}.png', image) for split, data in (
        ('train', Digits(True, 64)), ('val', Digits(False, 64))) for i, (image, label) in enumerate(data)]
    folder = lay_out(tmp_path_factory.mktemp('digits'), load_model(str(checkpoint)), list('0123456789'), images)
    images[-1][-1].save(folder / 'photo.jpg')
    return folder


@pytest.fixture(scope='module')
def cmt_s(digits, tmp_path_factory):
    """Lay out CMT-S at 224 px with random weights, for its speed, and sixteen digits."""
    torch.manual_seed(0)
    images = [(path.parts[-3], path.parts[-2], path.name, Image.open(path)) for path in sorted(
        digits.glob('pets/*/*/*.png'))[::112]]
    folder = lay_out(tmp_path_factory.mktemp('cmt_s'), timm.create_model('cmt_s', num_classes=10), list('0123456789'),
                     images)
    images[-1][-1].save(folder / 'photo.jpg')
    return folder


@pytest.mark.soak
@pytest.mark.parametrize('form', FORMS)
def test_forms_of_a_digits_run(digits, cmt_s, form):
    """Convert a form with its package, compare it with torch, and print its row of the table in docs/results.md."""
    section, packages, changes = FORMS[form]
    for package in packages:
        pytest.importorskip(package)
    before = '''import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import classify as _module
preprocess = _module.preprocess
def classify(path, metadata, model): classify.model, classify.metadata = model, metadata
_module.classify = classify'''
    row = []
    for folder in (digits, cmt_s):
        existing = set(folder.iterdir())
        export(folder, section, changes)
        if folder is digits and form not in ('eager', 'fused', 'compiled'):
            assert printed(run(folder, section, changes)) == pytest.approx(predictions(folder), abs=5)
        after = f'ROOT, FORM = {str(ROOT)!r}, {form!r}\n{MEASURE}'
        output = run(folder, section, {**changes, **ONE_THREAD}, before, after)
        row.append(json.loads(output.splitlines()[-1]))
        new = {path.name: path.stat().st_size for path in set(folder.iterdir()) - existing}
        size = max((new.get(name, 0) for name in (
            'pets-nncf.bin', 'pets.aoti.pt2', 'pets.ncnn.bin', 'pets.pte', 'pets.tflite')), default=0)
        row[-1]['size'] = size or max(new.values())
        for name in new:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    first, second = row

    def ratio(figures, key):
        return '{:.2f} ({:.2f} to {:.2f})'.format(*figures[key]) if key in figures else ''

    print(f'\n| {form} | {first["size"] / 1e6:.1f} | {first["difference"]:.0e} | {first["accuracy"]:.2f} | '
          f'{ratio(first, "speed1")} | {ratio(second, "speed1")} | {ratio(second, "speed8")} |')
    rounded = 'int8' in form or 'half' in form or 'bfloat16' in form
    assert first['loss'] < 0.6 and first['difference'] < (0.5 if rounded else 1e-3)
    if form.endswith('`--int8`'):
        assert first['size'] < 0.35 * sum(p.numel() * 4 for p in torch.load(
            digits / 'output/pets/checkpoint_best.pth', weights_only=True)['model'].values())


@pytest.mark.soak
@pytest.mark.parametrize('changes', [{}, {'model.fuse()': 'model'}], ids=['fused', 'eager'])
def test_core_ml_has_an_image_and_class_names(digits, changes):
    pytest.importorskip('coremltools')
    output = run(digits, 'Core ML', changes, before=f'import sys; sys.path.insert(0, {str(ROOT)!r})',
                 after='print(package.get_spec().description)')
    assert 'imageType' in output and 'predictedFeatureName: "classLabel"' in output
    assert (digits / 'pets.mlpackage').is_dir()
