"""published.py and scripts/prepare_data.py on data sets as they are published; what train.py says of them."""
import csv
import io
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

import nano
import prepare_data
import published
from datasets import build_dataset
from errors import UsageError

LABELS = ['zebra, common', 'ant', 'mule']  # not alphabetical


def encoded(label, seed, kind='JPEG'):
    pixels = np.random.default_rng(seed).integers(0, 100, (40, 40, 3), dtype=np.uint8)
    pixels[..., label % 3] += 150
    Image.fromarray(pixels).save(out := io.BytesIO(), kind)
    return out.getvalue()


def write_parquet(file, rows, names=LABELS, column='image', label='label', group=7):
    """Write (bytes, path, label) rows as Hugging Face's datasets library does."""
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    file.parent.mkdir(parents=True, exist_ok=True)
    features = {column: {'_type': 'Image'}, label: {'_type': 'ClassLabel', 'names': names}}
    schema = pa.schema([(column, pa.struct([('bytes', pa.binary()), ('path', pa.string())])), (label, pa.int64())],
                       metadata={'huggingface': json.dumps({'info': {'features': features if names else {}}})})
    table = pa.Table.from_pylist(
        [{column: {'bytes': data, 'path': path}, label: target} for data, path, target in rows], schema)
    pq.write_table(table, file, row_group_size=group)


def hub(folder, paths=lambda i: f'n{i:04d}, a "b" ä.JPEG', **settings):
    """Two training shards of 20 rows, one of validation and one of test; return the rows of both splits."""
    rows = [(encoded(i * 7 % 3, i, 'PNG' if i % 5 == 0 else 'JPEG'), paths(i), i * 7 % 3) for i in range(55)]
    for i in range(2):
        write_parquet(folder / 'data' / f'train-0000{i}-of-00002.parquet', rows[20 * i:20 * i + 20], **settings)
    write_parquet(folder / 'data' / 'validation-00000-of-00001.parquet', rows[40:], **settings)
    write_parquet(folder / 'data' / 'test-00000-of-00001.parquet', [(b'', None, -1)], **settings)
    return rows[:40], rows[40:]


def prepare(src, dst, *flags):
    return prepare_data.cli([str(src), str(dst), '--short-side', '0', *map(str, flags)])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == '.tar'}


def samples(folder, split):
    dataset = build_dataset('IMNET', split == 'train', str(folder), 32)
    names = [Path(name).name for name, _ in dataset.samples]
    return dataset, [(dataset.read(i), name, dataset.targets[i]) for i, name in enumerate(names)]


def test_parquet_keeps_bytes_names_labels_and_order(tmp_path):
    splits = hub(tmp_path / 'hub')
    for workers in (0, 4):
        tars = tmp_path / f'tars{workers}'
        assert prepare(tmp_path / 'hub', tars, '--num-workers', workers, '--images-per-tar', 9) == 0
        assert content(tars) == content(tmp_path / 'tars0')
    for split, rows in zip(('train', 'val'), splits):
        dataset, read = samples(tmp_path / 'tars0', split)
        assert read == rows and dataset.classes == LABELS
    with tarfile.open(tmp_path / 'tars0' / 'train-000000.tar') as tar:
        assert len(tar.getnames()) == 2 * 9


def test_classes_keep_their_index_in_runs(tmp_path, capsys):
    """In training, evaluation and a resumed run, although they are not alphabetical."""
    hub(tmp_path / 'hub')
    prepare(tmp_path / 'hub', tmp_path / 'tars', '--num-workers', 0)
    run = ['--model', 'cmt_nano', '--input-size', 32, '--batch-size', 8, '--device', 'cpu', '--num-workers', 0,
           '--data-path', tmp_path / 'tars', '--test-freq', 1, '--output-dir', tmp_path / 'run', '--cooldown-epochs', 0]
    nano.train([*run, '--epochs', 1])
    nano.train([*run, '--epochs', 2, '--resume', 'auto'])
    assert nano.read(tmp_path / 'run')['classes'] == LABELS and nano.epochs(tmp_path / 'run') == [0, 1]
    capsys.readouterr()
    nano.train(['--eval', '--resume', tmp_path / 'run' / 'checkpoint_best.pth', '--device', 'cpu', '--num-workers', 0])
    assert f"Acc@1 {nano.read(tmp_path / 'run')['best']['acc1']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize('paths, settings', [
    (lambda i: None, {}), (lambda i: f'folder/{i}.jpg', {'column': 'img', 'label': 'fine_label'}),
    (lambda i: f'{i}.jpg', {'names': None})])
