"""Fine-tuning: other sizes, other classes, frozen stages, and the sources of images."""
import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_cmt import cubic_matrix

import datasets
import nano
import train
import weights
from transforms import build_transform

PLAIN = ('--device cpu --num-workers 0 --batch-size 16 --cooldown-epochs 0 --warmup-epochs 0 --lr 0.1 --min-lr 1e-3 '
         '--mixup 0 --cutmix 0 --aa none --color-jitter 0 --reprob 0 --hflip 0 --no-repeated-aug --drop-path 0 '
         '--model-ema-decay 0.9').split()


def few_digits(root, per_class=20, classes=10):
    """Write a folder of the first scanned digits of each class for training, and all held-out digits."""
    for part in ('train', 'val'):
        digits, count = datasets.Digits(part == 'train', 32), {}
        for image, label in zip(digits.images, digits.targets):
            count[label] = number = count.get(label, 0) + 1
            if label < classes and (part == 'val' or number <= per_class):
                (root / part / str(label)).mkdir(parents=True, exist_ok=True)
                image.save(root / part / str(label) / f'{number:03d}.png')
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
    assert f'loaded {source}: weights (model)' in out and '4 position biases resampled from 64x64 to 96x96' in out
    nano.train([*argv, '--model', 'cmt_nano', '--output-dir', tmp_path / 'scratch'])
    tuned, scratch = (nano.log(tmp_path / name)[0] for name in ('tuned', 'scratch'))
    assert tuned['train_loss'] < scratch['train_loss'] - 0.03  # accuracies of one epoch are noise
    assert nano.read(tmp_path / 'tuned')['classes'] == list('0123456')


