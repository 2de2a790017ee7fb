"""Files in configs/: each parses and trains for two steps on a small data set of its kind."""
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import timm
import torch
import torchvision.datasets
import yaml

import detection
import nano
import optim
import options
from test_finetune import pictures, write_inat

CONFIGS = sorted(Path(__file__).parent.parent.glob('configs/*.yaml'))
DETECTORS = {path for path in CONFIGS if path.stem in ('retinanet', 'maskrcnn')}


@pytest.mark.parametrize('path', sorted(DETECTORS), ids=lambda path: path.stem)
def test_a_detectors_config_is_the_1x_schedule(path):
    header = path.read_text().split('model:')[0]
    assert f'--config configs/{path.name}' in header
    args = detection.parse_args(['--config', str(path), '--data-path', 'coco'])
    assert (args.model, args.backbone, args.weights, args.epochs, args.lr_steps, args.input_size, args.batch_size) == (
        path.stem, 'cmt_s', 'cmt_s', 12, [8, 11], [800, 1333], 2)


@pytest.mark.parametrize('path', sorted({*CONFIGS} - DETECTORS), ids=lambda path: path.stem)
def test_two_steps(path, images, tmp_path, monkeypatch):
    header = path.read_text().split('\n\n')[0]
    assert f'--config configs/{path.name}' in header
    config = yaml.safe_load(path.read_text())
    assert config.get('model', 'cmt_s').startswith('cmt_')
    kind = config.get('data-set', 'IMNET')
    count = 100 if kind == 'IMNET' else 1437 if kind == 'DIGITS' else 16
    argv = ['--config', path, '--model', 'cmt_nano', '--input-size', 32, '--batch-size', count // 2 & ~1,
            '--device', 'cpu', '--num-workers', 0, '--epochs', 1, '--warmup-epochs', 0, '--cooldown-epochs', 0,
            '--output-dir', tmp_path / 'run']
    if kind != 'DIGITS':
        argv += ['--data-path', images if kind == 'IMNET' else tmp_path / 'data']
    if kind in WRITERS:
        WRITERS[kind](tmp_path / 'data')
    if 'finetune' in config:
        assert config['finetune'] == 'cmt_s'
        torch.save(timm.create_model('cmt_nano').state_dict(), tmp_path / 'source.pth')
        argv += ['--finetune', tmp_path / 'source.pth']
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *_: True)
    monkeypatch.setattr(torchvision.datasets.flowers102, 'check_integrity', lambda *_: True)
    nano.train(argv)
    assert nano.updates(tmp_path / 'run') == 2 and nano.epochs(tmp_path / 'run') == [0]


def test_mindcvs_schedule():
    args = options.parse_args(['--config', str(next(p for p in CONFIGS if p.stem == 'cmt_s_mindcv'))])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr * 8 * args.batch_size / 512)
    scheduler, epochs = optim.build_scheduler(args, optimizer, 1)
    rates = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    assert epochs == 300 and rates.index(max(rates)) == 5 and max(rates) == pytest.approx(0.002)
    decay = [1e-5 + (0.002 - 1e-5) * (1 + np.cos(np.pi * t / 295)) / 2 for t in range(295)]
    assert rates[5:] == pytest.approx(decay, rel=1e-6)


def write_cifar(root, folder, label, files, meta, classes):
    (root / folder).mkdir(parents=True)
    for name, count in files.items():
        entry = {'data': np.zeros((count, 3072), np.uint8), label: [i % 4 for i in range(count)]}
        (root / folder / name).write_bytes(pickle.dumps(entry))
    (root / folder / meta).write_bytes(pickle.dumps({f'{label[:-1]}_names': [str(i) for i in range(classes)]}))


def write_cars(root):
    root = root / 'stanford_cars'
    (root / 'devkit').mkdir(parents=True)
    scipy.io.savemat(root / 'devkit' / 'cars_meta.mat', {'class_names': np.array(['a', 'b'], object)})
    for split, path, count in (
            ('train', 'devkit/cars_train_annos.mat', 16), ('test', 'cars_test_annos_withlabels.mat', 4)):
        names = [f'{i}.jpg' for i in range(count)]
        pictures(root / f'cars_{split}', names)
        annotations = np.zeros(count, [('class', 'i4'), ('fname', 'O')])
        annotations['class'], annotations['fname'] = [1 + i % 2 for i in range(count)], names
        scipy.io.savemat(root / path, {'annotations': annotations})


def write_flowers(root):
    root = root / 'flowers-102'
    pictures(root / 'jpg', [f'image_{i:05d}.jpg' for i in range(1, 21)])
    ids = np.arange(1, 21)
    scipy.io.savemat(root / 'setid.mat', {'trnid': ids[:8], 'valid': ids[8:16], 'tstid': ids[16:]})
    scipy.io.savemat(root / 'imagelabels.mat', {'labels': 1 + ids % 4})


def write_pets(root):
    root = root / 'oxford-iiit-pet'
    pictures(root / 'images', [f'{"AB"[i % 2]}_{i}.jpg' for i in range(20)])
    (root / 'annotations').mkdir()
    for split, ids in (('trainval', range(16)), ('test', range(16, 20))):
        (root / 'annotations' / f'{split}.txt').write_text(''.join(f'{"AB"[i % 2]}_{i} {1 + i % 2} 1 1\n' for i in ids))


WRITERS = {
    'CARS': write_cars, 'FLOWERS102': write_flowers, 'PETS': write_pets, 'INAT18': partial(write_inat, year=2018),
    'CIFAR10': partial(
        write_cifar, folder='cifar-10-batches-py', label='labels', meta='batches.meta', classes=10,
        files={**{f'data_batch_{i}': 4 if i == 1 else 3 for i in range(1, 6)}, 'test_batch': 4}),
    'CIFAR100': partial(
        write_cifar, folder='cifar-100-python', label='fine_labels', meta='meta', classes=100,
        files={'train': 16, 'test': 4})}
