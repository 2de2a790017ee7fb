"""What a run and --eval show: the report, the first batch, curves, the next commands; and the first command."""
import csv
import os
import re
import resource
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

import engine
import export
import nano
import predict
import reports
from test_evaluation import nameless, write_images

ROOT = Path(__file__).parents[1]


def rows(path):
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as file:
        return list(csv.DictReader(file))


def check_report(folder, accuracy, classes):
    """Compare the tables with scikit-learn's figures of predictions.csv."""
    images, table = rows(folder / 'predictions.csv'), {row['class']: row for row in rows(folder / 'per_class.csv')}
    truth, predicted = ([row[key] for row in images] for key in ('label', 'prediction'))
    assert 100 * accuracy_score(truth, predicted) == pytest.approx(accuracy, abs=1e-3) and list(table) == classes
    figures = zip(*precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0))
    for name, (precision, recall, f1, count) in zip(classes, figures):
        row = table[name]
        assert [row[key] for key in ('precision', 'recall', 'accuracy', 'f1', 'images')] == [
            f'{precision:.4f}', f'{recall:.4f}', f'{recall:.4f}', f'{f1:.4f}', str(count)]
        wrong = [b for a, b in zip(truth, predicted) if a == name != b]
        assert int(row['confusions']) == max(map(wrong.count, wrong), default=0) == wrong.count(row['confused_with'])
    for row in images:
        probabilities = [float(row[key]) for key in row if key.startswith('probability_')]
        assert probabilities == sorted(probabilities, reverse=True) and row['class_1'] == row['prediction']
        assert len(probabilities) == min(5, len(classes))
    assert all(Image.open(folder / name).width > 300 for name in ('confusion.png', 'mistakes.jpg'))
    return images


@pytest.fixture(scope='module')
def twelve(tmp_path_factory):
    """12 numbered folders with a tricky name in one, and weights for 13 classes that are often wrong."""
    root = tmp_path_factory.mktemp('twelve')
    folder = write_images(root / 'data', [str(i) for i in range(12)], per_class=4)
    (folder / '3' / '0.png').rename(folder / '3' / os.fsdecode(b'a, "b"\n\xff $x$.png'))
    nameless(root / 'w.pth', 13)
    return root


def test_a_report_is_the_same_on_two_ranks(twelve, tmp_path, capsys):
    flags = ['--eval', '--device', 'cpu', '--num-workers', 0, '--batch-size', 4, '--resume', twelve / 'w.pth',
             '--data-path', twelve / 'data']
    nano.train([*flags, '--report', tmp_path / 'one'])
    printed = capsys.readouterr().out
    accuracy = float(re.search(r'Acc@1 (\S+)', printed)[1])
    images = check_report(tmp_path / 'one', accuracy, [str(i) for i in range(13)])
    assert len(images) == 48 and all(Path(row['path']).is_file() for row in images) and 0 < accuracy < 100
    mean = balanced_accuracy_score(*([row[key] for row in images] for key in ('label', 'prediction')))
    assert f'{mean:.3%}' in printed
    nano.finish(nano.start([*flags, '--report', tmp_path / 'two'], ranks=2, output=tmp_path / 'out.txt'))
    for name in 'predictions.csv', 'per_class.csv', 'confusion.png', 'mistakes.jpg':
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes(), name


def test_the_report_is_of_the_classes_that_are_scored(twelve, tmp_path, capsys):
    (tmp_path / 'valid').write_text('\n'.join(map(str, range(12))))
    nano.train(['--eval', '--device', 'cpu', '--num-workers', 0, '--resume', twelve / 'w.pth', '--data-path',
                twelve / 'data', '--valid-labels', tmp_path / 'valid', '--report', tmp_path / 'a' / 'b'])
    accuracy = float(re.search(r'Acc@1 (\S+)', capsys.readouterr().out)[1])
    check_report(tmp_path / 'a' / 'b', accuracy, [str(i) for i in range(12)])