def test_the_bias_is_resampled_bicubic(digits):
    model = timm.create_model('cmt_nano', img_size=96, num_classes=7)
    weights.load_weights(model, weights.read_weights(str(digits / 'source' / 'checkpoint_last.pth')), new_head=True)
    source = nano.read(digits / 'source')['model']
    for i, (stage, k) in enumerate(zip(model.stages, (8, 4, 2, 1))):
        queries, keys = (cubic_matrix(64 // s, 96 // s) for s in (4 * 2 ** i, 4 * 2 ** i * k))
        expected = np.einsum('nhwij,ah,bw,ci,dj->nabcd', source[f'stages.{i}.position_bias'].numpy(),
                             queries, queries, keys, keys, optimize=True)
        assert np.abs(stage.position_bias.detach().numpy() - expected).max() < 1e-5
    assert torch.equal(model.state_dict()['stages.2.blocks.0.lmhsa.kv.weight'],
                       source['stages.2.blocks.0.lmhsa.kv.weight'])
    assert model.head.weight.shape == (7, 32) and model.head.weight.std() < 0.03


def test_a_fine_tuning_run_resumes(flags, whole, tmp_path):
    argv = [*flags, '--finetune', whole / 'checkpoint_last.pth', '--output-dir', tmp_path / 'run']
    nano.train([*argv, '--epochs', 1])
    nano.train([*argv, '--epochs', 2, '--resume', 'auto'])
    assert [line['epoch'] for line in nano.log(tmp_path / 'run')] == [0, 1]


@pytest.mark.parametrize('classes, known, is_new', [
    (['class_0', 'class_1', 'class_2'], ..., False), (['class_0', 'class_2', 'class_1'], ..., True),
    (['a', 'b', 'c'], ..., True), (['a', 'b', 'c'], None, False), (['a', 'b', 'c'], ['class_0', 'class_1'], False),
    (['a', 'b', 'c'], [0, 1, 2], False)])
def test_the_head_is_kept_unless_its_classes_are_known_to_be_others(whole, classes, known, is_new):
    checkpoint = nano.read(whole)
    if known is not ...:
        checkpoint['classes'] = known
    own = weights.Weights.of(checkpoint, 'run')
    model = timm.create_model('cmt_nano', img_size=32, num_classes=3)
    line = weights.load_weights(model, own.for_classes(classes), new_head=True)
    assert torch.equal(model.head.weight, checkpoint['model']['head.weight']) != is_new
    assert ('its classes are others, or in another order; newly initialised: head.weight, head.bias' in line) == is_new


def test_fine_tuning_on_other_classes_begins_with_a_new_head(flags, whole, images, tmp_path, capsys):
    for part in ('train', 'val'):
        for i, name in enumerate('abc'):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / name).symlink_to(images / part / f'class_{i}')
    for path, is_new in ((images, False), (tmp_path, True)):
        nano.train([*flags, '--data-path', path, '--finetune', whole / 'checkpoint_last.pth', '--epochs', 1])
        assert ('newly initialised: head.weight, head.bias' in capsys.readouterr().out) == is_new


@pytest.mark.parametrize('stages', [1, 3])
def test_frozen_stages_stay_as_they_are(flags, whole, tmp_path, monkeypatch, stages):
    steps = []
    once = train.train_one_epoch
    monkeypatch.setattr(train, 'train_one_epoch', lambda step, *a, **k: steps.append(step) or once(step, *a, **k))
    nano.train([*flags, '--finetune', whole / 'checkpoint_last.pth', '--freeze-stages', stages, '--epochs', 1,
                '--output-dir', tmp_path / 'run'])
    before, after = nano.read(whole), nano.read(tmp_path / 'run')
    frozen = ('stem.', *(f'stages.{i}.' for i in range(stages)))
    for name, value in after['model'].items():
        if name.startswith(frozen):  # the statistics of BatchNorm too
            assert torch.equal(value, before['model'][name]), name
        elif name.endswith(('lpu.dw.weight', 'irffn.expand.weight', 'running_mean', 'num_batches_tracked')):
            assert not torch.equal(value, before['model'][name]), name
    assert nano.log(tmp_path / 'run')[0]['n_parameters'] < nano.log(whole)[0]['n_parameters']
    model = steps[0].model
    next(iter(once(steps[0], [], 0, 0, 0, 1, None, None)), None)
    parts = [model.stem, *model.stages, model.head_proj]  # nothing in frozen ones is random
    assert not any(m.training for part in parts[:stages + 1] for m in part.modules())
    assert all(m.training for part in parts[stages + 1:] for m in part.modules())


# data

def test_a_folder_without_val(images, tmp_path):
    whole = datasets.ImageFolder(images / 'train')
    for path in (images / 'train', tmp_path):
        (tmp_path / 'train').is_symlink() or (tmp_path / 'train').symlink_to(images / 'train')
        train_set, val = (datasets.build_dataset('IMNET', part, path, 32, val_split=0.25) for part in (True, False))
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
    for part, count in (('train', 16), ('val', 4)):
        pictures(root / part, [f'{i}.jpg' for i in range(count)])
        (root / f'{part}{year}.json').write_text(json.dumps({
            'images': [{'id': 100 + i, 'file_name': f'{part}/{i}.jpg'} for i in range(count)],
            'annotations': [{'image_id': 100 + i, 'category_id': i % 4} for i in range(count)],
            'categories': categories}))


def test_inaturalist(tmp_path):
    write_inat(tmp_path)
    data = datasets.build_dataset('INAT19', False, tmp_path, 32)
    assert data.classes == [f'genus{i // 2} species{i}' for i in range(4)]
    assert [data[i][1] for i in range(4)] == [0, 1, 2, 3]
    data = datasets.build_dataset('INAT19', True, tmp_path, 32, category='genus')
    assert data.classes == ['genus0', 'genus1'] and data[3][0].getpixel((0, 0))[0] == 30 and data[3][1] == 1
    with pytest.raises(ValueError, match='have no kingdom'):
        datasets.build_dataset('INAT19', True, tmp_path, 32, category='kingdom')


def test_torch_readers(tmp_path):
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for part in ('train', 't10k'):  # idx files: magic number, sizes, bytes
        (raw / f'{part}-images-idx3-ubyte').write_bytes(b'\0\0\x08\x03' + b''.join(
            n.to_bytes(4, 'big') for n in (2, 28, 28)) + bytes(2 * 28 * 28))
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(b'\0\0\x08\x01' + (2).to_bytes(4, 'big') + bytes([7, 3]))
    data = datasets.build_dataset('torch/mnist', False, str(tmp_path), 32, build_transform(False, 32))
    image, label = pickle.loads(pickle.dumps(data))[0]
    assert image.shape == (3, 32, 32) and label == 7 and len(data.classes) == 10


@pytest.mark.parametrize('name, words', [
    ('CARS', 'CARS is not in'), ('INAT21', 'no .*train2021.json'), ('torch/nothing', 'torch/nothing is not in'),
    ('IMNET', 'no folder')])
def test_missing_data_is_named(tmp_path, name, words):
    with pytest.raises(ValueError, match=rf'^[^\n]*{words}[^\n]*$'):
        datasets.build_dataset(name, True, str(tmp_path), 32)
