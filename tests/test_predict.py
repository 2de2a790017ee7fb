"""scripts/predict.py: probabilities, class names, standard input, the heat map, the sheet."""
import csv
import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import convert_checkpoint
import nano
import predict
from transforms import build_transform

NAMES = ['cat', 'dog', 'eel', 'fox', 'gnu', 'hen']


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Write a checkpoint with names, a checkpoint without, and five photographs into the folder of the test."""
    rng = np.random.default_rng(0)
    (tmp_path / 'photos' / 'more').mkdir(parents=True)
    for i, (name, mode) in enumerate((('a.png', 'RGB'), ('b.JPEG', 'RGB'), ('more/c.png', 'L'), ('more/d.png', 'RGBA'),
                                      ('more/e.png', 'P'))):
        pixels = rng.integers(0, 256, (5, 4 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70 + 13 * i, 80), 0).convert(mode).save(tmp_path / 'photos' / name)
    (tmp_path / 'photos' / 'notes.txt').write_text('no image')
    state = {'model': nano.warm(num_classes=6).state_dict(), 'args': {'model': 'cmt_nano'}}
    torch.save(state, tmp_path / 'nameless.pth')
    torch.save({**state, 'classes': NAMES}, tmp_path / 'named.pth')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected(path):
    pixels = build_transform(False, 64)(Image.open(path).convert('RGB'))
    mean, std = (np.array(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    images = torch.from_numpy((np.asarray(pixels) / 255. - mean) / std).float()[None]
    with torch.no_grad():
        return nano.warm(num_classes=6)(images).softmax(-1)[0], images


def as_json(capsys, *argv):
    predict.main([*argv, '--json'])
    return json.loads(capsys.readouterr().out)


def test_answers_are_those_of_evaluation(place, capsys):
    results = as_json(capsys, 'named.pth', 'photos', 'photos/a.png', '--top', '3', '--batch-size', '4')
    assert [r['image'] for r in results] == [
        'photos/a.png', 'photos/b.JPEG', 'photos/more/c.png', 'photos/more/d.png', 'photos/more/e.png', 'photos/a.png']
    tops = set()
    for result in results:
        probabilities, _ = expected(result['image'])
        order = probabilities.argsort(descending=True)[:3].tolist()
        assert [answer['index'] for answer in result['predictions']] == order
        assert [answer['class'] for answer in result['predictions']] == [NAMES[i] for i in order]
        for answer in result['predictions']:
            assert answer['probability'] == pytest.approx(probabilities[answer['index']].item(), abs=1e-5)
        tops.add(order[0])
    assert len(tops) > 1


def test_table_and_csv(place, capsys):
    results = as_json(capsys, 'named.pth', 'photos/a.png', 'photos/more', '--top', '2')
    predict.main(['named.pth', 'photos/a.png', 'photos/more', '--top', '2', '--csv'])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row['image'], int(row['index'])) for row in rows] == [
        (r['image'], answer['index']) for r in results for answer in r['predictions']]
    assert [row['rank'] for row in rows] == ['1', '2'] * 4
    predict.main(['named.pth', 'photos/a.png', 'photos/more', '--top', '2'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 8 and len({len(line) for line in lines}) == 1
    assert lines[2].split()[0] == 'photos/a.png' and lines[3].startswith(' ')
    top = results[0]['predictions'][0]
    assert lines[2].endswith(f"{top['probability']:.2%}") and top['class'] in lines[2]


def test_names_of_any_bytes_in_every_output(place, capsys):
    name = os.fsdecode(b'photos/more/bad\xff\nname.png')
    shutil.copy('photos/a.png', name)
    Path('photos/.ipynb_checkpoints').mkdir()
    shutil.copy('photos/a.png', 'photos/.ipynb_checkpoints/a.png')
    Path(os.fsdecode(b'photos/no\xff\nimage.png')).write_text('no image')
    results = {}
    for flag in ('--json', '--csv', '--picture=sheet.png'):
        with pytest.raises(SystemExit):  # for the file that is no image
            predict.main(['named.pth', 'photos', flag])
        results[flag] = capsys.readouterr()
        assert results[flag].err.count('\n') == 1 and r'photos/no\udcff\nimage.png (not an image)' in results[flag].err
    images = [answer['image'] for answer in json.loads(results['--json'].out)]
    assert len(images) == 6 and name in images
    assert r'photos/more/bad\udcff\nname.png' in results['--picture=sheet.png'].out
    assert len(list(csv.DictReader(io.StringIO(results['--csv'].out)))) == 6 * 5


def test_class_names(place, capsys):
    def names(*argv):
        return [answer['class'] for answer in as_json(capsys, *argv, 'photos/a.png', '--top', '99')[0]['predictions']]

    assert sorted(names('nameless.pth')) == [f'class {i}' for i in range(6)]
    letters = dict(zip(names('named.pth'), names('nameless.pth')))
    (place / 'names.txt').write_text('\ufeffzero\none\ntwo\nthree\nfour\nfive\n')
    (place / 'names.json').write_text(json.dumps({str(i): f'n{i}' for i in (3, 0, 1, 2, 5, 4)}))
    assert names('named.pth', '--class-names', 'names.txt')[0] == (
        'zero one two three four five'.split()[NAMES.index(names('named.pth')[0])])
    assert names('named.pth', '--class-names', 'names.json')[0] == 'n' + letters[names('named.pth')[0]][-1]

    convert_checkpoint.main(['named.pth', 'folder'])
    capsys.readouterr()
    logging.root.setLevel(logging.WARNING)  # as at the start of a process
    assert names('folder') == names('named.pth')

    imagenet = predict.class_names(None, None, 1000)
    assert imagenet[0].startswith('tench') and len(imagenet) == 1000
    assert predict.class_names(None, ['n01440764', 'n01443537'], 2) == [imagenet[0], imagenet[1]]
    assert predict.class_names(None, ['n01440764', 'mine'], 2) == ['n01440764', 'mine']


def test_the_ema_unless_model_weights_is_given(place, capsys):
    state = torch.load('named.pth', weights_only=True)
    state['model_ema'] = {key: value * 0 if key.startswith('head.') else value for key, value in state['model'].items()}
    torch.save(state, 'both.pth')
    answer = as_json(capsys, 'both.pth', 'photos/a.png')[0]['predictions'][0]
    assert answer['probability'] == pytest.approx(1 / 6)
    weights = as_json(capsys, 'both.pth', 'photos/a.png', '--model-weights')
    assert weights == as_json(capsys, 'named.pth', 'photos/a.png')


def test_standard_input(place, capsys, monkeypatch):
    def feed(content):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content)))
        return as_json(capsys, 'named.pth', '-', '--top', '1')

    by_path = feed(b'photos/a.png\n\nphotos/more/c.png\n')
    assert [r['image'] for r in by_path] == ['photos/a.png', 'photos/more/c.png']
    image, = feed((place / 'photos' / 'a.png').read_bytes())
    answer, same = image['predictions'][0], by_path[0]['predictions'][0]
    assert image['image'] == '-' and answer['class'] == same['class']
    assert answer['probability'] == pytest.approx(same['probability'], abs=1e-5)


def test_an_image_that_cannot_be_read(place, capsys):
    (place / 'photos' / 'bad.png').write_bytes((place / 'photos' / 'a.png').read_bytes()[:60])
    with pytest.raises(SystemExit) as stop:
        predict.main(['named.pth', 'photos', 'gone.png', '--csv', '--top', '1', '--picture', 'sheet.png'])
    said = capsys.readouterr()
    assert stop.value.code == 1 and len(said.out.splitlines()) == 1 + 5 and Image.open('sheet.png').size[0] > 400
    lines = said.err.splitlines()
    assert len(lines) == 2 and 'photos/bad.png' in lines[0] and 'gone.png' in lines[1]


@pytest.mark.parametrize('argv, reason', [
    (['gone.pth', 'photos'], 'gone.pth'),
    (['named.pth', 'empty'], 'no images in empty'),
    (['named.pth', 'photos', '--class-names', 'two.txt'], 'contains 2 names, the model has 6'),
    (['named.pth', 'photos', '--class-names', 'gone.txt'], 'gone.txt'),
    (['named.pth', 'photos', '--picture', 'a.gif'], '.png'),
    (['named.pth', 'photos', '--picture', 'gone/a.png'], "'gone/a.png' cannot be written"),
    (['named.pth', 'photos', '--input-size', '50'], 'multiples of 32'),
    (['named.pth', 'photos', '--top', '0'], 'at least 1'),
    (['named.pth', 'photos', '--random-weights'], 'unknown model'),
    (['resnet18', 'photos', '--random-weights'], 'resnet18 is no CMT'),
    (['named.pth', 'photos', '--class-names', 'photos/a.png'], '--class-names photos/a.png: '),
])
def test_mistakes(place, mistake, argv, reason):
    (place / 'empty').mkdir()
    (place / 'two.txt').write_text('one\ntwo\n')
    assert reason in mistake(predict, *argv)


@pytest.mark.parametrize('size, depth', [(32, 2), (64, 3), (128, 4)])
def test_grad_cam_is_its_definition(place, size, depth):
    """Compare with finite differences of the largest logit, in float64."""
    model = nano.warm(num_classes=6).double()
    model.set_input_size(size)
    images = torch.cat([expected('photos/a.png')[1], expected('photos/b.JPEG')[1]]).double()
    images = F.interpolate(images, size=(size, size), mode='bilinear')
    logits, cams = predict.grad_cam(model, images)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images))
        maps = model.stages[:depth](model.stem(images))
        assert maps.shape[2:] == (4, 4)
        for i in range(2):
            top = logits[i].argmax()
            gradient = torch.zeros_like(maps[i])
            for at in np.ndindex(*gradient.shape):
                moved = maps[i].clone()
                moved[at] += 1e-5
                moved = model.head_proj(model.stages[depth:](moved[None]))
                gradient[at] = (model.forward_head(moved)[0, top] - logits[i, top]) / 1e-5
            cam = (gradient.mean((1, 2))[:, None, None] * maps[i]).sum(0).clamp(min=0)
            cam = F.interpolate(cam[None, None], size=(size, size), mode='bilinear')[0, 0]
            torch.testing.assert_close(cams[i], cam / cam.max().clamp(min=1e-12), rtol=1e-3, atol=1e-3)
    assert cams.shape == (2, size, size) and cams.max() <= 1 and cams.min() >= 0


@pytest.mark.parametrize('count', [1, 2, 7])
def test_sheet_holds_each_image_with_its_heat(count):
    """Every image is drawn whole, and nothing beyond the sheet's margin."""
    side, cam = 96, np.repeat([1., 0.], 32)[:, None].repeat(64, 1)
    colors = [(20 * i, 255 - 20 * i, 120) for i in range(count)]
    predictions = [{'class': 'a name that is far too long ' * 4, 'probability': 1.}, {'class': 'b', 'probability': 0.}]
    entries = [{'name': 'long/' * 40, 'image': Image.new('RGB', (64, 64), color), 'cam': cam,
                'predictions': predictions} for color in colors]
    sheet = np.asarray(predict.draw_sheet(entries, 'title ' * 60, side))
    for color in colors:
        assert np.all(sheet == color, axis=-1).sum() >= side * side
    assert np.all(sheet[:, :18] == sheet[0, 0]) and np.all(sheet[:, -18:] == sheet[0, 0])
    assert np.all(sheet[-18:] == sheet[0, 0])
    hot = predict.overlay(Image.new('RGB', (8, 8), (128, 128, 128)), np.ones((8, 8)))
    cold = predict.overlay(Image.new('RGB', (8, 8), (128, 128, 128)), np.zeros((8, 8)))
    assert hot.getpixel((0, 0))[0] > hot.getpixel((0, 0))[2] and cold.getpixel((0, 0))[2] > cold.getpixel((0, 0))[0]


def test_picture_of_a_run(place, capsys):
    predict.main(['named.pth', 'photos', '--picture', 'sheet.png', '--top', '9'])
    plain = capsys.readouterr().out
    predict.main(['named.pth', 'photos', '--top', '9'])
    assert capsys.readouterr().out == plain
    sheet = np.asarray(Image.open('sheet.png'))
    seen = build_transform(False, 64)(Image.open('photos/a.png').convert('RGB'))
    seen = Image.fromarray(np.asarray(seen).transpose(1, 2, 0)).resize((224, 224), Image.Resampling.BICUBIC)
    assert np.array_equal(sheet[58 + 14:58 + 14 + 224, 20 + 14:20 + 14 + 224], np.asarray(seen))
