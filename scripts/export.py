"""python scripts/export.py output/digits/checkpoint_best.pth digits.onnx

Export a checkpoint, or a model by its name, for inference elsewhere. The extension of OUT chooses the format:

    .onnx                ONNX, any batch size; compared with torch by onnxruntime
    .pt2                 torch.export, any batch size: torch.export.load('digits.pt2').module()
    .ts .torchscript .pt TorchScript: torch.jit.load('digits.ts')

The exported model maps normalized images (B, 3, H, W), float32, to logits. The file's metadata contain name, size,
mean, std and class names under the key 'cmt', as JSON. The file is written only if its logits equal the model's.
"""
import argparse
import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable

import _path
from errors import UsageError
from options import Parser, add_weights_flag, image_size, output_file


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
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser


import torch
import torch.nn as nn

import cmt
from checkpoints import check_output
from system import atomic_write
from weights import build_model, read_weights

BATCHES = (1, 5)  # batch sizes of the comparison; the exporters' example input has another
Function = Callable[[torch.Tensor], torch.Tensor]


def to_onnx(model: nn.Module, images: torch.Tensor, metadata: str) -> tuple[bytes, Function]:
    missing = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'.onnx needs packages that are not installed: pip install {" ".join(missing)}')
    import onnxruntime
    for module in model.modules():  # Every runtime fuses MatMul and Softmax.
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
    program = torch.onnx.export(
        model, (images,), dynamo=True, verbose=False, input_names=['images'], output_names=['logits'],
        dynamic_shapes=({0: torch.export.Dim('batch')},))
    program.model.metadata_props['cmt'] = metadata
    content = program.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    return content, lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])


def to_pt2(model: nn.Module, images: torch.Tensor, metadata: str) -> tuple[bytes, Function]:
    file = io.BytesIO()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    torch.export.save(program, file, extra_files={'cmt': metadata})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def to_torchscript(model: nn.Module, images: torch.Tensor, metadata: str) -> tuple[bytes, Function]:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # TorchScript is deprecated, but some runtimes need it.
        torch.jit.save(torch.jit.script(model), file, _extra_files={'cmt': metadata})
        file.seek(0)
        return file.getvalue(), torch.jit.load(file)


# extension: (function, largest difference of the logits allowed)
FORMATS = {'.onnx': (to_onnx, 1e-4), '.pt2': (to_pt2, 1e-5)}
FORMATS |= dict.fromkeys(('.ts', '.torchscript', '.pt'), (to_torchscript, 1e-5))


@torch.no_grad()
def worst_difference(model: Function, exported: Function, size: tuple[int, ...]) -> float:
    """Return the largest difference of two models' logits on random images, at several batch sizes.

    The difference is relative to the largest logit if that is above 1.
    """
    generator = torch.Generator().manual_seed(0)
    differences = []
    for batch in BATCHES:
        x = torch.randn(batch, *size, generator=generator)
        expected = model(x)
        differences.append((expected - exported(x)).abs().max() / expected.abs().max().clamp(min=1))
    return torch.stack(differences).max().item()


def export(
        model: cmt.CMT, name: str, classes: list[str] | None, suffix: str, fuse: bool = False) -> tuple[bytes, float]:
    """Return the file of a model, and the largest difference of its logits from the model's.

    `name` and `classes` go into the metadata, `suffix` is a key of FORMATS; `fuse` folds BatchNorm into convolutions.

    Raises:
        UsageError: a format that cannot represent the model, or logits that differ.
    """
    convert, allowed = FORMATS[suffix]
    if model.dynamic_img_size and convert is not to_torchscript:
        raise UsageError(f'{suffix} files have one input size: --dynamic-img-size resamples the position bias, which '
                         'cannot be exported; export a file for each size, or .ts')
    cfg = model.pretrained_cfg
    metadata = json.dumps({
        'model': name, 'input_size': [model.in_chans, *model.img_size], 'crop_pct': cfg['crop_pct'],
        'interpolation': cfg['interpolation'], 'mean': cfg['mean'], 'std': cfg['std'], 'classes': classes})
    images = torch.zeros(2, model.in_chans, *model.img_size)
    exportable = model.fuse() if fuse else copy.deepcopy(model)
    noise = io.StringIO()
    logging.disable(logging.WARNING)  # Exporters log a lot.
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            content, exported = convert(exportable, images, metadata)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f'this model cannot be exported to {suffix} ({reason})') from None
    finally:
        logging.disable(logging.NOTSET)
    worst = worst_difference(model, exported, images.shape[1:])
    if not worst <= allowed:  # NaN is not accepted.
        raise UsageError(f'no file written: its logits differ by {worst:.1e}, more than {allowed:.0e}')
    return content, worst


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    with parser.usage_errors():
        if args.output.suffix.lower() not in FORMATS:
            raise UsageError(f'{args.output}: the name must end in {", ".join(FORMATS)}')
        check_output(args.output, args.source, args.overwrite)
        if args.input_size and len(args.input_size) > 2:
            raise UsageError('--input-size needs one number, or height and width')
        options = {'dynamic_img_size': True} if args.dynamic_img_size else {}
        if args.input_size:
            options['img_size'] = tuple(args.input_size * 2)[:2]
        weights = read_weights(args.source, use_ema=args.model_ema)
        model = build_model(weights, **options)
        name, classes = weights.name or 'CMT', weights.class_names(model)
        origin = f' ({"; ".join(["EMA", *weights.notes])})' if weights.is_ema else ''
        content, worst = export(model, name, classes, args.output.suffix.lower(), args.fuse)
        with atomic_write(args.output) as file:
            file.write(content)
    size = 'any size' if args.dynamic_img_size else '{}x{}'.format(*model.img_size)
    print(f'{args.output}: {name}{origin} at {size}, {model.num_classes} classes, {len(content) / 1e6:.1f} MB; largest '
          f'difference of the logits {worst:.1e} (batches of {" and ".join(map(str, BATCHES))})')


if __name__ == '__main__':
    main()
