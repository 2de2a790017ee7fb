"""python scripts/export.py output/digits/checkpoint_best.pth digits.onnx

Export a checkpoint, or a model by its name, for inference elsewhere. The extension of OUT chooses the format:

    .onnx                ONNX, any batch size; compared with torch by onnxruntime
    .pt2                 torch.export, any batch size: torch.export.load('digits.pt2').module()
    .ts .torchscript .pt TorchScript: torch.jit.load('digits.ts')

The exported model maps normalized images (B, 3, H, W), float32, to logits. The file's metadata contains name, size,
crop, interpolation, mean, std and class names under the key 'cmt', as JSON. The file is written only if its logits
match the model's. --int8 quantizes; it prints how much the logits differ and how many predictions agree:

    python scripts/export.py output/pets/checkpoint_best.pth pets.onnx --int8 pets/train --eval-data pets/val
"""
import argparse
import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import _path
from errors import UsageError, first_line
from options import Parser, add_weights_flag, image_size, in_range, output_file, path, positive

CALIBRATION_IMAGES = 256


@_path.parse_first
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split('\n', 2)[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='CKPT|MODEL',
                        help='a checkpoint, a converted folder, or a name with published weights')
    parser.add_argument('output', metavar='OUT', type=output_file)
    parser.add_argument('--input-size', type=image_size, nargs='+', metavar='N',
                        help="one number or height and width, multiples of 32 (default: the checkpoint's)")
    parser.add_argument('--dynamic-img-size', action='store_true', help='accept images of any size (TorchScript)')
    add_weights_flag(parser)
    parser.add_argument('--fuse', action='store_true', help='fold BatchNorm into convolutions before the export')
    parser.add_argument('--opset', type=positive, metavar='N',
                        help="ONNX opset, 18 or higher (default: torch's). Opsets below 20 have no Gelu operator")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument('--half', action='store_true',
                           help='store weights and compute in float16; images and logits stay float32')
    precision.add_argument('--int8', type=path, metavar='CALIBRATION_FOLDER',
                           help='quantize to 8 bits (.onnx), calibrated on half of the images in this folder')
    parser.add_argument('--eval-data', type=path, metavar='FOLDER', help='compare the accuracy of model and file on '
                        'class folders, or on a val split, without the images that calibrated --int8')
    parser.add_argument('--max-accuracy-loss', type=in_range(float, 0, 100), default=1., metavar='POINTS',
                        help='write no file if accuracy on --eval-data drops by more (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser


import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.functional import normalize
from tqdm import tqdm

import cmt
from checkpoints import check_output
from datasets import build_dataset, drop_damaged, has_split
from evaluation import IMAGENET, list_images
from sources import EncodedImages, Samples
from system import write_file
from transforms import build_transform
from weights import build_model, read_weights

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]  # normalized images (B, 3, H, W), class indices (B,)
Function = Callable[[torch.Tensor], torch.Tensor]


class Half(nn.Sequential):
    """Run a float16 model on float32 images, and return float32 logits."""

    def forward(self, x):
        return self[0](x.half()).float()


def to_onnx(model: nn.Module, images: torch.Tensor, metadata: str, opset: int | None = None,
            calibration: Batches | None = None) -> tuple[bytes, Function]:
    import onnxruntime
    for module in model.modules():  # Export plain attention: runtimes fuse MatMul and Softmax themselves.
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
    program = torch.onnx.export(
        model, (images,), dynamo=True, verbose=False, input_names=['images'], output_names=['logits'],
        dynamic_shapes=({0: torch.export.Dim('batch')},), opset_version=opset)
    if opset not in (None, program.model.opset_imports['']):  # On failure, torch only logs and exports another opset.
        raise UsageError(f'--opset {opset}: torch cannot export it; omit --opset, or use 18')
    program.model.metadata_props['cmt'] = metadata
    content = program.model_proto.SerializeToString()
    content = quantize(content, calibration) if calibration else content
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    return content, lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])


def quantize(content: bytes, calibration: Batches) -> bytes:
    """Quantize the convolutions, except the first, and matrix products of an ONNX model, per output channel.

    Activations are uint8, for which x86 has instructions. ONNX Runtime's default, int8, is half as fast. Weights have
    7 bits, since 8-bit products saturate on CPUs without VNNI.
    """
    import onnx
    from onnxruntime import quantization
    inputs = ({'images': images.numpy()} for images, _ in calibration)
    reader = types.SimpleNamespace(get_next=lambda: next(inputs, None))
    with tempfile.TemporaryDirectory() as folder:
        model, result = Path(folder, 'model.onnx'), Path(folder, 'int8.onnx')
        model.write_bytes(content)
        quantization.quant_pre_process(model, model, skip_symbolic_shape=True)
        first = next(node.name for node in onnx.load(model).graph.node if node.op_type == 'Conv')
        quantization.quantize_static(
            model, result, reader, op_types_to_quantize=['Conv', 'MatMul', 'Gemm'], per_channel=True,
            reduce_range=True, activation_type=quantization.QuantType.QUInt8, nodes_to_exclude=[first])
        return result.read_bytes()