def test_a_report_that_cannot_be_written_costs_no_evaluation(twelve, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(engine, 'evaluate', None)
    nano.finish(nano.start(['--eval', '--device', 'cpu', '--resume', twelve / 'w.pth', '--data-path', twelve / 'data',
                            '--report', tmp_path / 'file'], output=tmp_path / 'out.txt'), status=2)
    assert str(tmp_path / 'file') in (tmp_path / 'out.txt').read_text().splitlines()[-1]


@pytest.mark.parametrize('classes', [50, 51])
def test_confusions_of_many_classes_are_drawn(classes, tmp_path):
    """A matrix of at most 50 classes, else the most frequent confusions. Any name can be drawn."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, 5 * classes)
    guesses = np.where(rng.random(len(targets)) < 0.7, targets, rng.integers(0, classes, len(targets)))
    names = [f'$class_{i}\\frac ä\n' * 3 for i in range(classes)]
    predictions = reports.Predictions([''] * len(targets), names, names, targets, guesses[:, None],
                                      np.ones((len(targets), 1)))
    matrix = confusion_matrix(predictions.targets, predictions.classes[:, 0], labels=range(classes))
    assert matrix.sum() == len(targets) and matrix.trace() == sum(targets == guesses)
    figure = reports.draw_confusion(matrix, names)
    reports.save(figure, tmp_path / 'confusion.png')
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    if classes <= 50:
        assert [text for text in texts if text] == [str(n) for n in matrix.flat if n]
    else:
        off = matrix - np.diag(matrix.diagonal())
        counts = [int(line.split()[-2]) for line in figure.texts[0].get_text().splitlines()[2:]]
        assert counts == sorted(off.flat, reverse=True)[:30]


def test_a_finished_run_shows_its_results(flags, tmp_path, monkeypatch, capsys):
    """The files are there, and each command that is printed runs."""
    monkeypatch.chdir(tmp_path)
    nano.train([*flags, '--output-dir', 'my run'])
    printed, folder = capsys.readouterr().out, tmp_path / 'my run'
    assert len(re.findall(r'^epoch \d/2  train .*\n  val acc1 .*$', printed, re.M)) == 3
    assert all(Image.open(folder / name).width > 300 for name in ('curves.png', 'batch.jpg', 'confusion.png'))
    last, best = nano.log(folder)[-1], nano.read(folder)['best']
    check_report(folder, max(last['test_acc1'], last['ema_test_acc1']), ['class_0', 'class_1', 'class_2'])
    for prefix in ('', 'ema_'):
        line, = re.findall(rf'^best {"EMA" if prefix else "model"}: .*', printed, re.M)
        assert f"{best[f'{prefix}acc1']:.3f}%" in line and f'checkpoint_{prefix}best.pth' in line
    commands = [shlex.split(line)[1:] for line in re.findall('^  (python .*)', printed, re.M)]
    (evaluate, *eval_flags), (predicts, *predict_flags), (exports, *export_flags) = commands
    assert [(tmp_path / script).resolve() for script in (evaluate, predicts, exports)] == [
        ROOT / 'train.py', ROOT / 'scripts' / 'predict.py', ROOT / 'scripts' / 'export.py']
    nano.train([*eval_flags, '--device', 'cpu', '--num-workers', 0])
    assert f"Acc@1 {max(best['acc1'], best['ema_acc1']):.3f}" in capsys.readouterr().out
    predict.main(predict_flags)
    export.main([*export_flags[:-1], 'model.pt2'])
    assert {'report', 'predictions.jpg'} <= {path.name for path in folder.iterdir()}


def test_the_first_batch_is_drawn_with_the_classes_that_mix(flags, tmp_path, monkeypatch):
    drawn, draw = [], reports.draw_batch
    monkeypatch.setattr(reports, 'draw_batch', lambda *args: drawn.append(args) or draw(*args))
    nano.train([*flags, '--epochs', 1, '--output-dir', tmp_path])
    (images, titles), = drawn
    assert images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3) and len(images) == len(titles)
    assert all(re.fullmatch(r'class_\d( \+ class_\d)?', title) for title in titles)
    assert any('+' in title for title in titles)


def test_ctrl_c_is_answered_at_once(flags, tmp_path):
    """Before the step ends."""
    output, release = tmp_path / 'out.txt', tmp_path / 'release'

    def hold(rank):
        nano.at_step(2, lambda: ((tmp_path / 'held').touch(), nano.wait_for(release.exists)))

    process, = nano.start([*flags, '--output-dir', tmp_path / 'run'], output=output, before=hold)
    nano.wait_for((tmp_path / 'held').exists)
    os.kill(process.pid, signal.SIGINT)
    nano.wait_for(lambda: 'Ctrl-C again' in output.read_text())
    release.touch()
    nano.finish([process], status=130)
    assert nano.read(tmp_path / 'run')['step'] == 3


# the first command

def messy(root, classes):
    """Photographs as people have them; one class has five images, each class a truncated one."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f'Äpfel & Birnen {label}'
        folder.mkdir(parents=True)
        for i in range(5 if label == 1 else 11):
            pixels = rng.integers(0, 100, (40, 50, 3), dtype=np.uint8)
            pixels[..., label % 3] += np.uint8(150 - 100 * label // classes)
            Image.fromarray(pixels).save(folder / f'photo {i}.jpg')
        data = (folder / 'photo 0.jpg').read_bytes()
        (folder / 'truncated.jpg').write_bytes(data[:len(data) // 2])
    photo = Image.open(folder / 'photo 0.jpg')
    photo.convert('CMYK').save(folder / 'cmyk.jpg')
    photo.save(folder / 'ü.webp')
    photo.resize((1, 1)).save(folder / 'pixel.png')
    (folder / 'notes.txt').touch()
    (root / '.DS_Store').touch()
    return root


@pytest.mark.parametrize('config, classes', [('from_scratch', 3), ('finetune', 37)])
def test_two_flags_suffice(config, classes, tmp_path, capsys, monkeypatch):
    """Besides them, only the size of the run is changed. The share that is held out lacks the truncated images."""
    data = messy(tmp_path / 'my photos', classes)
    small = ['--model', 'cmt_nano', '--input-size', 32, '--epochs', 1, '--device', 'cpu', '--num-workers', 0]
    if config == 'finetune':
        torch.save({'model': nano.warm(num_classes=1000).state_dict()}, tmp_path / 'released.pth')
        small += ['--finetune', tmp_path / 'released.pth']
    run = ['--config', ROOT / 'configs' / f'{config}.yaml', *small, '--data-path', data]
    nano.train([*run, '--output-dir', tmp_path / 'run'])
    printed = capsys.readouterr().out
    images = rows(tmp_path / 'run' / 'predictions.csv')
    assert len(re.findall('leaving out .*/truncated.jpg', printed)) == classes and 'cannot read' not in printed
    train, val = map(int, re.search(r'(\d+) training and (\d+) validation images', printed).groups())
    assert len({row['label'] for row in images}) >= classes - 1 and len(images) == val
    assert train + val == len([file for file in data.glob('*/*') if file.suffix != '.txt']) - classes
    assert classes <= val < train / 3
    nano.train(['--eval', '--resume', tmp_path / 'run' / 'checkpoint_ema_best.pth', '--device', 'cpu'])
    assert f'on the {len(images)} test images' in capsys.readouterr().out


def test_a_validation_split_replaces_the_held_out_share(images, tmp_path, capsys):
    run = ['--config', ROOT / 'configs' / 'from_scratch.yaml', '--model', 'cmt_nano', '--input-size', 32, '--epochs', 1,
           '--device', 'cpu', '--num-workers', 0, '--data-path', images]
    nano.train([*run, '--output-dir', tmp_path / 'run'])
    printed = capsys.readouterr().out
    assert '--val-split 0.2 is ignored' in printed and '100 training and 27 validation images' in printed
    assert nano.read(tmp_path / 'run')['args']['val_split'] is None


def test_missing_photographs_are_named_before_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr('weights.read', lambda file: pytest.fail('downloads'))
    nano.finish(nano.start(['--config', ROOT / 'configs' / 'finetune.yaml', '--data-path', tmp_path / 'fotos'],
                           output=tmp_path / 'out.txt'), status=2)
    line, = (tmp_path / 'out.txt').read_text().splitlines()
    assert 'fotos' in line


# the EMA of a short run

def test_the_ema_of_a_short_run_is_trained(flags, tmp_path):
    """Its decay warms up, so that after a few steps none of it is initial; a killed run ends with the same bits."""
    run = [*flags, '--epochs', 2, '--model-ema-decay', 0.9999, '--model-ema-warmup', '--output-dir']
    nano.train([*run, tmp_path / 'whole'])
    nano.train([*flags, '--epochs', 2, '--model-ema-decay', 0.9999, '--output-dir', tmp_path / 'plain'])

    def distance(folder):
        state = nano.read(folder)
        return sum((ema - model).pow(2).sum() for (name, ema), model in zip(
            state['model_ema'].items(), state['model'].values()) if name.endswith('weight')).sqrt()

    assert distance(tmp_path / 'whole') < 0.5 * distance(tmp_path / 'plain')
    with nano.at_step(8, nano.die), pytest.raises(nano.Killed):
        nano.train([*run, tmp_path / 'killed', '--save-every-steps', 2])
    nano.train([*run, tmp_path / 'killed', '--save-every-steps', 2, '--resume', 'auto'])
    nano.assert_same_run(tmp_path / 'killed', tmp_path / 'whole')


# scripts/predict.py on class folders

@pytest.fixture
def labeled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nano.warm(num_classes=3)
    torch.save({'format': 1, 'model': model.state_dict(), 'model_args': model.model_args, 'args': {'model': 'cmt_nano'},
                'classes': ['x', 'y', 'z']}, 'w.pth')
    write_images(tmp_path / 'photos', ['x', 'y', 'z', 'other'], per_class=5)
    return tmp_path


def test_predictions_in_class_folders_are_counted(labeled, capsys, monkeypatch):
    sheets = []
    monkeypatch.setattr(predict, 'draw_sheet', lambda entries, title: sheets.append((entries, title)) or
                        reports.draw_sheet(entries, title))
    predict.main(['w.pth', 'photos', '--json', '--picture', 'sheet.png', '--features', 'f.npz', '--batch-size', '3'])
    printed = capsys.readouterr()
    results = predict.json.loads(printed.out)
    folders = [Path(result['image']).parent.name for result in results]
    labels = [result['label']['class'] if 'label' in result else 'other' for result in results]
    assert labels == folders and folders.count('other') == 5
    right = [result['label']['class'] == result['predictions'][0]['class'] for result in results if 'label' in result]
    assert f'{sum(right)} of 15 images' in printed.err and 0 < sum(right) < 15
    (entries, title), = sheets
    wrong = [entry['truth'] is not None and entry['truth']['index'] != entry['predictions'][0]['index']
             for entry in entries]
    assert sorted(wrong, reverse=True) == wrong and sum(wrong) == 15 - sum(right) and len(entries) == 20
    features = np.load('f.npz')
    model = nano.warm(num_classes=3)
    head = torch.from_numpy(features['features']) @ model.head.weight.detach().T + model.head.bias.detach()
    assert features['features'].shape == (20, 32) and features['names'].tolist() == [r['image'] for r in results]
    assert features['labels'].tolist() == [['x', 'y', 'z', 'other'].index(f) if f != 'other' else -1 for f in folders]
    assert ['xyz'[i] for i in head.argmax(1)] == [result['predictions'][0]['class'] for result in results]


def test_labels_are_found_below_splits_and_by_index(labeled, capsys):
    """Two classes may have one name, as ImageNet's cranes."""
    Path('data/val').mkdir(parents=True)
    Path('photos/x').rename('data/val/x')
    Path('names').write_text('same\nsame\nother\n')
    predict.main(['w.pth', 'data', '--json', '--class-names', 'names'])
    printed = capsys.readouterr()
    results = predict.json.loads(printed.out)
    assert [result['label'] for result in results] == 5 * [{'index': 0, 'class': 'same'}]
    right = sum(result['predictions'][0]['index'] == 0 for result in results)
    assert f'{right} of 5 images' in printed.err


@pytest.mark.parametrize('name', ['confusion.png', 'mistakes.jpg'])
def test_a_full_disk_keeps_the_old_picture(name, tmp_path):
    """A picture is whole, or an error, however much of it fits. A limit on the size of files acts as the disk."""
    pixels, path = np.random.default_rng(0).integers(0, 256, (16, 99, 99, 3), dtype=np.uint8), tmp_path / name
    faults, before = 0, resource.getrlimit(resource.RLIMIT_FSIZE)
    for count in range(1, 17):
        path.write_text('old')
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (152_000, before[1]))
            reports.save(reports.draw_batch(pixels[:count], ['a'] * count), path)
            Image.open(path).load()
        except OSError as error:
            assert name in str(error) and path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
            faults += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < faults < 16
