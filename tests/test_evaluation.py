"""--eval: what a file knows, the order of classes, subsets, ReaL labels, and held-out images."""
import json
import pkgutil
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import convert_checkpoint
import nano
from errors import UsageError
from transforms import build_transform
from weights import load_model

IDS = ImageNetInfo('imagenet-1k').label_names()


def write_images(root, names, per_class=3, size=72):
    """Write noise of another mean color for each class."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        color = rng.integers(0, 200, 3)
        for i in range(per_class):
            pixels = np.clip(color + rng.integers(0, 56, (size, size + 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f'{i}.png')
    return root


def logits(model, file):
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    pixels = build_transform(False, model.img_size[0])(Image.open(file).convert('RGB'))
    with torch.no_grad():
        return model(((pixels / 255 - mean) / std)[None])[0]


def nameless(path, num_classes):
    """Save weights without class names, whose predictions differ, and return the model."""
    model = nano.warm(num_classes=num_classes)
    torch.save({'model': model.state_dict()}, path)
    return model


def evaluate(capsys, *flags):
    """Return the accuracy (%) and the lines of --eval."""
    capsys.readouterr()
    nano.train(['--eval', '--device', 'cpu', '--num-workers', 0, '--batch-size', 8, '--model', 'cmt_nano', *flags])
    out = capsys.readouterr().out
    return float(re.search(r'Acc@1 ([\d.]+)', out)[1]), out


def by_hand(model, root, index_of, valid=None):
    hits = []
    for folder in root.iterdir():
        for file in folder.iterdir():
            values = logits(model, file)
            if valid is not None:
                values[[i for i in range(len(values)) if i not in valid]] = -torch.inf
            hits.append(values.argmax().item() == index_of(folder.name))
    return 100 * np.mean(hits)


def relabel(model, root, names_of):
    """Move a third of the images to the folder that the model predicts, so that its accuracy is not zero."""
    for file in sorted(root.rglob('*.png'))[::3]:
        folder = root / names_of(logits(model, file).argmax().item())
        folder.mkdir(exist_ok=True)
        file.rename(folder / f'{file.parent.name}_{file.name}')


def test_numbered_folders_are_indices(tmp_path, capsys):
    """As text, 10 and 11 come before 2."""
    model = nameless(tmp_path / 'w.pth', 12)
    root = write_images(tmp_path / 'data', map(str, range(12)))
    relabel(model, root, str)
    expected = by_hand(model, root, int)
    assert expected > 100 / 6
    score, out = evaluate(capsys, '--resume', tmp_path / 'w.pth', '--data-path', root)
    assert score == pytest.approx(expected, abs=1e-3) and 'folder names' in out
    shutil.rmtree(root / '3')  # A subset keeps the indices.
    (tmp_path / 'split').mkdir()
    root.rename(tmp_path / 'split' / 'val')
    expected = by_hand(model, tmp_path / 'split' / 'val', int)
    assert evaluate(capsys, '--resume', tmp_path / 'w.pth', '--data-path', tmp_path / 'split')[0] == pytest.approx(
        expected, abs=1e-3)


def test_a_subset_of_wordnet_ids_is_scored_among_itself(tmp_path, capsys):
    model = nameless(tmp_path / 'w.pth', 1000)
    chosen = IDS[3::100]
    root = write_images(tmp_path / 'imagenet-a', chosen)
    indices = {IDS.index(name) for name in chosen}
    relabel(model, root, lambda index: chosen[index % 10])
    masked = by_hand(model, root, IDS.index, indices)
    score, out = evaluate(capsys, '--resume', tmp_path / 'w.pth', '--data-path', root)
    assert score == pytest.approx(masked, abs=1e-3) and masked > 0 and '10 of 1000' in out
    among_all = by_hand(model, root, IDS.index)
    score, out = evaluate(capsys, '--resume', tmp_path / 'w.pth', '--data-path', root, '--valid-labels', 'all')
    assert score == pytest.approx(among_all, abs=1e-3)
    odd = set(range(1, 1000, 2))  # the ten and others
    (tmp_path / 'odd.txt').write_text('\n'.join(map(str, odd)))
    score, _ = evaluate(
        capsys, '--resume', tmp_path / 'w.pth', '--data-path', root, '--valid-labels', tmp_path / 'odd.txt')
    assert score == pytest.approx(by_hand(model, root, IDS.index, odd), abs=1e-3)


REAL = json.loads(pkgutil.get_data('timm.data', '_info/imagenet_real_labels.json'))


def write_validation_images(model, root):
    """Write images under numbers whose ReaL labels contain the prediction, do not, or are missing; return the hits."""
    hits, numbers = [], set()
    for i, file in enumerate(sorted(write_images(root, IDS[:4], per_class=3).rglob('*.png'))):
        top = logits(model, file).argmax().item()
        kinds = ([len(labels) > 1 and top in labels, labels and top not in labels, not labels] for labels in REAL)
        number = next(n for n, kind in enumerate(kinds, 1) if kind[i % 3] and n not in numbers)
        numbers.add(number)
        hits += [i % 3 == 0] * (i % 3 < 2)
        file.rename(file.with_name(f'ILSVRC2012_val_{number:08d}.JPEG'))
    return hits


def test_real_labels_may_name_several_classes(tmp_path, capsys):
    """On one rank and on two."""
    model = nameless(tmp_path / 'w.pth', 1000)
    hits = write_validation_images(model, tmp_path / 'data' / 'val')
    flags = ['--resume', tmp_path / 'w.pth', '--data-path', tmp_path / 'data', '--real-labels']
    _, out = evaluate(capsys, *flags)
    assert f'ReaL Acc@1 {100 * np.mean(hits):.3f}' in out and f'the {len(hits)} images' in out
    nano.finish(nano.start(['--eval', '--device', 'cpu', '--num-workers', 0, '--batch-size', 8, '--model', 'cmt_nano',
                            *flags], ranks=2, output=tmp_path / 'out.txt'))
    assert [line for line in out.splitlines() if 'Acc' in line] == [
        line for line in (tmp_path / 'out.txt').read_text().splitlines() if 'Acc' in line]


@pytest.mark.parametrize('names, num_classes, more, words', [
    (['a', 'b', 'c'], 12, [], '--class-map'),
    (['1', '2', '12'], 12, [], '--class-map'),
    (['1', '01', '2'], 3, [], None),  # as text
    (IDS[:3], 1000, ['--valid-labels', 'bad.txt'], 'bad.txt'),
    (IDS[:3], 1000, ['--valid-labels', 'few.txt'], 'few.txt'),
    (IDS[:3], 1000, ['--real-labels'], 'ILSVRC2012_val'),
    (IDS[:3], 1000, ['--real-labels', 'few.txt'], 'few.txt'),
])
def test_what_cannot_be_scored_is_one_line(names, num_classes, more, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nameless(tmp_path / 'w.pth', num_classes)
    write_images(tmp_path / 'data', names, per_class=1)
    (tmp_path / 'bad.txt').write_text('3\n1000\n')
    (tmp_path / 'few.txt').write_text('0\n1\n')
    flags = ['--resume', tmp_path / 'w.pth', '--data-path', tmp_path / 'data', *more]
    if words is None:
        assert 'alphabetical' in evaluate(capsys, *flags)[1]
        return
    with pytest.raises((UsageError, SystemExit)) as error:
        evaluate(capsys, *flags)
    assert words in str(error.value) + capsys.readouterr().err


def test_timm_refuses_a_file_of_another_size_or_classes(tmp_path):
    nameless(tmp_path / 'w.pth', 7)
    images = torch.randn(2, 3, 64, 64)
    expected = load_model(str(tmp_path / 'w.pth'))(images)

    def create(overlay, num_classes=7):
        return timm.create_model('cmt_nano', pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=dict(
            file=str(tmp_path / 'w.pth'), **overlay)).eval()

    for overlay in ({}, {'num_classes': 7}, {'input_size': (3, 64, 64)}):
        with pytest.raises(ValueError, match='input_size=|num_classes=7'):
            create(overlay)
    both = {'num_classes': 7, 'input_size': (3, 64, 64)}
    assert torch.equal(create(both)(images), expected)
    assert create(both, num_classes=5)(images).shape == (2, 5)  # a new head


def test_the_file_knows_size_and_crop(flags, tmp_path, capsys):
    nano.train([*flags, '--epochs', 1, '--crop-pct', 0.7, '--input-size', 64, '--no-model-ema',
                '--output-dir', tmp_path / 'run'])
    capsys.readouterr()
    last = tmp_path / 'run' / 'checkpoint_last.pth'
    nano.train(['--eval', '--resume', last, '--device', 'cpu'])
    score = nano.log(tmp_path / 'run')[-1]['test_loss']
    assert f'loss {score:.3f}' in capsys.readouterr().out
    model = load_model(str(last))
    config = timm.data.resolve_model_data_config(model)
    assert config['crop_pct'] == 0.7 and config['input_size'] == (3, 64, 64) and not model.training
    assert model.pretrained_cfg['label_names'] == ['class_0', 'class_1', 'class_2']
    state = {'model': model.state_dict(), 'args': {'eval_crop_ratio': 0.9}}  # as DeiT writes it
    torch.save(state, tmp_path / 'deit.pth')
    assert load_model(str(tmp_path / 'deit.pth')).pretrained_cfg['crop_pct'] == 0.9
    convert_checkpoint.main([str(last), str(tmp_path / 'folder')])
    assert json.loads((tmp_path / 'folder' / 'config.json').read_text())['pretrained_cfg']['crop_pct'] == 0.7


def test_a_run_scores_the_images_that_it_held_out(images, tmp_path, capsys):
    folder = tmp_path / 'photos'
    shutil.copytree(images / 'train', folder)
    nano.train([*nano.FLAGS, '--epochs', 1, '--data-path', folder, '--val-split', 0.2, '--no-model-ema',
                '--output-dir', tmp_path / 'run'])
    run = ['--eval', '--device', 'cpu', '--resume', tmp_path / 'run' / 'checkpoint_last.pth']
    counts = []
    for more in ([], ['--data-path', folder], ['--val-split', 0], ['--data-path', folder, '--val-split', 0]):
        capsys.readouterr()
        nano.train([*run, *more])
        out = capsys.readouterr().out
        counts.append(int(re.search(r'the (\d+) test images', out)[1]))
        assert ('held-out' in out) == (len(more) < 3 and '--val-split' not in more)
    assert counts == [20, 20, 100, 100]
