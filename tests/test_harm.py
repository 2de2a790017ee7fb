"""Malicious files, and what other tools write: each gives the right data or one line, in bounded memory."""
import contextlib
import io
import resource

import pytest
import torch
from PIL import Image

import errors
import nano
import options
import predict
import sources
import weights
from fast_transforms import FastTransform

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n%%EOF\n'
LIMIT = 64_000_000
READERS = sources.open_image, FastTransform.open_image


# Images

@pytest.mark.parametrize('read', READERS)
def test_postscript_is_no_image_whatever_its_name(read):
    """Pillow would start Ghostscript to load it."""
    with pytest.raises(Exception, match='cannot identify'):
        read(EPS)


@pytest.mark.parametrize('kind, mode', [('PNG', '1'), ('WEBP', 'RGB'), ('JPEG', 'L')])
def test_small_files_of_many_pixels_are_not_decoded(kind, mode):
    size = (16000, 4100)
    Image.new(mode, size).save(out := io.BytesIO(), kind)
    data = out.getvalue()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in READERS:
        with pytest.raises(Image.DecompressionBombError, match='--max-image-pixels'):
            read(data, max_pixels=LIMIT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB
    image = FastTransform.open_image(data, max_pixels=2 * LIMIT) if kind == 'JPEG' else \
        sources.open_header(data, 2 * LIMIT)
    assert image.size == size


def test_the_limit_of_pixels_is_a_flag_of_every_run(flags, tmp_path, capsys):
    for label in ('x', 'y'):
        (tmp_path / 'train' / label).mkdir(parents=True)
        for name, size in (('small', 10), ('large', 30)):
            Image.new('RGB', (size, size)).save(tmp_path / 'train' / label / f'{name}.jpg')
    (tmp_path / 'val').symlink_to(tmp_path / 'train')
    run = [*flags, '--data-path', tmp_path, '--epochs', 1, '--batch-size', 2, '--accum-steps', 1]
    nano.train(run)
    assert 'large' not in capsys.readouterr().out
    for skip in ([], ['--skip-damaged']):
        with pytest.raises(errors.UnreadableImage) if not skip else contextlib.nullcontext():  # of the validation
            nano.train([*run, '--max-image-pixels', 400, '--repeated-aug', *skip])
        out = capsys.readouterr().out
        assert 'large.jpg' in out and '30 x 30' in out and 'small.jpg' not in out
    output = tmp_path / 'out.txt'
    nano.finish(nano.start([*run, '--max-image-pixels', 400, '--repeated-aug', '--skip-damaged'], 2, output))
    assert '2 training and 2 validation images' in output.read_text()


# Text

BAD_CONFIGS = {'binary': 'lr: \x00\x01', 'tag': 'lr: !!python/object/apply:os.system [id]', 'date': 'lr: 2001-99-99'}


@pytest.mark.parametrize('kind', BAD_CONFIGS)
def test_a_malicious_config_is_one_line(tmp_path, kind, capsys):
    (tmp_path / 'c.yaml').write_text(BAD_CONFIGS[kind])
    with pytest.raises(SystemExit) as stop:
        options.parse_args(['--config', str(tmp_path / 'c.yaml')])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count('\n') == 1 and len(line) < 2000, line


@pytest.mark.parametrize('classes', [10, [1, 2, 3]])
def test_class_names_that_are_none_are_left_out(whole, images, tmp_path, classes):
    """Other tools write the number of the classes."""
    file = tmp_path / 'x.pth'
    torch.save({**nano.read(whole, 'checkpoint_best.pth'), 'classes': classes}, file)
    nano.train(['--eval', '--resume', file, '--data-path', images, '--device', 'cpu', '--num-workers', 0])
    nano.train([*nano.FLAGS, '--finetune', file, '--data-path', images, '--epochs', 1])
    predict.main([str(file), str(images / 'val')])
    assert weights.read_weights(str(file)).classes is None
