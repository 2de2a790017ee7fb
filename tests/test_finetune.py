"""Fine-tuning: other sizes, other classes, frozen stages, and the sources of images."""
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

import cmt
import datasets
import nano
import weights
from transforms import build_transform

PLAIN = ('--device cpu --num-workers 0 --batch-size 16 --cooldown-epochs 0 --warmup-epochs 0 --lr 0.1 --min-lr 1e-3 '
         '--mixup 0 --cutmix 0 --aa none --color-jitter 0 --reprob 0 --hflip 0 --no-repeated-aug --drop-path 0 '
         '--no-model-ema').split()


def few_digits(root, per_class=20, classes=10):
    """Write a folder of the first scanned digits of each class for training, and all held-out digits."""
    for split in ('train', 'val'):
        digits, counts = datasets.Digits(split == 'train', 32), Counter()
        for image, label in zip(digits.images, digits.targets):
            counts[label] += 1
            if label < classes and (split == 'val' or counts[label] <= per_class):
                (root / split / str(label)).mkdir(parents=True, exist_ok=True)
                image.save(root / split / str(label) / f'{counts[label]:03d}.png')
    return root


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Train a model on DIGITS at 64 px for an epoch, and write a folder with seven of the ten classes."""
    root = tmp_path_factory.mktemp('digits')
    nano.train([*PLAIN, '--batch-size', 8, '--model', 'cmt_nano', '--data-set', 'DIGITS', '--input-size', 64,
                '--epochs', 1, '--output-dir', root / 'source'])
    few_digits(root / 'images', per_class=36, classes=7)
    return root


def test_64_to_96_px_and_10_to_7_classes(digits, tmp_path, capsys):
    argv = [*PLAIN, '--data-path', digits / 'images', '--input-size', 96, '--epochs', 1]
    source = digits / 'source' / 'checkpoint_last.pth'
    nano.train([*argv, '--finetune', source, '--output-dir', tmp_path / 'tuned'])
    out = capsys.readouterr().out
    assert str(source) in out and '64x64' in out and '96x96' in out
    nano.train([*argv, '--model', 'cmt_nano', '--output-dir', tmp_path / 'scratch'])
    tuned, scratch = (nano.log(tmp_path / name)[0] for name in ('tuned', 'scratch'))
    assert tuned['train_loss'] < scratch['train_loss'] - 0.03  # The accuracy after one epoch is noise.
    assert nano.read(tmp_path / 'tuned')['classes'] == list('0123456')


@pytest.mark.parametrize('classes, known, is_new', [
    (['class_0', 'class_1', 'class_2'], ..., False), (['class_0', 'class_2', 'class_1'], ..., True),
    (['a', 'b', 'c'], None, False), (['a', 'b', 'c'], ['class_0', 'class_1'], False),
    (['a', 'b', 'c'], [0, 1, 2], False)])
def test_the_head_stays_unless_the_classes_are_known_to_differ(whole, classes, known, is_new):
    checkpoint = nano.read(whole)
    if known is not ...:
        checkpoint['classes'] = known
    saved = weights.Weights.from_checkpoint(checkpoint, 'run')
    model = timm.create_model('cmt_nano', img_size=32, num_classes=3)
    line = weights.load_weights(model, saved.drop_other_head(classes), new_head=True)
    assert torch.equal(model.head.weight, checkpoint['model']['head.weight']) != is_new
    assert ('head.weight' in line) == is_new


def test_frozen_stages_do_not_change(flags, whole, tmp_path):
    modes = {}  # of each module when it was first called, which is in training
    handle = register_module_forward_pre_hook(
        lambda module, _: modes.update({module: modes.get(module, module.training)}))
    nano.train([*flags, '--finetune', whole / 'checkpoint_last.pth', '--freeze-stages', 3, '--epochs', 1,
                '--output-dir', tmp_path / 'run'])
    handle.remove()
    before, after = nano.read(whole), nano.read(tmp_path / 'run')
    frozen = ('stem.', *(f'stages.{i}.' for i in range(3)))
    for name, value in after['model'].items():
        if name.startswith(frozen):  # statistics of BatchNorm included
            assert torch.equal(value, before['model'][name]), name
        elif name.endswith(('lpu.dw.weight', 'irffn.expand.weight', 'running_mean', 'num_batches_tracked')):
            assert not torch.equal(value, before['model'][name]), name
    assert nano.log(tmp_path / 'run')[0]['n_parameters'] < nano.log(whole)[0]['n_parameters']
    model = next(module for module in modes if isinstance(module, cmt.CMT))
    for i, module in enumerate([model.stem, *model.stages, model.head_proj]):
        assert {modes[m] for m in module.modules() if m in modes} == {i > 3}


# data

def test_a_folder_without_val(images, tmp_path):
    whole = datasets.ImageFolder(images / 'train')
    for path in (images / 'train', tmp_path):
        (tmp_path / 'train').is_symlink() or (tmp_path / 'train').symlink_to(images / 'train')
        train_set, val = (datasets.build_dataset('IMNET', is_train, path, 32, val_split=0.25)
                          for is_train in (True, False))
        assert np.bincount(val.targets).tolist() == [10, 6, 9]
        assert np.bincount(train_set.targets).tolist() == [30, 18, 27]
        names = [{path.rsplit('/', 1)[-1] + str(label) for path, label in s.samples} for s in (train_set, val, whole)]
        assert not names[0] & names[1] and names[0] | names[1] == names[2]


def test_class_map(images, tmp_path):
    (tmp_path / 'map.txt').write_text('class_2\nclass_0\nclass_1\nabsent\n')
    data = datasets.build_dataset('IMNET', True, images, 32, class_map=tmp_path / 'map.txt')
    assert data.classes == ['class_2', 'class_0', 'class_1', 'absent']
    assert np.bincount(data.targets).tolist() == [36, 40, 24]


def pictures(folder, names):
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        Image.fromarray(np.full((40, 40, 3), 10 * i, np.uint8)).save(folder / name)


def write_inat(root, year=2019):
    """Write an iNaturalist of 16 training and 4 validation images of four species in two genera."""
    categories = [{'id': i, 'name': f'genus{i // 2} species{i}', 'genus': f'genus{i // 2}'} for i in range(4)]
    for split, count in (('train', 16), ('val', 4)):
        pictures(root / split, [f'{i}.jpg' for i in range(count)])
        (root / f'{split}{year}.json').write_text(json.dumps({
            'images': [{'id': 100 + i, 'file_name': f'{split}/{i}.jpg'} for i in range(count)],
            'annotations': [{'image_id': 100 + i, 'category_id': i % 4} for i in range(count)],
            'categories': categories}))


def test_inaturalist(tmp_path):
    write_inat(tmp_path)
    data = datasets.build_dataset('INAT19', False, tmp_path, 32)
    assert data.classes == [f'genus{i // 2} species{i}' for i in range(4)]
    assert [data[i][1] for i in range(4)] == [0, 1, 2, 3]
    data = datasets.build_dataset('INAT19', True, tmp_path, 32, category='genus')
    assert data.classes == ['genus0', 'genus1'] and data[3][0].getpixel((0, 0))[0] == 30 and data[3][1] == 1
    with pytest.raises(ValueError, match='kingdom'):
        datasets.build_dataset('INAT19', True, tmp_path, 32, category='kingdom')


def test_torch_readers(tmp_path):
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for split in ('train', 't10k'):  # idx files: magic number, sizes, bytes
        (raw / f'{split}-images-idx3-ubyte').write_bytes(b'\0\0\x08\x03' + b''.join(
            n.to_bytes(4, 'big') for n in (2, 28, 28)) + bytes(2 * 28 * 28))
        (raw / f'{split}-labels-idx1-ubyte').write_bytes(b'\0\0\x08\x01' + (2).to_bytes(4, 'big') + bytes([7, 3]))
    data = datasets.build_dataset('torch/mnist', False, str(tmp_path), 32, build_transform(False, 32))
    image, label = pickle.loads(pickle.dumps(data))[0]
    assert image.shape == (3, 32, 32) and label == 7 and len(data.classes) == 10


@pytest.mark.parametrize('name, missing', [
    ('CARS', 'CARS'), ('INAT21', 'train2021.json'), ('torch/nothing', 'torch/nothing')])
def test_missing_data_is_named(tmp_path, name, missing):
    with pytest.raises(ValueError, match=missing):
        datasets.build_dataset(name, True, str(tmp_path), 32)
