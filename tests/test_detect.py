"""scripts/detect_demo.py: both detectors train and infer at sizes of their own; what is drawn and measured is right."""
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.models import register_model

import cmt
import detect_demo

DETECTORS = ('retinanet', 'maskrcnn')


@register_model
def cmt_pico(pretrained: bool = False, **kwargs) -> cmt.CMT:
    model_args = dict(
        stem_chs=4, embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratios=(2,) * 4,
        num_features=32)
    return cmt._create_cmt('cmt_ti', pretrained, model_args, **kwargs)


def small(detector, backbone='cmt_pico', **kwargs):
    torch.manual_seed(0)
    if detector == 'maskrcnn':  # a hundredth of the work
        kwargs.update(rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=50, box_batch_size_per_image=32,
                      box_detections_per_img=8)
    return detect_demo.build_detector(
        detector, backbone, 4, out_channels=16, anchor_size=16, min_size=64, max_size=128, **kwargs)


def batch(count, height, width):
    rng = np.random.default_rng(0)
    return map(list, zip(*[detect_demo.draw_shapes(rng, height, width) for _ in range(count)]))


@pytest.mark.parametrize('detector', DETECTORS)
def test_trains_and_infers_at_two_sizes(detector):
    model = small(detector, img_size=(64, 96)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(8):
        images, targets = batch(2, *((64, 96) if step % 2 else (96, 64)))
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.05
    unused = [name for name, p in model.backbone.body.named_parameters() if p.grad is None]
    assert not unused
    model.eval()
    for size in ((64, 96), (96, 64)):
        images, _ = batch(2, *size)
        outputs = model(images)
        maps = model.backbone(torch.randn(1, 3, *size))
        first = 8 if detector == 'retinanet' else 4
        assert maps['0' if detector != 'retinanet' else '1'].shape == (1, 16, size[0] // first, size[1] // first)
        for output in outputs:
            assert (output['boxes'][:, 2] <= size[1]).all() and (output['boxes'][:, 3] <= size[0]).all()
            assert detector != 'maskrcnn' or output['masks'].shape[2:] == size
    model.transform.max_size = 200  # padded to multiples of 32 on the way
    assert len(model([torch.rand(3, 70, 90), torch.rand(3, 90, 70)])) == 2


def test_batch_norm_of_the_backbone(tmp_path):
    """Frozen with a checkpoint, its statistics stay; without one they follow the batches."""
    torch.manual_seed(1)
    whole = timm.create_model('cmt_pico', img_size=64, num_classes=5)
    torch.save({'model': whole.state_dict(), 'args': {'model': 'cmt_pico'}}, tmp_path / 'a.pth')
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
    """Two objects; found: right at 0.9, wrong 0.8, again 0.7, right 0.6: precision 1 and 2/4 at recall 1/2, 1."""
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
        '--model', detector, '--backbone', 'cmt_pico', '--steps', str(steps), '--batch-size', '2', '--input-size', '64',
        '96', '--eval-every', '2', '--eval-images', '2', '--output', str(picture)])
    said = capsys.readouterr().out.splitlines()
    assert len(history) == lines and len(said) == lines + 1 and ('mask AP50' in said[0]) == (detector == 'maskrcnn')
    assert Image.open(picture).size == (12 + 2 * (2 * 96 + 12), 12 + 2 * 64 + 12)
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize('argv, reason', [
    (['--backbone', 'cmt_huge'], '--backbone: unknown model cmt_huge'),
    (['--backbone', 'resnet18'], '--backbone: resnet18 is no CMT'),
    (['--backbone', 'vit_tiny_patch16_224'], '--backbone: vit_tiny_patch16_224 is no CMT'),
    (['--backbone', 'cmt_ti.in22k'], '--backbone: cmt_ti.in22k: Invalid pretrained tag'),
    (['--steps', '0'], '--steps: 0 is not at least 1'),
    (['--eval-images', '-1'], '--eval-images: -1 is not at least 1'),
    (['--lr', '-1'], '--lr: -1 is not above 0'),
    (['--lr', 'nan'], '--lr: nan is not above 0'),
    (['--seed', '-1'], '--seed: -1 is not at least 0'),
    (['--output', 'gone/a.png'], "'gone/a.png' cannot be written"),
    (['--output', 'folder.png'], "'folder.png' cannot be written"),
    (['--output', '/proc/a.png'], "'/proc/a.png' cannot be written"),
    (['--input-size', '32'], '--input-size: 32 is not at least 64'),
    (['--input-size', '64', '64', '64'], '--input-size takes one number'),
    (['--input-size', '32000000'], 'sizes'),  # of a position bias: more than an integer counts
    (['--checkpoint', 'gone.pth'], 'gone.pth'),
])
def test_mistakes(argv, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / 'folder.png').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        detect_demo.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith('detect_demo.py: error: ') and reason in said
    assert said.count('\n') == 1 and list(tmp_path.iterdir()) == [tmp_path / 'folder.png']


@pytest.mark.soak
@pytest.mark.parametrize('detector', DETECTORS)
def test_cmt_ti_at_256_by_320(detector):
    model = detect_demo.build_detector(detector, 'cmt_ti', 4, img_size=(256, 320), min_size=256, max_size=320).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    losses = []
    for step in range(20):
        loss = sum(model(*batch(2, *((256, 320) if step % 2 else (320, 256)))).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-4:]) < np.mean(losses[:4])
    model.eval()
    for size in ((256, 320), (320, 256)):
        with torch.no_grad():
            output = model([torch.rand(3, *size)])[0]
        assert output['boxes'].shape[1] == 4


def test_one_answer_an_object_is_drawn():
    image = torch.zeros(3, 32, 32)
    boxes = torch.tensor([[8., 16, 24, 30], [8, 16, 24, 29], [2, 2, 6, 6]])
    output = {'boxes': boxes, 'labels': torch.tensor([1, 2, 3]), 'scores': torch.tensor([0.5, 0.9, 0.2])}
    sheet = detect_demo.draw_detections([image], [output], [{'boxes': torch.zeros(0, 4)}])
    colors = {color for _, color in sheet.getcolors(1 << 16)}
    assert [color in colors for color in detect_demo.COLORS] == [False, True, False]