def to_pt2(model: nn.Module, images: torch.Tensor, metadata: str) -> tuple[bytes, Function]:
    file = io.BytesIO()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    torch.export.save(program, file, extra_files={'cmt': metadata})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def to_torchscript(model: nn.Module, images: torch.Tensor, metadata: str) -> tuple[bytes, Function]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file, _extra_files={'cmt': metadata})
    file.seek(0)
    return file.getvalue(), torch.jit.load(file)


# extension: (function, largest allowed difference of the logits in float32)
FORMATS = {'.onnx': (to_onnx, 1e-4), '.pt2': (to_pt2, 1e-5)}
FORMATS |= dict.fromkeys(('.ts', '.torchscript', '.pt'), (to_torchscript, 1e-5))


@torch.no_grad()
def compare(model: Function, exported: Function, batches: Batches) -> tuple[float, float, float, float]:
    """Return the largest difference of the logits, and the agreement of predictions and both accuracies in %.

    The difference is relative to an image's largest logit if that is above 1.
    """
    logits, others, targets = map(torch.cat, zip(*((model(x), exported(x), y) for x, y in batches)))
    difference = ((logits - others).abs().amax(1) / logits.abs().amax(1).clamp(min=1)).max()
    pairs = (logits.argmax(1), others.argmax(1)), (logits.argmax(1), targets), (others.argmax(1), targets)
    return difference.item(), *(100 * (a == b).double().mean().item() for a, b in pairs)


def read_batches(dataset: Dataset, model: cmt.CMT, title: str) -> Batches:
    """Read images in batches, with a progress bar on the real stderr, since export() redirects sys.stderr."""
    batches, cfg = DataLoader(dataset, batch_size=16), model.pretrained_cfg
    for images, targets in tqdm(batches, desc=title, leave=False, disable=None, file=sys.__stderr__):
        yield normalize(images.float() / 255, cfg['mean'], cfg['std']), targets


def open_calibration(folder: str, transform: Callable) -> EncodedImages:
    """Open images in a folder, drawn at random: one half for calibration, the other for comparison."""
    names = list_images(folder)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:2 * CALIBRATION_IMAGES]
    dataset = EncodedImages(Samples([names[i] for i in order], [-1] * len(order)), transform)
    dataset.roots = [folder]
    drop_damaged(dataset)
    if len(dataset) < 2:
        raise UsageError(f'--int8 {folder}: only one image; use at least 2, preferably 100')
    return dataset


def open_eval_data(folder: str, transform: Callable, classes: list[str], used: set[str]) -> EncodedImages:
    """Open labeled images whose real paths are not in `used`."""
    if not classes:
        raise UsageError('--eval-data needs class names, which these weights lack: export the checkpoint of a run')
    dataset = build_dataset('IMNET', False, folder, 0, transform, classes, is_whole=not has_split(folder, 'val'))
    others = [i for i, (name, _) in enumerate(dataset.samples) if os.path.realpath(name) not in used]
    if not others:
        raise UsageError(f'--eval-data {folder}: all its images were used to calibrate --int8; use others')
    dataset.select(others)
    drop_damaged(dataset)
    return dataset