def test_paths_columns_and_names_of_other_hubs(paths, settings, tmp_path):
    splits = hub(tmp_path / 'hub', paths, **settings)
    assert prepare(tmp_path / 'hub', tmp_path / 'tars', '--num-workers', 2) == 0
    for split, rows in zip(('train', 'val'), splits):
        dataset, read = samples(tmp_path / 'tars', split)
        assert [(data, target) for data, _, target in read] == [(data, target) for data, _, target in rows]
        assert len({name for _, name, _ in read}) == len(rows)
        assert dataset.classes == (LABELS if settings.get('names', LABELS) else ['0', '1', '2'])


def test_imagenets_names_become_the_ids_of_the_released_weights(tmp_path):
    info = ImageNetInfo('imagenet-1k')
    file, rows = tmp_path / 'train-00000-of-00001.parquet', [(encoded(0, 0), 'a.JPEG', 7), (encoded(1, 1), 'b.JPEG', 0)]
    write_parquet(file, rows, names=info.label_descriptions())
    images = published.ParquetImages([file])
    assert images.classes == info.label_names() == sorted(info.label_names()) and images.targets == [7, 0]


def damage(file):
    file.write_bytes(file.read_bytes()[:-30])


@pytest.mark.parametrize('fault, word', [
    (damage, 'train-00001-of-00002'), (Path.unlink, '1 of the 2 files'),
    (lambda file: write_parquet(file, [(encoded(0, 0), 'a.jpg', -1)]), 'labels')])
def test_faults_of_parquet_are_one_line(fault, word, tmp_path, capsys):
    hub(tmp_path / 'hub')
    fault(tmp_path / 'hub' / 'data' / 'train-00001-of-00002.parquet')
    assert prepare(tmp_path / 'hub', tmp_path / 'tars', '--num-workers', 0) == 2
    printed = capsys.readouterr().err
    line, = re.findall('^prepare_data.py: error: .*', printed, re.M)
    assert word in line and 'Traceback' not in printed and not (tmp_path / 'tars').exists()


def test_a_missing_pyarrow_is_named(tmp_path, capsys, monkeypatch):
    hub(tmp_path / 'hub')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    assert prepare(tmp_path / 'hub', tmp_path / 'tars') == 2
    assert 'pip install pyarrow' in capsys.readouterr().err


def test_prepared_labels_go_by_name(tmp_path):
    """Under the classes of a checkpoint or class map in another order, and if the tars are prepared once more."""
    hub(tmp_path / 'hub')
    prepare(tmp_path / 'hub', tmp_path / 'tars', '--num-workers', 0)
    prepare(tmp_path / 'tars', tmp_path / 'again', '--num-workers', 0)
    (tmp_path / 'map').write_text('\n'.join(sorted(LABELS)))
    for folder in 'tars', 'again':
        dataset, read = samples(tmp_path / folder, 'train')
        assert dataset.classes == LABELS
        for settings in ({'classes': sorted(LABELS)}, {'class_map': tmp_path / 'map'}):
            other = build_dataset('IMNET', True, str(tmp_path / folder), 32, **settings)
            assert other.classes == sorted(LABELS)
            assert [other.classes[i] for i in other.targets] == [LABELS[target] for _, _, target in read]
    with pytest.raises(UsageError, match='zebra'):
        build_dataset('IMNET', True, str(tmp_path / 'tars'), 32, classes=['ant', 'mule'])


