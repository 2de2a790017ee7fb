"""scripts/predict.py: probabilities, class names, standard input, Grad-CAM, the sheet."""
import csv
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torchvision.transforms.functional import normalize

import convert_checkpoint
import evaluation
import nano
import predict
from reports import GAP, HEADER, PAD, SIDE
from transforms import build_transform

NAMES = ['cat', 'dog', 'eel', 'fox', 'gnu', 'hen']


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a checkpoint with class names, a checkpoint without, and five photographs."""
    rng = np.random.default_rng(0)
    (tmp_path / 'photos' / 'more').mkdir(parents=True)
    modes = {'a.png': 'RGB', 'b.JPEG': 'RGB', 'more/c.png': 'L', 'more/d.png': 'RGBA', 'more/e.png': 'P'}
    for i, (name, mode) in enumerate(modes.items()):
        image = Image.fromarray(rng.integers(0, 256, (5, 4 + i, 3), dtype=np.uint8))
        image.resize((70 + 13 * i, 80), 0).convert(mode).save(tmp_path / 'photos' / name)
    (tmp_path / 'photos' / 'notes.txt').write_text('no image')
    state = {'model': nano.warm(num_classes=6).state_dict(), 'args': {'model': 'cmt_nano'}}
    torch.save(state, tmp_path / 'nameless.pth')
    torch.save({**state, 'classes': NAMES}, tmp_path / 'named.pth')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def crop_of(path):
    return build_transform(False, 64)(Image.open(path).convert('RGB'))


def input_of(path):
    return normalize(crop_of(path)[None] / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def as_json(capsys, *argv):
    predict.main([*argv, '--json'])
    return json.loads(capsys.readouterr().out)


def test_predictions_are_those_of_evaluation(place, capsys):
    results = as_json(capsys, 'named.pth', 'photos', 'photos/a.png', '--top', '3', '--batch-size', '4')
    assert ' '.join(result['image'].removeprefix('photos/') for result in results) == (
        'a.png b.JPEG more/c.png more/d.png more/e.png a.png')
    model = nano.warm(num_classes=6)
    for result in results:
        with torch.no_grad():
            probabilities = model(input_of(result['image'])).softmax(-1)[0]
        indices = probabilities.argsort(descending=True)[:3].tolist()
        assert result['predictions'] == [
            {'index': i, 'class': NAMES[i], 'probability': pytest.approx(probabilities[i].item(), abs=1e-5)}
            for i in indices]
    assert len({result['predictions'][0]['class'] for result in results}) > 1


def test_table_and_csv_say_what_json_says(place, capsys):
    argv = ['named.pth', 'photos/a.png', 'photos/more', '--top', '2']
    rows = [(result['image'], str(rank), str(one['index']), one['class'], one['probability'])
            for result in as_json(capsys, *argv) for rank, one in enumerate(result['predictions'], 1)]
    predict.main([*argv, '--csv'])
    header, *lines = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ['image', 'rank', 'index', 'class', 'probability']
    assert [(*line[:4], pytest.approx(float(line[4]), rel=1e-5)) for line in lines] == rows
    predict.main(argv)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split() for line in lines] == [
        [image] * (rank == '1') + [name, f'{probability:.2%}'] for image, rank, _, name, probability in rows]
    assert len({len(line) for line in lines}) == 1


def test_json_and_csv_are_utf8_in_any_pipe(place):
    names = ['Bär', '猫', '😀', 'd', 'e', 'f']
    torch.save({**torch.load('named.pth'), 'classes': names}, 'names.pth')
    for flag in '--json', '--csv':
        command = [sys.executable, predict.__file__, 'names.pth', 'photos/a.png', flag, '--top', '6']
        out = subprocess.run(command, check=True, capture_output=True,
                             env={**os.environ, 'PYTHONIOENCODING': 'cp1252'}).stdout.decode()
        rows = json.loads(out)[0]['predictions'] if flag == '--json' else list(csv.DictReader(out.splitlines()))
        assert {row['class'] for row in rows} == set(names)


def test_unreadable_images_are_named_and_the_rest_is_printed(place, capsys):
    Path('photos/text.png').write_text('no image')
    Path('photos/short.png').write_bytes(Path('photos/a.png').read_bytes()[:60])
    printed = {}
    for flag in ('--json', '--csv', '--picture=sheet.jpg'):
        with pytest.raises(SystemExit) as stop:
            predict.main(['named.pth', 'photos', 'gone.png', '--top', '1', flag])
        printed[flag], errors = capsys.readouterr()
        assert stop.value.code == 1 and len(errors.splitlines()) == 3
        assert all(path in errors for path in ('photos/text.png', 'photos/short.png', 'gone.png'))
    assert len(json.loads(printed['--json'])) == len(list(csv.DictReader(io.StringIO(printed['--csv'])))) == 5
    assert Image.open('sheet.jpg').width > 400


def test_class_names(place, capsys):
    def names(*argv):
        return [one['class'] for one in as_json(capsys, *argv, 'photos/a.png', '--top', '99')[0]['predictions']]

    order = [int(name.removeprefix('class ')) for name in names('nameless.pth')]
    assert sorted(order) == list(range(6)) and names('named.pth') == [NAMES[i] for i in order]
    Path('names').write_text('\ufeff' + '\n'.join('uvwxyz') + '\n')
    assert names('named.pth', '--class-names', 'names') == ['uvwxyz'[i] for i in order]

    convert_checkpoint.main(['named.pth', 'folder'])
    capsys.readouterr()
    logging.root.setLevel(logging.WARNING)  # as at the start of a process
    assert names('folder') == names('named.pth')

    torch.save({'model': nano.warm(num_classes=1000).state_dict()}, 'imagenet.pth')
    words = ImageNetInfo().label_descriptions()
    assert set(names('imagenet.pth')) <= set(words) and words[0].startswith('tench')
    assert evaluation.class_words([*ImageNetInfo().label_names(), 'n00000000']) == [*words, 'n00000000']


def test_the_ema_is_used_unless_no_model_ema_is_given(place, capsys):
    state = torch.load('named.pth', weights_only=True)
    state['model_ema'] = {key: value * 0 if key.startswith('head.') else value for key, value in state['model'].items()}
    torch.save(state, 'both.pth')
    top = as_json(capsys, 'both.pth', 'photos/a.png')[0]['predictions'][0]
    assert top['probability'] == pytest.approx(1 / 6)
    weights = as_json(capsys, 'both.pth', 'photos/a.png', '--no-model-ema')
    assert weights == as_json(capsys, 'named.pth', 'photos/a.png')


def test_standard_input_is_an_image(place, capsys, monkeypatch):
    def feed(content):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content)))
        return as_json(capsys, 'named.pth', '-')

    assert feed(Path('photos/a.png').read_bytes()) == [as_json(capsys, 'named.pth', 'photos/a.png')[0] | {'image': '-'}]
    for content in (b'', b'photos/a.png'):
        with pytest.raises(SystemExit, match='1'):
            feed(content)


@pytest.mark.parametrize('argv, reason', [
    (['gone.pth', 'photos'], 'gone.pth'),
    (['named.pth', 'empty'], 'empty'),
    (['named.pth', 'photos', '--class-names', 'two.txt'], 'two.txt'),
    (['named.pth', 'photos', '--class-names', 'photos/a.png'], 'photos/a.png'),
    (['named.pth', 'photos', '--picture', 'a.xyz'], 'a.xyz'),
    (['named.pth', 'photos', '--input-size', '50'], '32'),
    (['named.pth', 'photos', '--device', 'cudo'], '--device cudo'),
    (['other.pth', 'photos'], 'other.pth'),
])
def test_mistakes_get_one_line(place, mistake, argv, reason):
    (place / 'empty').mkdir()
    (place / 'two.txt').write_text('one\ntwo\n')
    torch.save({'fc.weight': torch.zeros(2, 3)}, 'other.pth')  # of another architecture
    assert reason in mistake(predict, *argv)


@pytest.mark.parametrize('size, depth', [(32, 2), (64, 3), (128, 4)])
def test_grad_cam_is_its_definition(place, size, depth):
    """Compare with finite differences of the largest logit, in float64."""
    model = nano.warm(num_classes=6).double()
    model.set_input_size(size)
    images = torch.cat([input_of('photos/a.png'), input_of('photos/b.JPEG')]).double()
    images = F.interpolate(images, size=(size, size), mode='bilinear')
    cams = evaluation.grad_cam(model, images)
    with torch.no_grad():
        logits = model(images)
        for maps, cam, scores in zip(model.stages[:depth](model.stem(images)), cams, logits):  # maps: (C, 4, 4)
            steps = 1e-5 * torch.eye(maps.numel()).reshape(-1, len(maps), 4, 4)
            moved = model.forward_head(model.head_proj(model.stages[depth:](maps + steps)))[:, scores.argmax()]
            gradient = ((moved - scores.max()) / 1e-5).reshape(maps.shape)
            mine = (gradient.mean((1, 2))[:, None, None] * maps).sum(0).clamp(min=0)
            mine = F.interpolate(mine[None, None], size=(size, size), mode='bilinear')[0, 0]
            torch.testing.assert_close(cam, mine / mine.max().clamp(min=1e-12), rtol=1e-3, atol=1e-3)
    assert cams.shape == (2, size, size) and cams.max() <= 1 and cams.min() >= 0


def test_sheet_shows_what_the_model_sees(place, capsys):
    """Paths may be relative and absolute; the printed table does not depend on the sheet."""
    argv = ['named.pth', 'photos/a.png', str(place / 'photos' / 'more' / 'c.png')]
    predict.main([*argv, '--picture', 'sheet.png'])
    printed = capsys.readouterr().out
    predict.main(argv)
    assert capsys.readouterr().out == printed
    sheet = np.asarray(Image.open('sheet.png').convert('RGB'))
    crop = Image.fromarray(np.asarray(crop_of(argv[1])).transpose(1, 2, 0)).resize((SIDE, SIDE), 3)  # bicubic
    top, left = HEADER + PAD, GAP + PAD
    assert np.array_equal(sheet[top:top + SIDE, left:left + SIDE], np.asarray(crop))


@pytest.mark.parametrize('orientation', range(2, 9))
def test_rotated_photographs_are_seen_upright(place, capsys, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open('photos/a.png').save('rotated.png', exif=exif)
    ImageOps.exif_transpose(Image.open('rotated.png')).save('upright.png')
    rotated, upright = as_json(capsys, 'named.pth', 'rotated.png', 'upright.png')
    assert rotated['predictions'] == upright['predictions'] != as_json(
        capsys, 'named.pth', 'photos/a.png')[0]['predictions']


def test_a_thin_image_is_not_resized(place, capsys):
    Image.new('RGB', (3000, 1)).save('thin.png')
    with pytest.raises(SystemExit, match='1'):
        predict.main(['named.pth', 'thin.png'])
    assert 'thin.png' in capsys.readouterr().err
