"""python scripts/export.py output/digits/checkpoint_best.pth digits.onnx

Exports a checkpoint, or a model by its name, for inference elsewhere. The ending of OUT tells the format:

    .onnx                ONNX, any batch size; run by onnxruntime and compared with torch
    .pt2                 torch.export, any batch size: torch.export.load('digits.pt2').module()
    .ts .torchscript .pt TorchScript: torch.jit.load('digits.ts')

The exported model takes normalised images (B, 3, H, W), float32, and gives logits. Name, size, mean, std and class
names travel in the file's metadata, under the key 'cmt', as JSON. It is written once it agrees with the model.
"""
import argparse
import contextlib
import copy
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cmt  # noqa: E402, F401
from checkpoints import build_model, create_cmt, replacing  # noqa: E402
from options import Parser  # noqa: E402

BATCHES = (1, 5)  # sizes that are compared, neither of them the one exported with
Function = Callable[[torch.Tensor], torch.Tensor]


def to_onnx(model: nn.Module, images: torch.Tensor, metadata: str) -> tuple[bytes, Function]:
    missing = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'.onnx needs packages that are not installed: pip install {" ".join(missing)}')
    import onnxruntime
    for module in model.modules():  # MatMul and Softmax, which every runtime fuses by itself
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
        warnings.simplefilter('ignore', FutureWarning)  # deprecated, and still what runs in many places
        torch.jit.save(torch.jit.script(model), file, _extra_files={'cmt': metadata})
        file.seek(0)
        return file.getvalue(), torch.jit.load(file)


# format: (function, largest difference of the logits allowed)
FORMATS = {'.onnx': (to_onnx, 1e-4), '.pt2': (to_pt2, 1e-5)}
FORMATS |= dict.fromkeys(('.ts', '.torchscript', '.pt'), (to_torchscript, 1e-5))


@torch.no_grad()
def worst_difference(model: Function, exported: Function, size: tuple[int, ...]) -> float:
    """Largest difference of two models' logits on random images, at several batch sizes.

    Relative to the largest logit where that is above 1, below which float32 can't tell.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.
    for batch in BATCHES:
        x = torch.randn(batch, *size, generator=generator)
        expected = model(x)
        difference = (expected - exported(x)).abs().max() / expected.abs().max().clamp(min=1)
        worst = max(worst, difference.item() if difference.isfinite() else float('inf'))
    return worst


def export(model: nn.Module, info: dict[str, Any], suffix: str, fuse: bool = False) -> tuple[bytes, float]:
    """A model in the format of a suffix, and how far its logits are from the model's own.

    Args:
        model: in eval mode.
        info: from checkpoints.build_model.
        suffix: a key of FORMATS.
        fuse: fold what inference needs no more than once.

    Raises:
        ValueError: a format that can't carry the model, or logits that differ.
    """
    convert, allowed = FORMATS[suffix]
    if model.dynamic_img_size and convert is not to_torchscript:
        raise ValueError(f'{suffix} holds one input size: with dynamic_img_size the position bias is resampled to the '
                         'size of each batch, a choice that is made while exporting; export once a size, or as .ts')
    reference = copy.deepcopy(model)
    if fuse:
        if not hasattr(model, 'fuse'):
            raise ValueError('--fuse: this model has no fuse(), which folds its normalisation into its convolutions')
        model = model.fuse()
    cfg = getattr(model, 'pretrained_cfg', cmt.default_cfgs['cmt_s'].default.to_dict())
    metadata = json.dumps({
        'model': info['name'], 'input_size': [model.in_chans, *info['img_size']],
        'mean': cfg['mean'], 'std': cfg['std'], 'classes': info['classes']})
    images = torch.zeros(2, model.in_chans, *info['img_size'])
    noise = io.StringIO()
    logging.disable(logging.WARNING)  # exporters talk a lot
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            content, exported = convert(model, images, metadata)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f'{suffix} cannot carry this model ({str(error).strip().splitlines()[0]})') from None
    finally:
        logging.disable(logging.NOTSET)
    worst = worst_difference(reference, exported, images.shape[1:])
    if worst > allowed:
        raise ValueError(f'nothing written: its logits differ by {worst:.1e}, more than {allowed:.0e}')
    return content, worst


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='CKPT|MODEL',
                        help='a checkpoint, a converted folder, or a name with published weights')
    parser.add_argument('output', metavar='OUT', type=Path)
    parser.add_argument('--input-size', type=int, nargs='+', metavar='N',
                        help="one number or height and width, multiples of 32 (default: the checkpoint's)")
    parser.add_argument('--dynamic-img-size', action='store_true', help='take images of any size (TorchScript)')
    parser.add_argument('--model-weights', action='store_true', help='the weights themselves, not their average')
    parser.add_argument('--random-weights', action='store_true',
                        help="of a MODEL: to try a runtime's speed without published weights")
    parser.add_argument('--fuse', action='store_true', help='fold normalisation into convolutions first')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    try:
        suffix = args.output.suffix.lower()
        if suffix not in FORMATS:
            raise ValueError(f'{args.output}: the name must end in {", ".join(FORMATS)}')
        if not args.output.absolute().parent.is_dir():
            raise ValueError(f'there is no folder {args.output.parent}')
        if args.output.is_dir():
            raise ValueError(f'{args.output} is a folder')
        if args.output.exists() and args.output.resolve() == Path(args.source).resolve():
            raise ValueError(f'{args.output} is the checkpoint itself: give another name')
        if args.output.exists() and not args.overwrite:
            raise ValueError(f'{args.output} is there already: --overwrite replaces it')
        if args.input_size and len(args.input_size) > 2:
            raise ValueError('--input-size takes one number, or height and width')
        options = {'dynamic_img_size': True} if args.dynamic_img_size else {}
        size = tuple(args.input_size * 2)[:2] if args.input_size else None
        if args.random_weights:
            torch.manual_seed(0)
            model = create_cmt(args.source, **options, **({'img_size': size} if size else {})).eval()
            info = dict(name=args.source, classes=None, img_size=model.img_size, kind='random')
        else:
            model, info = build_model(None, args.source, img_size=size, use_ema=not args.model_weights, **options)
        content, worst = export(model, info, suffix, args.fuse)
        with replacing(args.output) as file:
            file.write(content)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    height, width = info['img_size']
    weights = {'model_ema': ' (average of the weights)', 'random': ' (random weights)'}.get(info['kind'], '')
    print(f'{args.output}: {info["name"]}{weights} at {"any size" if args.dynamic_img_size else f"{height}x{width}"}, '
          f'{model.num_classes} classes, {len(content) / 1e6:.1f} MB; largest difference of the logits {worst:.1e} '
          f'(batches of {" and ".join(map(str, BATCHES))})')


if __name__ == '__main__':
    main()
