"""python scripts/detection.py --output-dir output/shapes

Train and evaluate torchvision's RetinaNet, Faster R-CNN or Mask R-CNN on CMT with FPN, on data in COCO's format.
Without other flags, train RetinaNet on CMT-Ti, on drawn circles, squares and triangles, in minutes on a CPU.

    torchrun --nproc-per-node 8 scripts/detection.py --config configs/retinanet.yaml --data-path coco --output-dir out
    python scripts/detection.py --config out/config.yaml --eval --resume out/checkpoint_best.pth

The folder of --data-path contains annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/
and val2017/, like COCO; --train-json and similar flags give other names. Needs pycocotools.
"""
import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _path  # noqa: F401, puts the repository on sys.path
import options
from errors import TrainingFault, UsageError
from options import count, fraction, in_range, non_negative, path, positive, positive_float

# Defaults that depend on the data set. COCO's 1x schedule is for 16 images per step.
DEFAULTS = {
    'SHAPES': dict(data_path='data/shapes', backbone='cmt_ti', lr=2e-3, weight_decay=0.05, batch_size=8,
                   warmup_steps=50, fpn_channels=64, anchor_size=16, proposals=32, input_size=[128, 128]),
    'COCO': dict(backbone='cmt_s', lr=1e-4, weight_decay=1e-4, batch_size=2, warmup_steps=500, fpn_channels=256,
                 anchor_size=32, proposals=1000),
}


