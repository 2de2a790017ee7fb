"""A user's mistake gets one line and status 2 before anything is written; a fault in mid-run gets status 1."""
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import errors
import nano
import train

# Flags, and what the message must name: the last flag or value unless it follows a bar.
MISTAKES = """
--data-path nowhere
--data-path= | --data-path
--data-path empty | empty/train/class_0
--data-path foreign | --class-map .*unheard
--data-path deep | images, .*class_0, class_1, class_2
--data-path one --class-map map.txt | class_1
--data-set DIGITS --data-path= --eval --resume {whole}/checkpoint_last.pth | checkpoint_last.pth .*--finetune
--data-set DIGITS | --data-set IMNET
--data-set CIFAR10 | --data-set IMNET
--max-train-images 2
--model cmt_xxl
--model resnet18
--model efficientvit_b0
--distillation-type soft --teacher-model resnet18.typo --teacher-path {whole}/checkpoint_last.pth | resnet18.typo
--distillation-type soft --teacher-model resnet10t --teacher-path {whole}/checkpoint_last.pth | checkpoint_last.pth
--input-size 100 | 100.*32
--resume other.pth
--resume {whole}/checkpoint_last.pth --model cmt_ti | checkpoint_last.pth
--resume {whole}/checkpoint_last.pth --input-size 64 | --input-size
--resume {whole}/checkpoint_last.pth --opt lamb | --opt adamw
--resume {whole}/checkpoint_best.pth | checkpoint_best.pth .*--finetune
--resume {whole} | checkpoint(_ema)?_best.pth .*--finetune
--resume short.pth | short.pth
--resume list.pth
--resume text.pth
--resume none.pth
--resume bare.pth | bare.pth .*--finetune
--finetune grey.pth
--eval --resume auto | --eval
--eval --resume damaged/checkpoint_last.pth
--config odd.yaml | modle
--output-dir text.pth
--output-dir logged | --resume auto .*--overwrite
--output-dir best | --resume auto .*--overwrite
--output-dir best --resume auto | checkpoint_best.pth
--output-dir {whole} | --resume auto .*--overwrite
--opt adamwww
--opt-betas 0.9 | --opt-betas
--aa foo
--device foo
--world-size 3 | --world-size 3
--sync-bn
"""


def test_mistakes_get_one_line_and_status_2(flags, images, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ('empty/train/class_0', 'foreign/val/unheard', 'logged', 'best'):
        Path(folder).mkdir(parents=True)
    Path('foreign/train').symlink_to(images / 'train')
    for split in ('train', 'val'):
        shutil.copytree(images / split, f'deep/{split}/images')  # Are its folders the classes?
        shutil.copytree(images / split / 'class_1', f'one/{split}/class_1')
    Path('map.txt').write_text('class_0\nclass_1\n')
    shutil.copytree(whole, 'damaged')
    Path('damaged/checkpoint_last.pth').write_bytes(b'damaged')
    for name in ('text.pth', 'logged/log.txt', 'best/checkpoint_best.pth'):
        Path(name).write_text('no checkpoint')
    Path('odd.yaml').write_text('modle: cmt_ti\n')
    for name, value in {
            'list': {'model': [1]}, 'other': {'model': {'a': torch.ones(1)}},
            'short': {**nano.read(whole), 'model': dict(list(nano.read(whole)['model'].items())[1:])},
            'bare': {**nano.read(whole), 'optimizer': None},
            'grey': {'model': nano.small(in_chans=1).state_dict()}}.items():
        torch.save(value, f'{name}.pth')

    def files():
        return {path: path.is_file() and path.stat().st_mtime_ns for path in (*tmp_path.rglob('*'), *whole.rglob('*'))}

    before, wrong = files(), []
    for line in MISTAKES.format(whole=whole).strip().splitlines():
        change, _, words = line.partition(' | ')
        monkeypatch.setattr(sys, 'argv', ['train.py', *flags, '--output-dir', 'run', *change.split()])
        try:
            status = train.cli()
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr().err
        if status != 2 or not re.fullmatch(rf'train\.py: error: .*{words or change.split()[-1]}.*\n', printed) or \
                files() != before:
            wrong.append((line, status, printed))
    assert not wrong


def test_a_mistake_of_two_ranks_is_told_once(flags, tmp_path):
    output = tmp_path / 'out.txt'
    for change, words in ((['--data-path', tmp_path / 'nowhere'], 'nowhere'), (['--lr', 'x'], "'x'"),
                          (['--device', 'cuda' if not torch.cuda.is_available() else 'foo'], '--device')):
        output.unlink(missing_ok=True)
        nano.finish(nano.start([*flags, *change], ranks=2, output=output), status=2)
        assert output.read_text().count('train.py: error:') == 1 and words in output.read_text()
        assert 'Traceback' not in output.read_text()


# classes

@pytest.mark.parametrize('change', [['--eval', '--resume', 'CKPT'], ['--resume', 'CKPT', '--output-dir', 'new']])
def test_classes_that_a_checkpoint_lacks_are_named(flags, whole, renamed, tmp_path, monkeypatch, change):
    data = renamed(class_0='class_0', dog='class_1', class_2='class_2')
    monkeypatch.chdir(tmp_path)
    run = [*flags, '--data-path', data, *(whole / 'checkpoint_last.pth' if x == 'CKPT' else x for x in change)]
    with pytest.raises(errors.UsageError, match=r'\bdog$'):
        nano.train(run)
    assert not Path('new').exists()
    nano.train([*flags, '--data-path', data, '--finetune', whole / 'checkpoint_last.pth', '--epochs', 1])


# faults

def test_a_nan_of_one_rank_stops_both_and_is_not_saved(flags, tmp_path):
    run, output = [*flags, '--output-dir', tmp_path / 'run', '--save-every-steps', 1], tmp_path / 'out.txt'
    # Each epoch has three steps of two batches.
    nano.finish(nano.start(run, ranks=2, output=output, before=lambda rank: rank and nano.poison(8)), status=1)
    assert len(re.findall('^train.py: error: epoch 1, step 1: ', output.read_text(), re.M)) == 1
    assert 'Traceback' not in output.read_text()
    saved = nano.read(tmp_path / 'run')
    assert (saved['epoch'], saved['step']) == (1, 1) and nano.finite(saved['model']) and nano.finite(saved['model_ema'])