def export(model: cmt.CMT, name: str, classes: list[str] | None, suffix: str, fuse: bool = False, half: bool = False,
           **options) -> tuple[bytes, Function, float]:
    """Return an exported file, the function it computes, and its largest difference from `model` on random images.

    `name` and `classes` go into the metadata, `suffix` is a key of FORMATS, and `options` go to its function. Raise
    UsageError if the format cannot represent the model, or if the logits differ.
    """
    convert, allowed = FORMATS[suffix]
    allowed = float('inf') if options.get('calibration') else 2e-2 if half else allowed
    if model.dynamic_img_size and convert is not to_torchscript:
        raise UsageError(f'{suffix} files have one input size: --dynamic-img-size resamples the position bias, which '
                         'cannot be exported; export a file for each size, or .ts')
    cfg = model.pretrained_cfg
    metadata = json.dumps({
        'model': name, 'input_size': [model.in_chans, *model.img_size], 'crop_pct': cfg['crop_pct'],
        'interpolation': cfg['interpolation'], 'mean': cfg['mean'], 'std': cfg['std'], 'classes': classes})
    images = torch.zeros(2, model.in_chans, *model.img_size)
    exportable = model.fuse() if fuse else copy.deepcopy(model).requires_grad_(False)  # ExecuTorch needs this.
    exportable = Half(exportable.half()).eval() if half else exportable
    logging.disable(logging.WARNING)  # Hide the exporters' logs and TorchScript's deprecation warning.
    try:
        with contextlib.redirect_stdout(io.StringIO()) as noise, contextlib.redirect_stderr(noise):
            content, exported = convert(exportable, images, metadata, **options)
    except (RuntimeError, NotImplementedError) as error:
        raise UsageError(f'this model cannot be exported to {suffix} ({first_line(error)})') from None
    finally:
        logging.disable(logging.NOTSET)
    x = torch.randn(6, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    difference, *_ = compare(model, exported, [(batch, torch.zeros(len(batch))) for batch in x.split([1, 5])])
    if not difference <= allowed:  # Unlike `difference > allowed`, this rejects NaN too.
        raise UsageError(f'no file written: the exported logits differ by {difference:.1e}, more than {allowed:.0e}')
    return content, exported, difference


def check_flags(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go together, and for missing packages."""
    suffix = args.output.suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f'{args.output}: the name must end in {", ".join(FORMATS)}')
    missing = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if importlib.util.find_spec(name) is None]
    if suffix == '.onnx' and missing:
        raise UsageError(f'.onnx needs packages that are not installed: pip install {" ".join(missing)}')
    if suffix != '.onnx' and (args.int8, args.opset) != (None, None):
        raise UsageError('--int8 and --opset are for .onnx')
    if args.input_size and len(args.input_size) > 2:
        raise UsageError('--input-size needs one number, or height and width')


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format='%(message)s')  # Print warnings to stderr.
    for name in ('datasets', 'sources'):  # Log which images are damaged or left out.
        logging.getLogger(name).setLevel(logging.INFO)
    with parser.usage_errors():
        check_flags(args)
        check_output(args.output, args.source, args.overwrite)
        changes = {'dynamic_img_size': True} if args.dynamic_img_size else {}
        if args.input_size:
            changes['img_size'] = tuple(args.input_size * 2)[:2]
        weights = read_weights(args.source, use_ema=args.model_ema)
        model = build_model(weights, **changes)
        name, classes, (height, width) = weights.name or 'CMT', weights.class_names(model), model.img_size
        if (args.int8, args.eval_data) != (None, None) and (model.in_chans, height) != (3, width):
            raise UsageError(f'--int8 and --eval-data read square RGB images, not {model.in_chans}x{height}x{width}')
        transform = build_transform(False, height, crop_pct=model.pretrained_cfg['crop_pct'])
        options, data, used = {'opset': args.opset} if args.opset else {}, None, set()
        if args.int8 is not None:
            images = open_calibration(args.int8, transform)
            half = len(images) // 2
            used = {os.path.realpath(images.samples[i][0]) for i in range(half)}
            options['calibration'] = read_batches(Subset(images, range(half)), model, 'calibration')
            data = Subset(images, range(half, len(images)))
        if args.eval_data is not None:
            data = open_eval_data(args.eval_data, transform, classes or IMAGENET * (model.num_classes == 1000), used)
        suffix = args.output.suffix.lower()
        content, exported, difference = export(model, name, classes, suffix, args.fuse, args.half, **options)
        if data:
            difference, agreement, before, after = compare(model, exported, read_batches(data, model, 'comparison'))
        if args.eval_data is not None and not before - after <= args.max_accuracy_loss:
            raise UsageError(f"no file written: its accuracy is {after:.3f} %, the model's {before:.3f} %: use more "
                             'calibration images, or a larger --max-accuracy-loss')
        write_file(args.output, content)
    origin = f' ({"; ".join(["EMA", *weights.notes])})' if weights.is_ema else ''
    size = 'any size' if args.dynamic_img_size else f'{height}x{width}'
    print(f'{args.output}: {name}{origin} at {size}, {model.num_classes} classes, {len(content) / 1e6:.1f} MB; largest '
          f'difference of the logits {difference:.1e} ({len(data) if data else "random"} images)')
    if data:
        print(f'{agreement:.2f} % of the predictions are equal' + (
            f'; accuracy: model {before:.3f} %, file {after:.3f} %' if args.eval_data else ''))


if __name__ == '__main__':
    main()