def get_args_parser() -> options.Parser:
    parser = options.Parser(prog='detection.py', description=__doc__.split('\n', 2)[2], allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_run_flags(parser, seed=0, num_workers=2)
    add = parser.add_argument
    add('--data-set', choices=tuple(DEFAULTS), help='COCO for any data in the COCO format; SHAPES first draws '
        'shapes into --data-path (default: COCO with --data-path, else SHAPES)')
    add('--data-path', type=path, help='folder with annotations/, train2017/ and val2017/')
    for split in ('train', 'val'):
        add(f'--{split}-json', type=path, metavar='FILE', help=f'annotations instead of instances_{split}2017.json')
        add(f'--{split}-images', type=path, metavar='FOLDER', help=f'images instead of {split}2017/')
    add('--model', choices=('retinanet', 'fasterrcnn', 'maskrcnn'), default='retinanet')
    add('--backbone', help='name of a CMT (default: cmt_s, for SHAPES cmt_ti)')
    add('--weights', type=path, metavar='FILE|NAME', help='classification weights of the backbone (default: random)')
    add('--backbone-bn', choices=('train', 'frozen'),
        help='mode of BatchNorm in the backbone (default: frozen with --weights, else train)')
    add('--hflip', type=fraction, default=0.5, help='probability of a horizontal flip')
    add('--drop-path', type=fraction, default=0.1, help='drop-path rate of the last block')
    add('--fpn-channels', type=positive, help='width of the pyramid, a multiple of 8 (default: 256, for SHAPES 64)')
    add('--anchor-size', type=positive, help='side of the smallest anchors in pixels (default: 32, for SHAPES 16)')
    add('--proposals', type=positive, help='regions per image for the second stage (default: 1000, for SHAPES 32)')
    add('--input-size', type=in_range(int, 64), nargs=2, metavar=('SHORT', 'LONG'),
        help='images are resized to this short side, or to the long side if that is less (default: 800 1333; on a CPU '
        '256 427; for SHAPES 128 128)')
    add('--epochs', type=positive, default=12)
    add('--lr-steps', type=count, nargs='*', default=[8, 11], help='epochs after which the rate drops to a tenth')
    add('--warmup-steps', type=count, help='steps of the linear warm-up (default: 500, for SHAPES 50)')
    add('--batch-size', type=positive, help='images per batch and process (default: 2, for SHAPES 8)')
    add('--lr', type=positive_float, help='learning rate of AdamW for a global batch of 16 images, scaled linearly '
        '(default: 1e-4, for SHAPES 2e-3)')
    add('--weight-decay', type=non_negative, help='decay of all but biases and norms (default: 1e-4, for SHAPES 0.05)')
    add('--clip-grad', type=non_negative, default=1., help='maximum gradient norm; 0 for no clipping')
    add('--eval-every', type=positive, default=1, metavar='EPOCHS', help='epochs between two evaluations')
    return options.add_defaults(parser)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags, check them, and fill in the defaults of the data set."""
    parser = get_args_parser()
    args, _ = options.parse_flags(parser, argv)
    has_files = args.data_path or args.train_json or args.val_json
    args.data_set = args.data_set or ('COCO' if has_files else 'SHAPES')
    for name, value in DEFAULTS[args.data_set].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data_set == 'COCO' and not has_files:
        parser.error('--data-path is missing: give the folder that contains annotations/, train2017/ and val2017/')
    if args.fpn_channels % 8:
        parser.error(f'--fpn-channels {args.fpn_channels} is not a multiple of 8')
    options.make_paths_absolute(args)
    return args


if __name__ == '__main__':
    ARGS = parse_args()  # Parse first, so that --help and mistakes do not wait for the imports below.

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw
from timm.layers import freeze_batch_norm_2d, set_fast_norm
from timm.models import FeatureListNet
from timm.optim import create_optimizer_v2
from timm.utils import distribute_bn, random_seed
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_convert
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import processes
import utils
from checkpoints import LAST, class_names
from loader import build_loader
from optim import load_optimizer
from precision import NativeScaler, autocast_to, configure_cuda, load_scaler, resolve_dtype
from processes import usage_errors
from run import RunWriter, check_written, find_checkpoint, open_run, setup_process
from samplers import TrainSampler
from sources import open_image
from system import atomic_write, write_file
from utils import Progress
from weights import build_model, create_cmt, read_weights

logger = logging.getLogger(__name__)

METRICS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')  # the first six of COCOeval.stats
SCORE_THRESHOLD = 0.4  # Detections with a lower score are not drawn.


# The model

def build_detector(
        detector: str, num_classes: int, backbone: str = 'cmt_ti', weights: str | None = None, frozen_bn: bool = False,
        input_size: tuple[int, int] = (800, 1333), drop_path: float = 0.1, fpn_channels: int = 256,
        anchor_size: int = 32, proposals: int = 1000) -> nn.Module:
    """Build one of torchvision's detectors on a CMT.

    Args:
        detector: 'retinanet', 'fasterrcnn' or 'maskrcnn', of `num_classes` classes including the background.
        backbone, weights: name of the CMT; file or name with its weights (the EMA if there is one), or None.
        frozen_bn: freeze BatchNorm of the backbone, for small batches.
        input_size: short side that images are resized to, and the largest long side (pixels).
        fpn_channels, anchor_size, proposals: as the flags; each level doubles the side of the anchors.

    Raises:
        UsageError: the backbone does not exist, or the weights do not fit it.
    """
    short, long = input_size
    # Size the position bias for a typical landscape image. For other images, each forward pass resamples the bias.
    bias_size = tuple(math.ceil(side / 32) * 32 for side in (short, min(long, short * 4 / 3)))
    settings = dict(dynamic_img_size=True, img_size=bias_size, drop_path_rate=drop_path)
    cmt = create_cmt(backbone, **settings) if weights is None else build_model(
        read_weights(weights, use_ema=True), backbone, **settings)
    body = FeatureListNet(cmt.train(), out_indices=(0, 1, 2, 3), flatten_sequential=True)
    if frozen_bn:
        body = freeze_batch_norm_2d(body)
    levels = (1, 2, 3) if detector == 'retinanet' else (0, 1, 2, 3)  # The pyramid starts at stride 8 or 4.
    neck = BackboneWithFPN(
        body, {f'stages_{level}': str(level) for level in levels},
        [body.feature_info.channels()[level] for level in levels], fpn_channels,
        LastLevelP6P7(fpn_channels, fpn_channels) if detector == 'retinanet' else None)
    # torchvision's transform pads images to multiples of 32, as CMT needs.
    common = dict(min_size=short, max_size=long)
    if detector == 'retinanet':
        sizes = tuple(tuple(int(anchor_size * 2 ** (i + j / 3)) for j in range(3)) for i in range(5))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        # Use GroupNorm as retinanet_resnet50_fpn_v2 does. Without norms, the head hardly learns from scratch.
        head = RetinaNetHead(fpn_channels, anchors.num_anchors_per_location()[0], num_classes,
                             norm_layer=functools.partial(nn.GroupNorm, fpn_channels // 8))
        model = RetinaNet(neck, num_classes, anchor_generator=anchors, head=head, **common)
    else:
        anchors = AnchorGenerator(tuple((anchor_size * 2 ** i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
        model = {'fasterrcnn': FasterRCNN, 'maskrcnn': MaskRCNN}[detector](
            neck, num_classes, rpn_anchor_generator=anchors, rpn_post_nms_top_n_train=2 * proposals,
            rpn_post_nms_top_n_test=proposals, box_batch_size_per_image=min(512, proposals), **common)
    if detector == 'maskrcnn':  # Replace torchvision's mask head, which always has 256 channels.
        model.roi_heads.mask_head = MaskRCNNHeads(fpn_channels, (fpn_channels,) * 4, 1)
        model.roi_heads.mask_predictor = MaskRCNNPredictor(fpn_channels, fpn_channels, num_classes)
    return model


# The data

class CocoDataset(CocoDetection):
    """Read a data set in COCO's format for torchvision's detectors, with labels 1 to K for any category ids.

    Args:
        images, annotations: folder of the images, and the JSON file.
        train, hflip: flip images with probability `hflip`, and drop crowds.
        masks: read masks too.

    Boxes with a side below one pixel are left out of samples. The evaluation counts them, as pycocotools does.

    Raises:
        UsageError: an image is missing, the JSON is not in COCO's format, or objects lack masks.
        OSError: the JSON file does not exist.
    """

    def __init__(self, images: str, annotations: str, train: bool, masks: bool, hflip: float = 0.5):
        self.masks = masks
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                super().__init__(images, annotations)
            except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
                raise UsageError(f'{annotations} is not a JSON file in COCO\'s format') from None
            check_annotations(self.coco, annotations, Path(images), masks)
            objects = self.coco.dataset['annotations']
            self.coco.dataset['annotations'] = [a for a in objects if not (train and a['iscrowd'])]
            self.coco.createIndex()
        self.categories = sorted(self.coco.cats)  # COCO's ids have gaps, but labels must not.
        self.classes = [self.coco.cats[category]['name'] for category in self.categories]
        self.samples = [(str(Path(images) / self.coco.imgs[i]['file_name']), i) for i in self.ids]
        self.transform = v2.Compose([
            v2.ToImage(), v2.RandomHorizontalFlip(hflip if train else 0), v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes()])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return an image (3, H, W), uint8, and boxes (N, 4), labels (N,) and masks (N, H, W) of its objects."""
        # COCO's boxes refer to the stored pixels, without EXIF rotation.
        image = open_image(Path(self.samples[index][0]).read_bytes(), ignore_exif=True)
        size, objects = image.size[::-1], self.coco.imgToAnns[self.ids[index]]
        boxes = box_convert(torch.tensor([a['bbox'] for a in objects], dtype=torch.float32).view(-1, 4), 'xywh', 'xyxy')
        labels = [self.categories.index(a['category_id']) + 1 for a in objects]
        target = {'boxes': tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size),
                  'labels': torch.tensor(labels, dtype=torch.int64)}
        if self.masks:
            masks = np.stack([self.coco.annToMask(a) for a in objects]) if objects else np.zeros((0, *size), np.uint8)
            target['masks'] = tv_tensors.Mask(torch.from_numpy(masks))
        return self.transform(image, target)


