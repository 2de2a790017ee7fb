"""scripts/detect_demo.py: both detectors train and infer at several sizes; drawings, targets and AP are right."""
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image

import detect_demo
import nano  # noqa: F401


def small(detector, backbone='cmt_nano', **kwargs):
    torch.manual_seed(0)
    if detector == 'maskrcnn':  # a hundredth of the work
        kwargs.update(rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=50, box_batch_size_per_image=32,
                      box_detections_per_img=8)
    return detect_demo.build_detector(
        detector, backbone, 4, out_channels=16, anchor_size=16, **{'min_size': 64, 'max_size': 128, **kwargs})


def batch(count, height, width):
    rng = np.random.default_rng(0)
    return map(list, zip(*[detect_demo.draw_shapes(rng, height, width) for _ in range(count)]))


@pytest.mark.parametrize('backbone, size', [
    ('cmt_nano', (64, 96)), pytest.param('cmt_ti', (256, 320), marks=pytest.mark.soak)])
@pytest.mark.parametrize('detector', ['retinanet', 'maskrcnn'])
def test_trains_and_infers_at_two_sizes(detector, backbone, size):
    sizes = (size, size[::-1])
    model = small(detector, backbone, img_size=size, min_size=size[0], max_size=2 * size[0]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(8):
        loss = sum(model(*batch(2, *sizes[step % 2])).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.05
    unused = [name for name, p in model.backbone.body.named_parameters() if p.grad is None]
    assert not unused
    model.eval()
    for size in sizes:
        images, _ = batch(2, *size)
        outputs = model(images)
        maps = model.backbone(torch.randn(1, 3, *size))
        first = 8 if detector == 'retinanet' else 4
        assert maps['0' if detector != 'retinanet' else '1'].shape == (1, 16, size[0] // first, size[1] // first)
        for output in outputs:
            assert (output['boxes'][:, 2] <= size[1]).all() and (output['boxes'][:, 3] <= size[0]).all()
            assert detector != 'maskrcnn' or output['masks'].shape[2:] == size
    model.transform.max_size *= 2  # sizes that are padded to multiples of 32
    assert len(model([torch.rand(3, 70, 90), torch.rand(3, 90, 70)])) == 2


def test_batch_norm_of_the_backbone(tmp_path):
    """Statistics stay with a checkpoint, which freezes them, and follow the batches without a checkpoint."""
    torch.manual_seed(1)
    whole = timm.create_model('cmt_nano', img_size=64, num_classes=5)
    torch.save({'model': whole.state_dict(), 'args': {'model': 'cmt_nano'}}, tmp_path / 'a.pth')
    for checkpoint, frozen in ((str(tmp_path / 'a.pth'), True), (None, False)):
        model = small('retinanet', checkpoint=checkpoint).train()
        norms = [m for m in model.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [m.running_var.clone() for m in norms]
        model(*batch(2, 64, 96))
        assert all(torch.equal(m.running_var, b) == frozen for m, b in zip(norms, before))
        assert all(m.weight.requires_grad for m in norms)
        if checkpoint:
            own = model.backbone.body.state_dict()
            for name, value in whole.state_dict().items():
                if name.startswith(('stem', 'stages')) and 'num_batches' not in name:
                    assert torch.equal(own[name.replace('stages.', 'stages_')], value), name
    assert not small('retinanet', checkpoint=str(tmp_path / 'a.pth'), frozen_bn=False).backbone.frozen_bn


def test_shapes_and_their_targets():
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(50):
        image, target = detect_demo.draw_shapes(rng, 64, 96)
        assert image.shape == (3, 64, 96) and 0 <= image.min() and image.max() <= 1
        assert 1 <= len(target['boxes']) <= 4 and target['masks'].shape == (len(target['labels']), 64, 96)
        assert target['masks'].sum(0).max() == 1
        for box, mask in zip(target['boxes'].int(), target['masks']):
            rows, columns = torch.where(mask)
            assert box[1] == rows.min() and box[3] >= rows.max() and box[0] == columns.min()
            assert (box[2:] > box[:2] + 2).all() and image[:, mask.bool()].std(dim=1).max() < 0.1  # one colour
        seen |= set(target['labels'].tolist())
    assert seen == {1, 2, 3}


def test_average_precision_by_hand():
    """Two objects, detections right at 0.9, wrong 0.8, double 0.7, right 0.6: precision 1, 2/4 at recall 1/2, 1."""
    targets = [{'boxes': torch.tensor([[0., 0, 10, 10], [20, 20, 30, 30]]), 'labels': torch.tensor([1, 1])}]
    boxes = torch.tensor([[0., 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 9], [20, 20, 30, 29]])
    outputs = [{'boxes': boxes, 'labels': torch.tensor([1, 1, 1, 1]), 'scores': torch.tensor([.9, .8, .7, .6])}]
    assert detect_demo.average_precision(outputs, targets) == pytest.approx((1 + 0.5) / 2)
    assert detect_demo.average_precision(outputs, targets, threshold=0.95) == pytest.approx(0.5)
    outputs[0]['labels'] = torch.tensor([2, 1, 2, 1])
    assert detect_demo.average_precision(outputs, targets) == pytest.approx(0.25)  # 1 of 2, at precision 1/2
    targets[0]['labels'] = torch.tensor([2, 1])
    assert detect_demo.average_precision(outputs, targets) == pytest.approx((1 + 0.5) / 2)  # mean over two classes
    none = [{'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0).long(), 'scores': torch.zeros(0)}]
    assert detect_demo.average_precision(none, targets) == 0
    masks = torch.zeros(2, 64, 64)
    masks[0, :10, :10] = masks[1, 20:30, 20:30] = 1
    targets[0]['masks'] = masks
    outputs[0]['masks'] = torch.stack([masks[0], masks[0], masks[1], masks[1]])[:, None]
    assert detect_demo.average_precision(outputs, targets, masks=True) == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize('detector, steps, lines', [('retinanet', 3, 2), ('maskrcnn', 1, 1)])
def test_demo(detector, steps, lines, tmp_path, capsys):
    picture = tmp_path / 'shapes.png'
    history = detect_demo.main([
        '--model', detector, '--backbone', 'cmt_nano', '--steps', str(steps), '--batch-size', '2', '--input-size', '64',
        '96', '--eval-every', '2', '--eval-images', '2', '--output', str(picture)])
    said = capsys.readouterr().out.splitlines()
    assert len(history) == lines and len(said) == lines + 1 and ('mask AP50' in said[0]) == (detector == 'maskrcnn')
    assert Image.open(picture).size == (12 + 2 * (3 * 96 + 12), 12 + 3 * 64 + 12)
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize('argv, reason', [
    (['--backbone', 'cmt_huge'], '--backbone: unknown model cmt_huge'),
    (['--backbone', 'resnet18'], '--backbone: resnet18 is no CMT'),
    (['--steps', '0'], '--steps: 0 is not at least 1'),
    (['--lr', '-1'], '--lr: -1 is not above 0'),
    (['--output', 'gone/a.png'], "'gone/a.png' cannot be written"),
    (['--output', 'folder.png'], "'folder.png' cannot be written"),
    (['--input-size', '32'], '--input-size: 32 is not at least 64'),
    (['--input-size', '64', '64', '64'], '--input-size needs one number'),
    (['--input-size', '32000000'], 'sizes'),  # of a position bias overflow an integer
    (['--checkpoint', 'gone.pth'], 'gone.pth'),
])
def test_mistakes(argv, reason, tmp_path, mistake):
    (tmp_path / 'folder.png').mkdir()
    assert reason in mistake(detect_demo, *argv)


def test_of_overlapping_boxes_one_is_drawn():
    image = torch.zeros(3, 32, 32)
    boxes = torch.tensor([[8., 16, 24, 30], [8, 16, 24, 29], [2, 2, 6, 6]])
    output = {'boxes': boxes, 'labels': torch.tensor([1, 2, 3]), 'scores': torch.tensor([0.5, 0.9, 0.2]),
              'masks': torch.zeros(3, 1, 32, 32)}
    output['masks'][:, 0, 28, 12:20] = 1
    sheet = detect_demo.draw_detections([image], [output], [{'boxes': torch.tensor([[2., 2, 6, 6]])}])
    colors = {color for _, color in sheet.getcolors(1 << 16)}
    assert [color in colors for color in detect_demo.COLORS] == [False, True, False]
    assert (0xdd,) * 3 in colors  # the target
    assert sheet.getpixel((48, 85)) == pytest.approx([0.55 * c for c in detect_demo.COLORS[1]], abs=1)  # the mask
