"""reports.py and scripts/plot_log.py: reading logs, curves, sheets, mistakes."""
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import plot_log
import reports

LINE = '{"epoch": 0}\n'


def record(epoch, tested=True):
    line = {'train_loss': 2.0 / (epoch + 1), 'train_lr': 1e-3, 'epoch': epoch, 'train_images_per_s': 50.0 + epoch}
    if tested:
        line |= {'test_loss': 1.0 / (epoch + 1), 'test_acc1': 90.0 + epoch,
                 'ema_test_loss': 1.5 / (epoch + 1), 'ema_test_acc1': 80.0 + epoch}
    return line


def write_run(folder, records, tail=''):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in records) + tail)
    return folder


def lines_of(axes):
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in axes.lines]


def test_every_value_of_a_log_is_drawn():
    records = [record(0), record(1, tested=False), record(2), record(3)]  # as --test-freq 2 and a last epoch of 3 log
    figure = reports.draw_curves({'run': records})
    assert [lines_of(axes) for axes in figure.axes] == [
        [([0, 1, 2, 3], [2.0, 1.0, 2 / 3, 0.5], ':'), ([0, 2, 3], [1.0, 1 / 3, 0.25], '-'),
         ([0, 2, 3], [1.5, 0.5, 0.375], '--')],
        [([0, 2, 3], [90.0, 92.0, 93.0], '-'), ([0, 2, 3], [80.0, 82.0, 83.0], '--')],
        [([0, 1, 2, 3], [1e-3] * 4, '-')],
        [([0, 1, 2, 3], [50.0, 51.0, 52.0, 53.0], '-')]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ['train', 'test', 'test, EMA']
    label = figure.legends[0].get_texts()[0].get_text()
    assert label.startswith('run') and '93.00' in label and '83.00' in label


def test_detection_has_average_precision_for_accuracy():
    records = [{'epoch': epoch, 'train_loss': 1.0, 'box_ap': 20.0 + epoch, 'mask_ap': 10.0} for epoch in range(2)]
    axes = reports.draw_curves({'run': records}).axes[1]
    assert [values for _, values, _ in lines_of(axes)] == [[20.0, 21.0], [10.0, 10.0]]


def test_logs_may_lack_scores_repeat_epochs_and_hold_nan(tmp_path):
    records = [record(0, tested=False), record(1, tested=False), record(1, tested=False) | {'train_loss': 7.0},
               record(2, tested=False) | {'train_loss': float('nan')}]
    log = write_run(tmp_path, records, tail='{"train_loss": 0.') / 'log.txt'  # the last line is being written
    loss, accuracy, *_ = reports.draw_curves({'run': reports.read_log(log)}).axes
    assert lines_of(loss) == [([0, 1], [2.0, 7.0], ':')]
    assert not accuracy.lines and accuracy.texts


@pytest.mark.parametrize('count', [1, 7])
def test_sheet_holds_each_image_with_its_heat(tmp_path, count):
    """Every image is drawn whole, its heat map to the right, whatever the length of texts."""
    cam = np.repeat([1., 0.], 32)[:, None].repeat(64, 1)  # hot above, cold below
    colors = [(20 * i, 255 - 20 * i, 120) for i in range(count)]
    predictions = [{'index': 0, 'class': 'a $\\name$ that is far too long ' * 4, 'probability': 1.},
                   {'index': 1, 'class': 'b', 'probability': 0.}]
    entries = [{'name': 'long/' * 40, 'image': Image.new('RGB', (64, 64), color), 'cam': cam,
                'predictions': predictions, 'truth': truth}
               for color, truth in zip(colors, itertools.cycle([None, predictions[1]]))]
    reports.save(reports.draw_sheet(entries, 'title ' * 60), tmp_path / 'sheet.png')
    sheet = np.asarray(Image.open(tmp_path / 'sheet.png').convert('RGB')).astype(int)
    side = reports.SIDE
    for color in colors:
        rows, columns = np.nonzero(np.all(sheet == color, axis=-1))
        assert len(rows) == side ** 2 and np.ptp(rows) == np.ptp(columns) == side - 1
        heat = sheet[rows.min():rows.max() + 1, columns.max() + 15:columns.max() + 15 + side]
        assert heat[0, side // 2, 0] > heat[0, side // 2, 2] and heat[-1, side // 2, 0] < heat[-1, side // 2, 2]


def test_command_line(tmp_path):
    """A real figure, without a display and without torch."""
    write_run(tmp_path / 'a' / 'run', [record(0), record(1)])
    write_run(tmp_path / 'b' / 'run', [record(0)])
    environment = {name: value for name, value in os.environ.items() if name not in ('DISPLAY', 'MPLBACKEND')}
    code = f"""
import runpy, sys
sys.modules['torch'] = None  # an import of torch fails
sys.path.insert(0, {os.path.dirname(plot_log.__file__)!r})
sys.argv = ['plot_log.py', 'a/run', 'b/run/log.txt', '-o', 'out.PNG']
runpy.run_path({plot_log.__file__!r}, run_name='__main__')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'out.PNG: 2 epochs, 1 epochs\n'), done.stderr
    with Image.open(tmp_path / 'out.PNG') as figure:
        figure.load()
        colors = {color for _, color in figure.convert('RGB').getcolors(1 << 24)}
        assert figure.format == 'PNG' and {(31, 119, 180), (255, 127, 14)} <= colors  # C0 and C1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'b', 'out.PNG']


@pytest.mark.parametrize('content, line, message', [
    (None, 'run', 'run/log.txt'),
    ('{"train_loss": 1', 'run', 'run/log.txt'),
    ('{"epoch": 0}\n{"epoch": \n{"epoch": 2}\n', 'run', 'run/log.txt, line 2'),
    ('{"epoch": 0}\n{"train_loss": 1.0}\n', 'run', 'run/log.txt, line 2'),
    (LINE, 'run -o curves.xyz', 'curves.xyz'),
    (LINE, 'run -o nowhere/curves.png', 'nowhere/curves.png'),
    (LINE, 'nowhere', 'nowhere'),
])
def test_bad_logs_and_arguments_get_one_line(tmp_path, mistake, content, line, message):
    (tmp_path / 'run').mkdir()
    if content is not None:
        (tmp_path / 'run' / 'log.txt').write_text(content)
    assert message in mistake(plot_log, *line.split())