def check_annotations(coco: Any, name: str, images: Path, masks: bool) -> None:
    """Check what the evaluation and the detectors need; arguments and errors are those of CocoDataset."""
    if not (coco.imgs and coco.cats and 'annotations' in coco.dataset):
        raise UsageError(f'{name} is not a JSON file in COCO\'s format: it needs images, annotations and categories')
    if not all('file_name' in i for i in coco.imgs.values()) or not all('name' in c for c in coco.cats.values()):
        raise UsageError(f'{name}: each image needs a file_name, and each category a name')
    missing = [image['file_name'] for image in coco.imgs.values() if not (images / image['file_name']).is_file()]
    if missing:
        raise UsageError(f'{images} lacks {len(missing)} of the {len(coco.imgs)} images of {name}: {missing[0]}'
                         + ', ...' * (len(missing) > 1))
    for a in coco.dataset['annotations']:
        if len(a.get('bbox') or ()) != 4 or a['image_id'] not in coco.imgs or a['category_id'] not in coco.cats:
            raise UsageError(f'{name}: annotation {a["id"]} needs an image_id and a category_id of the file, and a '
                             'bbox of x, y, width and height')
        if masks and not a.get('segmentation'):
            raise UsageError(f'{name}: annotation {a["id"]} has no segmentation, and Mask R-CNN needs one')
        a.setdefault('iscrowd', 0)  # Add two keys that pycocotools needs.
        a.setdefault('area', a['bbox'][2] * a['bbox'][3])


