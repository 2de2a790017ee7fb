"""scripts/detection.py: torchvision's detectors over CMT, on data in COCO's format."""
import itertools
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import detection
import errors
import nano

coco_mask = pytest.importorskip('pycocotools.mask')

SMALL = ('--device cpu --backbone cmt_nano --fpn-channels 16 --anchor-size 16 --proposals 20 --input-size 64 64 '
         '--batch-size 2 --epochs 2 --lr-steps --warmup-steps 2 --lr 0.03 --num-workers 0').split()


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """Ten training and five validation images of 64 px."""
    folder = tmp_path_factory.mktemp('shapes')
    detection.write_shapes(folder, 10, 5, 64)
    return folder


def run(*argv) -> None:
    detection.main(detection.parse_args([str(arg) for arg in argv]))


def last_scores(text) -> dict[str, float]:
    return json.loads([line for line in text.splitlines() if line.startswith('{')][-1])


def by_hand(shapes, folder, kind) -> list[float]:
    """Return pycocotools' scores from the files alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    truth = COCO(shapes / 'annotations' / 'instances_val2017.json')
    results = truth.loadRes(str(folder / f'detections_{kind}.json'))
    evaluation = COCOeval(truth, results, {'box': 'bbox', 'mask': 'segm'}[kind])
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [100 * value for value in evaluation.stats[:6]]


@pytest.mark.parametrize('model', ['retinanet', 'fasterrcnn', 'maskrcnn'])
def test_a_detector_trains_and_its_score_is_that_of_pycocotools(model, shapes, tmp_path, capsys):
    flags = [*SMALL, '--model', model, '--data-path', shapes, '--epochs', 3]
    run(*flags, '--output-dir', tmp_path / 'run')
    capsys.readouterr()
    lines = nano.log(tmp_path / 'run')
    assert [line['epoch'] for line in lines] == [0, 1, 2] and lines[2]['train_loss'] < lines[0]['train_loss']
    last = tmp_path / 'run' / 'checkpoint_last.pth'
    run(*flags, '--output-dir', tmp_path / 'eval', '--eval', '--resume', last)
    scores = last_scores(capsys.readouterr().out)
    assert scores and scores.items() <= lines[2].items()
    for kind in ('box', 'mask')[:1 + (model == 'maskrcnn')]:
        for name, value in zip(detection.METRICS, by_hand(shapes, tmp_path / 'eval', kind)):
            assert scores.get(f'{kind}_{name}', -100) == value
        trained, evaluated = (json.loads((tmp_path / folder / f'detections_{kind}.json').read_text())
                              for folder in ('run', 'eval'))
        assert trained == evaluated and {one['image_id'] for one in trained} <= set(range(5))
    Image.open(tmp_path / 'run' / 'detections.png').load()


def test_ranks_share_the_images_and_find_the_same(shapes, tmp_path):
    flags = [*SMALL, '--model', 'maskrcnn', '--data-path', shapes]
    nano.finish(nano.start([*flags, '--output-dir', tmp_path / 'run'], ranks=2, command='detection',
                           output=tmp_path / 'out.txt'))
    line = nano.log(tmp_path / 'run')[-1]
    for ranks in (1, 2):
        output = tmp_path / f'{ranks}.txt'
        nano.finish(nano.start(
            [*flags, '--eval', '--resume', tmp_path / 'run/checkpoint_last.pth', '--output-dir', tmp_path / str(ranks)],
            ranks=ranks, command='detection', output=output))
        assert last_scores(output.read_text()).items() <= line.items()
    for kind in ('box', 'mask'):
        a, b = ((tmp_path / ranks / f'detections_{kind}.json').read_text() for ranks in '12')
        assert a == b


def test_a_killed_run_resumes_with_the_same_bits(shapes, tmp_path):
    flags = [*SMALL, '--data-path', shapes, '--epochs', 3, '--lr-steps', 1, '--weight-decay', 0.1]
    nano.finish(nano.start([*flags, '--output-dir', tmp_path / 'whole'], command='detection'))

    def kill_in_epoch_1(rank):
        steps = itertools.count(1)
        register_optimizer_step_post_hook(lambda *_: next(steps) == 8 and os.kill(os.getpid(), signal.SIGKILL))

    again = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    nano.finish(nano.start(again, command='detection', before=kill_in_epoch_1), status=-signal.SIGKILL)
    assert [line['epoch'] for line in nano.log(tmp_path / 'run')] == [0]
    nano.finish(nano.start(again, command='detection'))
    a, b = nano.read(tmp_path / 'whole'), nano.read(tmp_path / 'run')
    for key in ('model', 'optimizer', 'best'):
        assert nano.same(a[key], b[key]), key
    assert nano.log(tmp_path / 'whole') == nano.log(tmp_path / 'run')


def test_float16_scales_the_loss_and_resumes_its_scale(shapes, tmp_path):
    flags = [*SMALL, '--data-path', shapes, '--amp-dtype', 'float16', '--resume', 'auto', '--output-dir']
    run(*flags, tmp_path / 'whole')
    run(*flags, tmp_path / 'resumed', '--epochs', 1)
    run(*flags, tmp_path / 'resumed')
    whole, resumed = nano.read(tmp_path / 'whole'), nano.read(tmp_path / 'resumed')
    assert resumed['loss_scaler'] == whole['loss_scaler'] and resumed['loss_scaler']['scale'] > 1
    assert nano.same(resumed['model'], whole['model']) and nano.finite(whole['model'])


# data

def write_coco(folder, **changes):
    """Write three images: a crowd and ids with gaps, a box over the border, and no objects at all."""
    for split in ('train2017', 'val2017'):
        (folder / split).mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (40 + i, 30), (i, 9, 9)).save(folder / split / f'{i}.png')
    crowd = np.zeros((30, 40), np.uint8, order='F')
    crowd[2:20, 3:9] = 1
    runs = coco_mask.encode(crowd)
    content = {
        'images': [{'id': 10 + i, 'file_name': f'{i}.png', 'width': 40 + i, 'height': 30} for i in range(3)],
        'categories': [{'id': 7, 'name': 'cat'}, {'id': 90, 'name': 'dog'}],
        'annotations': [
            {'id': 1, 'image_id': 10, 'category_id': 90, 'bbox': [5, 5, 10, 20], 'iscrowd': 0, 'area': 200,
             'segmentation': [[5, 5, 15, 5, 15, 25, 5, 25]]},
            {'id': 2, 'image_id': 10, 'category_id': 7, 'bbox': [3, 2, 6, 18], 'iscrowd': 1, 'area': 108,
             'segmentation': {'size': [30, 40], 'counts': runs['counts'].decode()}},
            {'id': 5, 'image_id': 11, 'category_id': 7, 'bbox': [30, 10, 30, 15], 'area': 450, 'iscrowd': 0,
             'segmentation': [[30, 10, 60, 10, 60, 25, 30, 25]]}],
        **changes}
    (folder / 'annotations').mkdir()
    for split in ('train', 'val'):
        (folder / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(content))
    return folder


def test_crowds_gaps_borders_and_images_without_objects(tmp_path):
    write_coco(tmp_path)
    files = str(tmp_path / 'train2017'), str(tmp_path / 'annotations' / 'instances_train2017.json')
    train, val = (detection.CocoDataset(*files, train, masks=True) for train in (True, False))
    assert train.classes == ['cat', 'dog'] and train.categories == [7, 90]
    first, _, empty = (train[i] for i in range(3))
    assert first[0].shape == (3, 30, 40) and first[1]['labels'].tolist() == [2]  # without the crowd
    assert val[0][1]['labels'].tolist() == [2, 1]
    assert val[0][1]['boxes'].tolist() == [[5, 5, 15, 25], [3, 2, 9, 20]]
    assert val[0][1]['masks'][1].sum() == 18 * 6 and val[0][1]['masks'][1, 2:20, 3:9].all()
    assert val[1][1]['boxes'].tolist() == [[30, 10, 41, 25]]  # of an image of 41 pixels
    assert empty[1]['boxes'].shape == (0, 4) and empty[1]['masks'].shape == (0, 30, 42)
    flips = {tuple(train[0][1]['boxes'][0].tolist()) for _ in range(20)}
    assert flips == {(5, 5, 15, 25), (25, 5, 35, 25)}
    for model in ('retinanet', 'maskrcnn'):
        run(*SMALL, '--model', model, '--data-path', tmp_path, '--output-dir', tmp_path / model)
        boxes = json.loads((tmp_path / model / 'detections_box.json').read_text())
        assert {box['category_id'] for box in boxes} <= {7, 90} and {box['image_id'] for box in boxes} <= {10, 11, 12}


def test_detections_that_are_the_truth_score_100(tmp_path):
    """Crowds do not count."""
    write_coco(tmp_path)
    val = detection.CocoDataset(
        str(tmp_path / 'val2017'), str(tmp_path / 'annotations' / 'instances_val2017.json'), False, masks=True)
    right = [{**a, 'score': 0.9} for a in val.coco.dataset['annotations'] if not a['iscrowd']]
    masks = [{'image_id': a['image_id'], 'category_id': a['category_id'], 'score': 0.9,
              'segmentation': val.coco.annToRLE(a)} for a in right]
    boxes = [{key: a[key] for key in ('image_id', 'category_id', 'score', 'bbox')} for a in right]
    scores = detection.average_precision(val, {'box': boxes, 'mask': masks})
    assert scores['box_ap'] == scores['mask_ap'] == pytest.approx(100) and 'box_ap_large' not in scores
    assert detection.average_precision(val, {'box': []})['box_ap'] == 0
    assert 40 < detection.average_precision(val, {'box': boxes[:1]})['box_ap50'] < 60


# model

def test_weights_of_a_classifier_freeze_batch_norm(tmp_path, shapes):
    torch.manual_seed(1)
    whole = nano.warm(num_classes=5)
    state = {f'model.{name}': value for name, value in whole.state_dict().items()}
    torch.save({'state_dict': state}, tmp_path / 'a.ckpt')
    model = detection.build_detector('retinanet', 4, 'cmt_nano', str(tmp_path / 'a.ckpt'), True, (64, 64))
    body = model.backbone.body.state_dict()
    for name, value in whole.state_dict().items():
        if name.startswith(('stem', 'stages')) and 'num_batches' not in name:
            assert torch.equal(body[name.replace('stages.', 'stages_')], value), name
    norms = [m for m in model.backbone.body.modules() if 'FrozenBatchNorm' in type(m).__name__]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in whole.modules()) - 1  # the head's
    for flags, frozen in ((['--weights', tmp_path / 'a.ckpt'], True), ([], False),
                          (['--weights', tmp_path / 'a.ckpt', '--backbone-bn', 'train'], False)):
        folder = tmp_path / f'{len(flags)}'
        run(*SMALL, '--data-path', shapes, '--epochs', 1, '--output-dir', folder, *flags)
        state = nano.read(folder)['model']
        same = torch.equal(state['backbone.body.stem.norm1.running_mean'], whole.stem.norm1.running_mean)
        assert same == frozen


def test_images_of_any_size_go_through():
    torch.manual_seed(0)
    detector = detection.build_detector(
        'maskrcnn', 4, 'cmt_nano', input_size=(64, 128), fpn_channels=16, anchor_size=16, proposals=20)
    images = [torch.rand(3, 70, 90), torch.rand(3, 90, 70), torch.rand(3, 40, 200)]
    targets = [{'boxes': torch.tensor([[4., 4, 30, 30]]), 'labels': torch.tensor([1]),
                'masks': torch.ones(1, *image.shape[1:], dtype=torch.uint8)} for image in images]
    sum(detector(images, targets).values()).backward()
    assert not [name for name, p in detector.backbone.named_parameters() if p.grad is None]
    outputs = detector.eval()(images)
    for image, output in zip(images, outputs):
        assert (output['boxes'][:, 2] <= image.shape[2]).all() and (output['boxes'][:, 3] <= image.shape[1]).all()
        assert output['masks'].shape[2:] == image.shape[1:]


def test_rates_follow_the_schedule():
    args = detection.parse_args(['--lr-steps', '2', '3', '--warmup-steps', '4', '--epochs', '4'])
    factors = [detection.rate_factor(args, done, 5) for done in range(20)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, *[1.] * 7, *[0.1] * 5, *[0.01] * 5])


# mistakes

def test_mistakes_are_one_line_before_long_work(shapes, tmp_path, monkeypatch):
    def changed(name, **changes):
        return write_coco(tmp_path / name, **changes)

    box = {'id': 1, 'image_id': 10, 'category_id': 7, 'bbox': [1, 1, 5, 5], 'iscrowd': 0, 'area': 25,
           'segmentation': [[1, 1, 6, 1, 6, 6]]}
    (changed('text') / 'annotations' / 'instances_val2017.json').write_text('no JSON')
    (changed('gone') / 'val2017' / '1.png').unlink()
    run(*SMALL, '--data-path', shapes, '--epochs', 1, '--output-dir', tmp_path / 'run')
    last = tmp_path / 'run' / 'checkpoint_last.pth'
    torch.save({'model': nano.small().state_dict()}, tmp_path / 'classifier.pth')
    for flags, words in (
            (['--data-path', tmp_path / 'nowhere'], 'nowhere'),
            (['--data-path', tmp_path / 'text'], 'instances_val2017.json'),
            (['--data-path', tmp_path / 'gone'], '1.png'),
            (['--data-path', changed('stray', annotations=[{**box, 'category_id': 8}])], 'annotation 1'),
            (['--model', 'maskrcnn', '--data-path', changed('bare', annotations=[{**box, 'segmentation': []}])],
             'annotation 1'),
            (['--data-set', 'COCO'], '--data-path'),
            (['--backbone', 'resnet18'], 'resnet18'),
            (['--weights', tmp_path / 'classifier.pth', '--backbone', 'cmt_ti'], 'classifier.pth'),
            (['--resume', tmp_path / 'classifier.pth'], 'classifier.pth.*--weights'),
            (['--resume', last, '--model', 'fasterrcnn'], '--config .*config.yaml'),
            (['--resume', last, '--data-path', changed('two')], 'checkpoint_last.pth.*circle'),
            (['--eval'], '--resume'),
            (['--input-size', 32, 64], '--input-size.*64'),
            (['--output-dir', tmp_path / 'run'], '--resume auto.*--overwrite'),
    ):
        before = {path for path in tmp_path.rglob('*')}
        output = tmp_path / 'out.txt'
        output.write_text('')
        argv = [*SMALL, *([] if '--data-path' in flags or 'COCO' in flags else ['--data-path', shapes]), *flags]
        nano.finish(nano.start(argv, command='detection', output=output), status=2)
        lines = output.read_text().splitlines()
        assert len(lines) == 1 and re.search(f'^detection.py: error: .*{words}', lines[0]), (flags, lines)
        assert {path for path in tmp_path.rglob('*')} == before | {output}

    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    with pytest.raises(errors.UsageError, match='pycocotools'):
        run(*SMALL, '--data-path', shapes)


def test_boxes_without_area_are_left_out_of_samples(tmp_path):
    boxes = [{'id': i, 'image_id': 10, 'category_id': 7, 'bbox': [3, 3, 4, i]} for i in (0, 5)]
    annotations = write_coco(tmp_path, annotations=boxes) / 'annotations' / 'instances_train2017.json'
    data = detection.CocoDataset(str(tmp_path / 'train2017'), str(annotations), True, False, hflip=0)
    assert data[0][1]['boxes'].tolist() == [[3, 3, 7, 8]]


def test_a_nonfinite_loss_stops_and_keeps_the_last_checkpoint(shapes, tmp_path):
    flags = [*SMALL, '--data-path', shapes, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    nano.finish(nano.start([*flags, '--epochs', 1], command='detection'))
    output = tmp_path / 'out.txt'
    nano.finish(nano.start([*flags, '--lr', 1e30, '--clip-grad', 0], command='detection', output=output),
                status=1)
    assert 'detection.py: error: ' in output.read_text() and 'Traceback' not in output.read_text()
    assert [line['epoch'] for line in nano.log(tmp_path / 'run')] == [0]
    assert nano.finite(nano.read(tmp_path / 'run')['model'])


@pytest.mark.soak
def test_shapes_are_learnt(tmp_path):
    """Seven to fifteen CPU-minutes."""
    run('--data-set', 'SHAPES', '--data-path', tmp_path / 'data', '--output-dir', tmp_path / 'run',
        '--device', 'cpu', '--num-workers', 0)
    assert nano.log(tmp_path / 'run')[-1]['box_ap50'] > 70
