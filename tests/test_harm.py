"""Files that mean harm, or are damaged: each gives the right data or one line, in bounded memory."""
import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

import datasets
import detection
import errors
import evaluation
import nano
import options
import predict
import prepare_data
import published
import reports
import run
import sources
import weights
from fast_transforms import FastTransform
from sources import ImageFolder, TarImages, open_image
from test_detection import write_coco
from test_published import write_parquet
from transforms import build_transform

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n%%EOF\n'
LIMIT = 64_000_000


# Images

@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A stand-in for Ghostscript; return the file that it writes when it is started."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n')
    (tmp_path / 'bin' / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', None)  # Pillow caches the search.
    return tmp_path / 'started'


def test_postscript_is_never_run_whatever_its_name(flags, images, whole, tmp_path, ghostscript, capsys):
    with contextlib.suppress(Exception):
        Image.open(io.BytesIO(EPS)).load()
    assert ghostscript.exists(), 'Pillow starts it'
    ghostscript.unlink()
    for name in ('a.jpg', 'b.png', 'c.webp'):
        for split in ('train', 'val'):
            for label in ('x', 'y'):
                folder = tmp_path / 'data' / split / label
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(EPS)
    (tmp_path / 'data' / 'train' / 'x' / 'good.png').write_bytes(next(images.glob('train/*/*.png')).read_bytes())
    for read in (open_image, FastTransform.open_image):
        with pytest.raises(Exception, match='cannot identify'):
            read(EPS)
    with pytest.raises((errors.UnreadableImage, RuntimeError)):
        nano.train([*flags, '--data-path', tmp_path / 'data', '--num-workers', 0])
    with pytest.raises(SystemExit):
        predict.main([str(whole / 'checkpoint_best.pth'), str(tmp_path / 'data' / 'val')])
    assert capsys.readouterr().err.count('cannot read') == 6
    assert prepare_data.cli([str(tmp_path / 'data'), str(tmp_path / 'tars'), '--num-workers', '0']) == 2
    coco = write_coco(tmp_path / 'coco')
    (coco / 'val2017' / '0.png').write_bytes(EPS)
    data = detection.CocoDataset(str(coco / 'val2017'), str(coco / 'annotations' / 'instances_val2017.json'), False,
                                 masks=False)
    with pytest.raises(Exception, match='cannot identify'):
        data[0]
    assert len(data[1]) == 2 and not ghostscript.exists()


def encoded(size, kind, mode='RGB', **options):
    Image.new(mode, size).save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def rescanned(data, times):
    """Return a progressive JPEG with its last scan repeated."""
    start = data.rindex(b'\xff\xda')
    return data[:start] + data[start:-2] * times + data[-2:]


READERS = open_image, FastTransform.open_image


@pytest.mark.parametrize('kind, mode', [('PNG', '1'), ('PNG', 'L'), ('WEBP', 'RGB'), ('JPEG', 'L'), ('GIF', 'L'),
                                        ('TIFF', '1'), ('BMP', '1'), ('PPM', '1')])
def test_small_files_of_many_pixels_are_not_decoded(kind, mode):
    size = (16000, 4100)
    data = encoded(size, kind, mode, **({'compression': 'group4'} if kind == 'TIFF' else {}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in READERS:
        with pytest.raises(Image.DecompressionBombError, match='--max-image-pixels'):
            read(data, max_pixels=LIMIT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB
    image = FastTransform.open_image(data, max_pixels=2 * LIMIT) if kind == 'JPEG' else \
        sources.open_header(data, 2 * LIMIT)
    assert image.size == size


def test_progressive_jpegs_of_many_scans_are_not_decoded():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).resize((2000, 1500))
    photo.save(out := io.BytesIO(), 'JPEG', progressive=True)
    data = out.getvalue()
    photo.save(out := io.BytesIO(), 'JPEG', exif=(exif := Image.Exif()))
    exif[0x10e] = 'x' * 1000
    baseline = out.getvalue() + np.random.default_rng(0).bytes(3_000_000)  # as phones append a film
    film = data + np.random.default_rng(1).bytes(20_000_000)
    assert sources.jpeg_scans(film) == sources.jpeg_scans(data) == 10 and sources.jpeg_scans(baseline) == 0
    for read in READERS:
        for photograph in data, baseline, film:
            assert read(photograph, max_pixels=LIMIT).size == (2000, 1500)
        for bomb in (rescanned(data, 400), data[:2] + b'\xff\xfe\x00\x04ab\xff' + rescanned(data, 400)[2:]):
            with pytest.raises(Image.DecompressionBombError, match='scans'):
                read(bomb, max_pixels=LIMIT)


@pytest.mark.parametrize('loader', ['fast', 'reference'])
def test_the_limit_of_pixels_is_a_flag_of_every_run(flags, tmp_path, capsys, loader):
    for label in ('x', 'y'):
        (tmp_path / 'train' / label).mkdir(parents=True)
        for name, size in (('small', 10), ('large', 30)):
            Image.new('RGB', (size, size)).save(tmp_path / 'train' / label / f'{name}.jpg')
    (tmp_path / 'val').symlink_to(tmp_path / 'train')
    run = [*flags, '--data-path', tmp_path, '--epochs', 1, '--batch-size', 2, '--accum-steps', 1, '--loader', loader]
    nano.train(run)
    assert 'large' not in capsys.readouterr().out
    for skip in ([], ['--skip-damaged']):
        with pytest.raises(errors.UnreadableImage) if not skip else contextlib.nullcontext():  # of the validation
            nano.train([*run, '--max-image-pixels', 400, '--repeated-aug', *skip])
        out = capsys.readouterr().out
        assert 'large.jpg' in out and '30 x 30' in out and 'small.jpg' not in out


# A user's own files

def test_predictions_come_before_what_cannot_be_written(whole, images, tmp_path):
    """On a full disk, and under names as long as the file system allows."""
    command = [sys.executable, 'scripts/predict.py', str(whole / 'checkpoint_best.pth'), str(images / 'val')]

    def predict_to(name, limit):
        return subprocess.run(
            [*command, '--picture', str(tmp_path / name)], capture_output=True, text=True, timeout=100,
            cwd=Path(__file__).parents[1], preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))

    long = 'x' * 248 + '.png'
    whole_disk, full = predict_to(long, resource.RLIM_INFINITY), predict_to('sheet.png', 10_000)
    assert whole_disk.returncode == 0 and whole_disk.stdout.count('class_') >= 27, whole_disk.stderr
    assert Image.open(tmp_path / long).width > 100
    assert full.returncode == 1 and full.stdout == whole_disk.stdout
    assert full.stderr.splitlines()[-1].startswith('predict.py: error: ') and 'Traceback' not in full.stderr
    assert os.listdir(tmp_path) == [long]
    too_long = predict_to('x' * 300 + '.png', 10 ** 9)
    assert too_long.returncode == 2 and too_long.stderr.count('\n') == 1 and not too_long.stdout


# Text

ALIASES = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{chr(98 + i)}: &{chr(98 + i)} [{", ".join([f"*{chr(97 + i)}"] * 9)}]\n' for i in range(9))
MERGES = 'a: &a {lr: 1}\n' + ''.join(
    f'{chr(98 + i)}: &{chr(98 + i)}\n  <<: [{", ".join([f"*{chr(97 + i)}"] * 9)}]\n' for i in range(9))
BOMBS = {'brackets': 'lr: ' + '[' * 20_000, 'braces': '{' * 20_000, 'aliases': ALIASES, 'merges': MERGES,
         'large': '# ' + 'x' * 200_000 + '\nlr: 1\n', 'nested': 'lr: ' + '[1, ' * 300 + ']' * 300,
         'binary': 'lr: \x00\x01', 'tag': 'lr: !!python/object/apply:os.system [id]', 'date': 'lr: 2001-99-99',
         'hexadecimal': f'epochs: 0x{"f" * 60_000}', 'sexagesimal': f'epochs: 1:{"59:" * 20_000}1'}


@pytest.mark.parametrize('kind', BOMBS)
def test_a_config_that_means_harm_is_one_line(tmp_path, kind, capsys):
    (tmp_path / 'c.yaml').write_text(BOMBS[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for parse in (options.parse_args, detection.parse_args):
        with pytest.raises(SystemExit) as stop:
            parse(['--config', str(tmp_path / 'c.yaml')])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count('\n') == 1 and len(line) < 2000, line
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_json_files_without_what_they_need_are_one_line(tmp_path):
    good = {'categories': [{'id': 1, 'name': 'a'}, {'id': 2, 'name': 'b'}], 'images': [{'id': 1, 'file_name': 'x.jpg'}],
            'annotations': [{'id': 1, 'image_id': 1, 'category_id': 2, 'bbox': [1, 1, 2, 2]}]}
    changes = [{key: value} for key in good for value in (None, [], 3, [3], [{}], {'a': 1}, [[]])]
    changes += [{'categories': [{'id': 1}, {'id': 2}]}, {'categories': [{'id': [1], 'name': 'a'}]}, 'text', 7, [], None,
                {'annotations': [{'id': 1, 'image_id': [1], 'category_id': {}, 'bbox': 'x'}]},
                {'categories': [{'id': 2, 'name': ['b']}]}, {'images': [{'id': 1, 'file_name': 5}]}]
    Image.new('RGB', (8, 8)).save(tmp_path / 'x.jpg')
    texts = [json.dumps({**good, **change} if isinstance(change, dict) else change) for change in changes]
    for text in [*texts, '[' * 90_000, '{"a":' * 9000]:
        (tmp_path / 'train2021.json').write_text(text)
        with contextlib.suppress(errors.UsageError):
            assert len(datasets.INaturalist(tmp_path, 2021, True)) > 0
        with contextlib.suppress(errors.UsageError):
            assert len(detection.CocoDataset(str(tmp_path), str(tmp_path / 'train2021.json'), True, masks=False)) > 0


@pytest.mark.parametrize('classes', [10, 'cat', {'a': 1}, [], [1, 2, 3], None])
def test_class_names_that_are_none_are_left_out(whole, images, tmp_path, classes):
    """Other tools write the number of the classes."""
    file = tmp_path / 'x.pth'
    torch.save({**nano.read(whole, 'checkpoint_best.pth'), 'classes': classes}, file)
    nano.train(['--eval', '--resume', file, '--data-path', images, '--device', 'cpu', '--num-workers', 0])
    nano.train([*nano.FLAGS, '--finetune', file, '--data-path', images, '--epochs', 1])
    predict.main([str(file), str(images / 'val')])
    assert weights.read_weights(str(file)).classes is None


# Mutations

def mutate(rng, data):
    """Return bytes with a few faults such as broken disks, cut downloads and people make."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(7)
        length = min(int(2 ** rng.uniform(0, 12)), len(data) - at)
        if kind == 0:
            for i in rng.sample(range(len(data)), min(length + 1, 20, len(data))):
                data[i] = rng.randrange(256)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at + length] = bytes(length)
        elif kind == 3:
            data[at:at] = data[at:at + length] * rng.choice([1, 2, 20])
        elif kind == 4:
            del data[at:at + length]
        elif kind == 5:
            number, order = rng.choice([2 ** 31 - 1, 2 ** 63 - 1, 2 ** 40, 0]), rng.choice(['little', 'big'])
            data[at:at + 8] = number.to_bytes(8, order)
        else:
            data[at:at] = rng.choice([
                b'1e999', b'-1', b'9' * 30, b'null', b'"', b'[' * 3000, b'\0', b'\xff\xfe', b'{}', b'\n'])
    return bytes(data)


def mutate_json(rng, text):
    """Replace a few values anywhere in a JSON text."""
    value, places = json.loads(text), []

    def visit(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                visit(node[key])

    visit(value)
    for node, key in rng.sample(places, min(len(places), rng.choice([1, 2, 4]))):
        if isinstance(node, dict) and rng.random() < 0.3:
            node.pop(key, None)
        else:
            node[key] = rng.choice([None, [], {}, -1, 2 ** 70, 1e300, 'x', '', True, [[]], [None], {'id': 1}])
    return json.dumps(value).encode()


def read_all(dataset):
    for i in range(len(dataset)):
        with contextlib.suppress(Exception):  # A loader names the image and takes the next.
            dataset[i]


def parse_yaml(file):
    with contextlib.suppress(SystemExit):
        options.parse_args(['--config', str(file)])


def read_class_files(file):
    with contextlib.suppress(errors.UsageError):
        datasets.build_dataset('IMNET', True, str(file.parent / 'data'), 32, class_map=str(file))
    evaluation.valid_classes(ImageFolder(file.parent / 'data' / 'train'), str(file))


def read_logs(file):
    with contextlib.suppress(errors.UsageError):
        reports.draw_curves({'a': reports.read_log(file)})
    run.rewind(file.parent, 1)


def read_image(file):
    data = file.read_bytes()
    for read in READERS:
        with contextlib.suppress(Exception):
            np.asarray(FastTransform(build_transform(True, 32))(read(data, max_pixels=LIMIT)))


def seeds(folder, images, whole):
    """Write one good file of each kind; return name: (mutate, read)."""
    good, kinds = folder / 'good', {}
    good.mkdir()

    def add(name, read, write=None, data=None, mutation=mutate):
        if write:
            write(good / name)
        else:
            (good / name).write_bytes(data)
        kinds[name] = mutation, read

    def pack(file):
        with tarfile.open(file, 'w') as tar:
            for path in sorted(images.glob('train/*/0*.png')):
                tar.add(path, path.relative_to(images))

    add('train.tar', lambda file: read_all(TarImages([file], 'train')), pack)
    add('x.pth', lambda file: weights.load_model(str(file)), data=(whole / 'checkpoint_best.pth').read_bytes())
    state = nano.warm().state_dict()
    add('x.safetensors', lambda file: weights.load_model(str(file)),
        lambda file: safetensors.torch.save_file(state, file))
    add('x.ckpt', lambda file: weights.load_model(str(file)),
        data=(Path(__file__).parent / 'mindcv_cmt_nano.ckpt').read_bytes())
    rows = [((images / 'train' / 'class_0' / f'{i:02d}.png').read_bytes(), f'{i}.png', i % 3) for i in range(1, 4)]
    add('train-0.parquet', lambda file: [read_all(images) for images in published.open_published(file.parent).values()],
        lambda file: write_parquet(file, rows))
    add('c.yaml', parse_yaml, data=yaml.safe_dump({'lr': 1e-3, 'opt-betas': [0.9, 0.99], 'model': 'cmt_s', 'aa': 'none',
                                                   'model-ema': True, 'scale': [0.1, 1]}).encode())
    coco = json.dumps({
        'categories': [{'id': i, 'name': f'n{i}', 'kingdom': 'k'} for i in range(3)],
        'images': [{'id': i, 'file_name': f'{i}.png', 'width': 8, 'height': 8} for i in range(3)],
        'annotations': [{'id': i, 'image_id': i, 'category_id': i, 'bbox': [1, 1, 3, 3], 'iscrowd': 0, 'area': 9,
                         'segmentation': [[1, 1, 3, 1, 3, 3]]} for i in range(3)]}).encode()
    for i in range(3):
        Image.new('RGB', (8, 8)).save(folder / f'{i}.png')
    for mutation in (mutate, mutate_json):
        name = mutation.__name__
        add(f'coco_{name}.json', lambda file: read_all(detection.CocoDataset(
            str(folder), str(file), True, masks=True)), data=coco, mutation=mutation)
        add(f'{name}/train2021.json', lambda file: read_all(datasets.INaturalist(file.parent, 2021, True, 'kingdom')),
            lambda file: (file.parent.mkdir(), file.write_bytes(coco)), mutation=mutation)
        add(f'{name}/log.txt', read_logs, data=(whole / 'log.txt').read_bytes(), mutation=mutate)
    add('map.txt', read_class_files, data=b'class_0\nclass_1\nclass_2\n0\n')
    image = Image.open(images / 'train' / 'class_0' / '00.jpg').resize((99, 77))
    for kind in ('jpeg', 'png', 'webp', 'tiff', 'gif', 'bmp', 'avif', 'tga', 'jpeg2000', 'ppm', 'qoi'):
        with contextlib.suppress(OSError, KeyError):  # This Pillow lacks an encoder.
            image.save(out := io.BytesIO(), kind, **({'progressive': True} if kind == 'jpeg' else {}))
            add(f'image.{kind}', read_image, data=out.getvalue())
    return good, kinds


@pytest.mark.soak
def test_mutated_files_give_the_right_data_or_one_line(images, whole, tmp_path):
    """300 of each kind: no other exception, no more than half a gigabyte, no more than 20 seconds each."""
    good, kinds = seeds(tmp_path, images, whole)
    for name, (mutation, read) in kinds.items():
        file = tmp_path / 'bad' / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (file.parent / 'data').symlink_to(images)
        pid = os.fork()
        if not pid:  # A new process, so that peaks of memory can be told apart.
            status, rng = 1, random.Random(name + os.environ.get('SEED', ''))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            lines = os.open(tmp_path / 'lines.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(lines, 1), os.dup2(lines, 2)
            try:
                for _ in range(int(os.environ.get('MUTATIONS', 300))):
                    file.write_bytes(mutation(rng, (good / name).read_bytes()))
                    signal.alarm(20)
                    with contextlib.suppress(errors.UsageError):
                        read(file)
                    signal.alarm(0)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                status = 0 if peak - before < 2 ** 19 else f'{name}: {(peak - before) / 1024:.0f} MiB'
            except BaseException:
                status = f'{name}: {traceback.format_exc()}'
            (tmp_path / 'status').write_text(str(status))
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, f'{name}: killed by a signal or the alarm'
        assert (tmp_path / 'status').read_text() == '0', (tmp_path / 'status').read_text()