def write_shapes(folder: Path, train: int = 320, val: int = 64, size: int = 128, seed: int = 0) -> None:
    """Write a COCO folder of drawn circles, squares and triangles on noise, unless it exists."""
    if (folder / 'annotations' / 'instances_val2017.json').is_file():  # This is the last file to be written.
        return
    rng = np.random.default_rng(seed)
    categories = [{'id': i, 'name': name} for i, name in enumerate(('circle', 'square', 'triangle'), 1)]
    for split, length in (('train2017', train), ('val2017', val)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in range(length):
            image, shapes = draw_shapes(rng, size)
            file = f'{i:06d}.jpg'
            image.save(folder / split / file, quality=95)
            images.append({'id': i, 'file_name': file, 'height': size, 'width': size})
            for shape in shapes:
                annotations.append({'id': len(annotations) + 1, 'image_id': i, 'iscrowd': 0, **shape})
        content = {'images': images, 'annotations': annotations, 'categories': categories}
        (folder / 'annotations').mkdir(exist_ok=True)
        write_file(folder / 'annotations' / f'instances_{split}.json', json.dumps(content).encode())


def draw_shapes(rng: np.random.Generator, size: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw one to four shapes that do not overlap; return the image and COCO's annotations."""
    noise = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).point(lambda v: 40 + v // 4)
    shapes, taken = [], []
    for _ in range(rng.integers(1, 5)):
        radius = int(rng.integers(size // 9, size // 5 + 1))
        x, y = (int(rng.integers(radius, size - radius)) for _ in range(2))
        category = int(rng.integers(1, 4))
        sides = (32, 4, 3)[category - 1]
        turn = (math.pi / 4 if category == 2 else -math.pi / 2) + rng.uniform(-0.3, 0.3)
        color = tuple(rng.integers(120, 256, 3).tolist())
        if any(max(abs(x - a), abs(y - b)) <= radius + r for a, b, r in taken):
            continue
        taken.append((x, y, radius))
        corners = [(x + radius * math.cos(a), y + radius * math.sin(a))
                   for a in turn + np.arange(sides) * 2 * math.pi / sides]
        ImageDraw.Draw(image).polygon(corners, color)
        left, top, right, bottom = (f(side) for f in (min, max) for side in zip(*corners))
        width, height = right - left, bottom - top
        area = abs(sum(a * d - b * c for (a, b), (c, d) in zip(corners, corners[1:] + corners[:1]))) / 2
        shapes.append({'category_id': category, 'bbox': [left, top, width, height], 'area': area,
                       'segmentation': [[side for corner in corners for side in corner]]})
    return image, shapes


def collate(samples: list[tuple]) -> tuple:
    """Collate samples into a list of images and a list of targets, since images differ in size."""
    return tuple(map(list, zip(*samples)))


def build_data(args: argparse.Namespace) -> tuple[CocoDataset | None, CocoDataset]:
    """Build the training set, None with --eval, and the validation set."""
    folder, masks = Path(args.data_path or ''), args.model == 'maskrcnn'
    if args.data_set == 'SHAPES':
        with processes.first_on_each_node():
            write_shapes(folder)

    def open_annotations(split: str) -> CocoDataset:
        return CocoDataset(
            getattr(args, f'{split}_images') or str(folder / f'{split}2017'),
            getattr(args, f'{split}_json') or str(folder / 'annotations' / f'instances_{split}2017.json'),
            split == 'train', masks, args.hflip)

    val, train = open_annotations('val'), None if args.eval else open_annotations('train')
    if train is not None and train.classes != val.classes:
        raise UsageError('the training and validation annotations have different categories: '
                         f'{", ".join(train.classes[:3])}, ... and {", ".join(val.classes[:3])}, ...')
    return train, val


# Evaluation

@torch.inference_mode()
def detect(
        model: nn.Module, loader: DataLoader, data: CocoDataset, device: torch.device,
        autocast: Callable) -> dict[str, list]:
    """Return the detections of all ranks as COCO's results, {'box': [...]} and also 'mask' for Mask R-CNN.

    Each batch is one image. In a larger batch, images would be padded to a common size and the position bias resampled
    to it, so detections would depend on the other images.
    """
    from pycocotools import mask as coco_mask
    model.eval()
    image_ids = iter(data.ids[processes.get_rank()::processes.get_world_size()])
    results: dict[str, list] = {'box': [], 'mask': []} if data.masks else {'box': []}
    with contextlib.closing(Progress('test', len(loader), enabled=processes.get_rank() == 0)) as progress:
        for images, _ in loader:
            with autocast():
                output = model([image.to(device).float() / 255 for image in images])[0]
            output, image_id = {key: value.cpu() for key, value in output.items()}, next(image_ids)
            objects = [{'image_id': image_id, 'category_id': data.categories[label - 1], 'score': score}
                       for label, score in zip(output['labels'].tolist(), output['scores'].tolist())]
            boxes = box_convert(output['boxes'].float(), 'xyxy', 'xywh').tolist()
            results['box'] += [{**one, 'bbox': box} for one, box in zip(objects, boxes)]
            for one, mask in zip(objects, output['masks'][:, 0] > 0.5 if data.masks else ()):
                code = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
                code['counts'] = code['counts'].decode()
                results['mask'].append({**one, 'segmentation': code})
            progress.step()
    gathered = processes.gather_from_ranks(results)
    return {kind: sorted((one for rank in gathered for one in rank[kind]), key=lambda one: one['image_id'])
            for kind in results}


def average_precision(data: CocoDataset, results: dict[str, list]) -> dict[str, float]:
    """Log and return COCOeval's metrics in percent, as box_ap, mask_ap50 and so on, for the sizes that have objects."""
    from pycocotools.cocoeval import COCOeval
    scores = {}
    for kind, detections in results.items():
        stats = np.zeros(6)
        if detections:  # loadRes fails on an empty list.
            with contextlib.redirect_stdout(io.StringIO()):
                truth = copy.deepcopy(data.coco)  # Copy, since COCOeval replaces the masks.
                loaded = truth.loadRes(copy.deepcopy(detections))  # loadRes changes its argument.
                evaluation = COCOeval(truth, loaded, {'box': 'bbox', 'mask': 'segm'}[kind])
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                stats = evaluation.stats
        figures = {name: 100 * float(value) for name, value in zip(METRICS, stats) if value >= 0}
        line = '  '.join(f'{name.upper().replace("_", " ")} {value:.2f}' for name, value in figures.items())
        logger.info('* %s %s', kind, line)
        scores.update({f'{kind}_{name}': value for name, value in figures.items()})
    logger.info(json.dumps(scores))  # Log all digits too.
    return scores


@torch.inference_mode()
def draw(model: nn.Module, data: CocoDataset, device: torch.device, images: int = 4, side: int = 320) -> Image.Image:
    """Draw the first images of `data` in pairs, with the truth on the left and detections on the right."""
    model.eval()
    hues = [f'hsv({round(222.48 * i) % 360}, 80%, 80%)' for i in range(len(data.classes))]
    resize, cells = v2.Resize(None, max_size=side), []
    for image, target in (data[i] for i in range(min(images, len(data)))):
        output = model([image.to(device).float() / 255])[0]
        found = {key: value[output['scores'] > SCORE_THRESHOLD].cpu() for key, value in output.items()}
        found['boxes'] = tv_tensors.wrap(found['boxes'], like=target['boxes'])
        if 'masks' in found:
            found['masks'] = tv_tensors.Mask(found['masks'][:, 0] > 0.5)
        for cell, objects in resize(image, target), resize(image, found):
            labels = [label - 1 for label in objects['labels'].tolist()]
            if labels:
                colors, names = [hues[label] for label in labels], [data.classes[label] for label in labels]
                if 'scores' in objects:
                    names = [f'{name} {score:.2f}' for name, score in zip(names, objects['scores'].tolist())]
                if 'masks' in objects:
                    cell = draw_segmentation_masks(cell, objects['masks'].bool(), 0.5, colors)
                cell = draw_bounding_boxes(cell, objects['boxes'], names, colors, width=2, label_colors='white',
                                           fill_labels=True)
            cells.append(v2.functional.pad(cell, [0, 0, side - cell.shape[2], side - cell.shape[1]], fill=255))
    return to_pil_image(make_grid(cells, 4, padding=6, pad_value=255))


# Training

def rate_factor(args: argparse.Namespace, done: int, updates: int) -> float:
    """Return the learning-rate factor after `done` steps: linear warm-up, then a tenth after each of --lr-steps."""
    passed = sum(done >= epoch * updates for epoch in args.lr_steps)
    return min(1., (done + 1) / max(args.warmup_steps, 1)) * 0.1 ** passed


def train_epoch(
        args: argparse.Namespace, model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer,
        rate: float, epoch: int, device: torch.device, autocast: Callable, scaler: NativeScaler) -> dict[str, float]:
    """Train for one epoch, with the learning rate `rate` scaled by the schedule; return means for log.txt.

    Raises:
        TrainingFault: on all ranks, if a loss is not finite, or if gradients overflow under any loss scale.
    """
    model.train()
    sums, images, began, is_cuda = Counter(), 0, time.monotonic(), device.type == 'cuda'
    progress = Progress(f'epoch {epoch}/{args.epochs - 1}', len(loader), every=args.print_freq,
                        enabled=processes.get_rank() == 0)
    for step, (batch, targets) in enumerate(loader):
        entropy = np.random.SeedSequence((args.seed, epoch, step, processes.get_rank()))
        random_seed(int(entropy.generate_state(1)[0]))
        lr = rate * rate_factor(args, epoch * len(loader) + step, len(loader))
        for group in optimizer.param_groups:
            group['lr'] = lr
        batch = [image.to(device, non_blocking=is_cuda).float() / 255 for image in batch]
        targets = [{key: value.to(device, non_blocking=is_cuda) for key, value in target.items()} for target in targets]
        with autocast():
            losses = model(batch, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        scaler.backward(loss, optimizer, last=True)
        scaler.unscale_(optimizer)
        if args.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        sums.update({name: value.detach() for name, value in {**losses, 'loss': loss}.items()})
        images += len(batch)
        figures = None
        if progress.due():  # This includes the last step, so a faulty epoch is never saved.
            mean = float(sums['loss']) / (step + 1)  # This is a host sync.
            if processes.all_reduce_max(int(not math.isfinite(mean) or scaler.get_scale() < 1e-10)):
                raise TrainingFault(
                    f'epoch {epoch}, up to step {step}: loss or gradients are not finite; a lower --lr may help')
            speed = images * processes.get_world_size() / (time.monotonic() - began)
            figures = {'loss': f'{mean:.4f}', 'lr': f'{lr:.2e}', 'images/s': f'{speed:.1f}'}
        progress.step(figures)
    progress.close()
    ranks = processes.gather_from_ranks({name: float(value) for name, value in sums.items()})
    means = {name: sum(rank[name] for rank in ranks) / len(ranks) / len(loader) for name in sorted(sums)}
    return {'train_lr': lr, 'train_loss': means.pop('loss'), **means, 'train_images_per_s': speed}


def load(model: nn.Module, checkpoint: dict[str, Any], file: str, classes: list[str], is_training: bool) -> None:
    """Load a checkpoint of this script; raise UsageError if `model` differs or training cannot resume."""
    if 'detector' not in checkpoint:
        raise UsageError(f"{file} is not a checkpoint of detection.py: pass a classifier's weights with --weights")
    if is_training and 'optimizer' not in checkpoint:
        raise UsageError(f'{file} contains no optimizer state: resume from {LAST}, or evaluate with --eval')
    if class_names(checkpoint) != classes:
        raise UsageError(f"{file} was trained on other classes ({', '.join((class_names(checkpoint) or [])[:3])}, ...)")
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError:
        config = Path(file).with_name('config.yaml')
        raise UsageError(f'{file} was trained with other flags: use --config {config}') from None


def evaluate(
        args: argparse.Namespace, core: nn.Module, loader: DataLoader, val: CocoDataset, device: torch.device,
        autocast: Callable) -> dict[str, float]:
    """Evaluate the detector on all ranks; rank 0 writes predictions and a figure if there is an --output-dir."""
    results = detect(core, loader, val, device, autocast)
    scores = average_precision(val, results) if processes.get_rank() == 0 else {}
    with usage_errors(TrainingFault):  # such as a full disk
        if args.output_dir and processes.get_rank() == 0:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            for kind, detections in results.items():
                write_file(folder / f'detections_{kind}.json', json.dumps(detections).encode())
            with atomic_write(folder / 'detections.png') as file:
                draw(core, val, device).save(file, 'PNG')
    return processes.gather_from_ranks(scores)[0]


# The command line

def main(args: argparse.Namespace) -> None:
    """Train or evaluate a detector; errors are those of train.py's main."""
    device = setup_process(args)
    with usage_errors():
        if importlib.util.find_spec('pycocotools') is None:
            raise UsageError('pycocotools is not installed: pip install pycocotools')
        file, checkpoint = find_checkpoint(args, is_training=not args.eval)
        if args.config:
            options.check_paths(args, args.config, resumes=checkpoint is not None)
    args.input_size = sorted(args.input_size or ([800, 1333] if device.type == 'cuda' else [256, 427]))
    args.backbone_bn = args.backbone_bn or ('frozen' if args.weights else 'train')
    if device.type == 'cuda':
        configure_cuda(args.amp_dtype, is_training=not args.eval, fixed_size=False)
    set_fast_norm(args.fast_norm)
    with usage_errors():
        train, val = build_data(args)
        random_seed(args.seed)
        core = build_detector(
            args.model, len(val.classes) + 1, args.backbone, None if checkpoint else args.weights,
            args.backbone_bn == 'frozen', tuple(args.input_size), args.drop_path, args.fpn_channels, args.anchor_size,
            args.proposals)
        if checkpoint is not None:
            load(core, checkpoint, file, val.classes, is_training=not args.eval)
    core.to(device)
    shared = dict(rank=processes.get_rank(), world_size=processes.get_world_size())
    loading = dict(num_workers=args.num_workers, pin_memory=device.type == 'cuda', collate_fn=collate)
    val_loader = build_loader(val, 1, **shared, **loading)
    dtype = resolve_dtype(args.amp_dtype, device)
    autocast, scaler = autocast_to(dtype, device), NativeScaler(device.type, enabled=dtype == torch.float16)
    score = functools.partial(evaluate, args, core, val_loader, val, device, autocast)
    if args.eval:
        score()
        return
    sampler = TrainSampler(len(train), args.batch_size, seed=args.seed, **shared)
    loader = build_loader(train, args.batch_size, sampler=sampler, **loading)
    rate = args.lr * sampler.samples_per_update / 16
    optimizer = create_optimizer_v2(core, 'adamw', lr=rate, weight_decay=args.weight_decay)
    first_epoch, best = 0, {}
    if checkpoint is not None:
        with usage_errors():
            load_optimizer(optimizer, checkpoint['optimizer'], file)
            if checkpoint['loss_scaler']:
                load_scaler(scaler, checkpoint['loss_scaler'], file)
        first_epoch, best = checkpoint['epoch'] + 1, checkpoint['best']
        logger.info('resuming at epoch %d', first_epoch)
    if first_epoch < args.epochs:
        sampler.set_position(first_epoch)
        loader.start()  # Loading errors must appear before an old run is removed.
    writer = open_run(args, 'detection.py', device, first_epoch, file, best)
    model = core if processes.get_world_size() == 1 else nn.parallel.DistributedDataParallel(
        core, device_ids=[device.index] if device.type == 'cuda' else None, broadcast_buffers=False)
    millions = sum(p.numel() for p in core.parameters()) / 1e6
    logger.info('%s on %s: %.1f M parameters, %d images, %d steps per epoch, learning rate %g = %g x %d / 16, '
                'sides of %d to %d pixels, %s', args.model, args.backbone, millions, len(train), sampler.updates,
                rate, args.lr, sampler.samples_per_update, *args.input_size, device.type)
    for epoch in range(first_epoch, args.epochs):
        sampler.set_position(epoch)
        began = time.monotonic()
        record = {'epoch': epoch, **train_epoch(
            args, model, loader, optimizer, rate, epoch, device, autocast, scaler)}
        state = {'model': core.state_dict(), 'optimizer': optimizer.state_dict(), 'loss_scaler': scaler.state_dict(),
                 'epoch': epoch, 'detector': args.model, 'classes': val.classes, 'args': vars(args)}
        best = end_epoch(args, core, score, writer, state, record, best, began)


def end_epoch(
        args: argparse.Namespace, core: nn.Module, score: Callable, writer: RunWriter | None, state: dict[str, Any],
        record: dict[str, Any], best: dict[str, Any], began: float) -> dict[str, Any]:
    """Evaluate if it is due, log the epoch and save it; return the best score so far, with its epoch."""
    epoch, scored, device = state['epoch'], {}, next(core.parameters()).device
    if processes.get_world_size() > 1:  # Save the same BatchNorm statistics that are scored.
        distribute_bn(core, processes.get_world_size(), reduce=True)
    if (epoch + 1) % args.eval_every == 0 or epoch == args.epochs - 1:
        try:
            record |= score()
        except Exception:  # Save the epoch before an error, such as an unreadable image, ends the run.
            if writer is not None:
                writer.save({**state, 'best': best})
                writer.wait()
            raise
        if record.get('box_ap', -1) > best.get('box_ap', -1):  # Without annotations, COCOeval reports no AP.
            scored = {'box_ap': record['box_ap']}
            best = {**scored, 'epoch': epoch}
    record |= {'epoch_seconds': time.monotonic() - began, **utils.memory_mb(device)}
    if writer is not None:
        writer.log(record)
        writer.save({**state, 'best': best}, scored)
    check_written(writer)
    logger.info('epoch %d  train loss %.4f  %.0f s', epoch, record['train_loss'], record['epoch_seconds'])
    return best


def cli(argv: list[str] | None = None, args: argparse.Namespace | None = None, exits: bool = False) -> int:
    """Run main with `args`, or with the flags `argv` (default: sys.argv); return the exit status."""
    args = args or parse_args(argv)
    return processes.run_main('detection.py', main, args, unreadable_status=2 if args.eval else 1, exits=exits)


if __name__ == '__main__':
    sys.exit(cli(args=ARGS, exits=True))