@pytest.mark.parametrize('name', ['plain_text/{}-00000-of-00001.parquet', 'default/{}/0000.parquet'])
def test_layouts_of_the_hub(name, tmp_path):
    rows = [(encoded(i % 3, i), f'{i}', i % 3) for i in range(6)]
    for split in ('train', 'test'):
        write_parquet(tmp_path / 'hub' / name.format(split), rows)
    assert prepare(tmp_path / 'hub', tmp_path / 'tars', '--num-workers', 0) == 0
    for split in 'train', 'val':
        _, read = samples(tmp_path / 'tars', split)
        assert [row[::2] for row in read] == [row[::2] for row in rows]


# validation images in one folder

def imagenet(root, ids, flat):
    """Training folders, and flat validation images named by `flat`; return the class of each validation image."""
    truth = {}
    for label, name in enumerate(ids):
        (root / 'train' / name / 'images').mkdir(parents=True)
        for i in range(3):
            (root / 'train' / name / 'images' / f'{name}_{i}.JPEG').write_bytes(encoded(label, i))
    for i in range(7):
        file = root / flat.format(i + 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i * 5 % len(ids), 50 + i))
        truth[file.name] = ids[i * 5 % len(ids)]
    return truth


IDS = ['n01443537', 'n01629819', 'n02124075']


def kaggle(root):
    folder = root / 'ILSVRC' / 'Data' / 'CLS-LOC'
    truth = imagenet(folder, IDS, 'val/ILSVRC2012_val_{:08d}.JPEG')
    (folder / 'test').mkdir()
    (folder / 'test' / 'ILSVRC2012_test_00000001.JPEG').write_bytes(encoded(0, 0))
    with open(root / 'LOC_val_solution.csv', 'w', newline='') as file:
        csv.writer(file).writerows([('ImageId', 'PredictionString'), *(
            (name.removesuffix('.JPEG'), f'{label} 85 1 499 272 {label} 131 0 499 254 ')
            for name, label in truth.items())])
    return truth, [root, root / 'ILSVRC', folder]


def tiny(root):
    truth = imagenet(root, IDS, 'val/images/val_{}.JPEG')
    (root / 'val' / 'val_annotations.txt').write_text(''.join(
        f'{name}\t{label}\t0\t32\t44\t62\n' for name, label in truth.items()))
    (root / 'wnids.txt').write_text('\n'.join(IDS))
    for name in IDS:
        (root / 'train' / name / f'{name}_boxes.txt').write_text('x\t1\t2\t3\t4\n')
    return truth, [root]


@pytest.mark.parametrize('layout', [kaggle, tiny])
def test_flat_validation_images_get_their_classes(layout, tmp_path, capsys):
    truth, sources = layout(tmp_path / 'data')
    for i, source in enumerate(sources):
        with pytest.raises(UsageError, match=f'prepare_data.py {source} '):
            build_dataset('IMNET', True, str(source), 32)
        assert prepare(source, tmp_path / f'tars{i}', '--num-workers', 0) == 0
        dataset, read = samples(tmp_path / f'tars{i}', 'val')
        assert dataset.classes == IDS and {name: IDS[target] for _, name, target in read} == truth
        assert len(samples(tmp_path / f'tars{i}', 'train')[1]) == 9
    if layout is kaggle:
        (tmp_path / 'data' / 'LOC_val_solution.csv').unlink()
        assert prepare(sources[0], tmp_path / 'other') == 2
        assert 'LOC_val_solution.csv' in capsys.readouterr().err


# what train.py says

def test_train_names_the_command_or_the_archive(tmp_path):
    hub(tmp_path / 'hub')
    with zipfile.ZipFile(tmp_path / 'train.zip', 'w') as archive:
        archive.writestr('a.txt', 'a')
    for path, words in ((tmp_path / 'hub', f'prepare_data.py {tmp_path / "hub"} {tmp_path / "hub"}-tars'),
                        (tmp_path / 'train.zip', 'train.zip is a zip archive: unzip')):
        with pytest.raises(UsageError, match=words):
            build_dataset('IMNET', True, str(path), 32)
