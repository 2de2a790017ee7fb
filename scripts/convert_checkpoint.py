"""python scripts/convert_checkpoint.py output/digits/checkpoint_best.pth digits_cmt

Convert weights of any origin: .pth of this project or of the authors' release, safetensors, MindSpore's .ckpt, or the
name of a model with published weights. --format, or else the extension of OUT, chooses the output:

    dir          a folder of safetensors and config.json, for timm.create_model('local-dir:digits_cmt', pretrained=True)
    safetensors  only the weights, under this project's names
    pth          torch.save of the weights, with class names and epoch, for --eval, --finetune and every script
    released     like pth, under the names of the authors' code

From a checkpoint with model and EMA, the EMA is converted; --no-model-ema converts the model's own weights.
"""
import argparse
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import _path
from errors import UsageError
from options import Parser, add_weights_flag


@_path.parse_first
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split('\n', 2)[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='IN', help='a file, or the name of a model (cmt_s)')
    parser.add_argument('output', metavar='OUT', type=Path)
    parser.add_argument('--format', choices=['dir', 'released', 'pth', 'safetensors'],
                        help='default: by the extension of OUT, .pth or .safetensors, else dir')
    add_weights_flag(parser)
    parser.add_argument('--model', help='name of the model, checked against the file')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser


import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf

import cmt
import utils
from checkpoints import FORMAT, check_output
from system import atomic_write
from weights import Weights, build_model, create_cmt, read_weights

logger = logging.getLogger(__name__)


def write(path: Path, save: Callable[[BinaryIO], Any]) -> None:
    with atomic_write(path) as file:
        save(file)
    content = path.read_bytes()
    logger.info('wrote %s  %.1f MB  sha256 %s', path, len(content) / 1e6, hashlib.sha256(content).hexdigest())


def write_safetensors(path: Path, model: cmt.CMT) -> None:
    content = safetensors.torch.save(model.state_dict(), {'format': 'pt'})
    write(path, lambda file: file.write(content))


def write_folder(folder: Path, model: cmt.CMT, weights: Weights) -> None:
    """Write a folder that timm opens as 'local-dir:FOLDER'."""
    name = weights.name if timm.is_model(weights.name or '') else 'cmt_s'  # The arguments below decide.
    model_args = {key: value for key, value in model.model_args.items() if not key.endswith('_rate')}
    described = create_cmt(name, device='meta', **model_args)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / 'model.safetensors', model)
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / 'config.json'
        save_config_for_hf(described, config, model_config={'label_names': weights.class_names(model)},
                           data_config={'crop_pct': weights.crop_pct})
        content = json.loads(config.read_text('utf-8'))
    content['model_args'].pop('num_classes', None)  # transformers passes its own in addition to these.
    if Path(weights.file).exists() or ':' in weights.file:  # These are not the published weights that timm describes.
        for key in ('tag', 'license', 'origin_url'):
            content['pretrained_cfg'].pop(key, None)
    write(folder / 'config.json', lambda file: file.write(json.dumps(content, indent=2).encode()))


def write_checkpoint(path: Path, model: cmt.CMT, weights: Weights, is_released: bool) -> None:
    """Write a checkpoint, under the names of the authors' code if `is_released`."""
    facts = {'epoch': weights.epoch, 'classes': weights.class_names(model)}
    state = {'model': cmt.to_released(model.state_dict()) if is_released else model.state_dict(),
             **{key: value for key, value in facts.items() if value is not None}}
    if not is_released:
        state.update(format=FORMAT, model_args=model.model_args,
                     args={'input_size': model.img_size[0], 'model': weights.name, 'crop_pct': weights.crop_pct})
    write(path, lambda file: torch.save(state, file))


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    utils.setup_logging()
    output_format = args.format or {'.pth': 'pth', '.safetensors': 'safetensors'}.get(args.output.suffix, 'dir')
    with parser.usage_errors():
        check_output(args.output, args.source, args.overwrite)
        weights = read_weights(args.source, args.model_ema)
        dtypes = [value.dtype for value in weights.state.values() if value.is_floating_point()]
        model = build_model(weights, args.model, dtype=torch.float64)  # Other precisions pass through it unchanged.
        model.to(max(dtypes, key=lambda dtype: dtype.itemsize))
        if output_format == 'released' and not model.model_args['position_bias']:
            raise UsageError("weights without position bias (MindCV's form) do not fit the authors' code")
        if output_format == 'dir':
            write_folder(args.output, model, weights)
        elif output_format == 'safetensors':
            write_safetensors(args.output, model)
        else:
            write_checkpoint(args.output, model, weights, output_format == 'released')
    logger.info('%s at %dx%d, %d classes, as %s', weights.name or 'CMT', *model.img_size, model.num_classes,
                output_format)
    if output_format == 'dir':
        logger.info("import cmt, timm; timm.create_model('local-dir:%s', pretrained=True)", args.output)


if __name__ == '__main__':
    main()
