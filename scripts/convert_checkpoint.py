"""python scripts/convert_checkpoint.py output/digits/checkpoint_best.pth digits_cmt

Convert weights of any origin: .pth of this project or of the authors' release, safetensors, MindSpore's .ckpt, or the
name of a model with published weights. --format, or else the ending of OUT, chooses the output:

    dir          a folder of safetensors and config.json, for timm.create_model('local-dir:digits_cmt', pretrained=True)
    safetensors  the weights alone, under this project's names
    pth          torch.save of the weights, with class names and epoch, for --resume, --finetune and every script
    released     as pth, under the names of the authors' code
"""
import argparse
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models._hub import save_config_for_hf

import _path
import cmt
import utils
from checkpoints import atomic_write
from options import Parser
from weights import Weights, build_model, identify, read

assert _path.ROOT  # importing _path puts the repository on sys.path

logger = logging.getLogger(__name__)


def load(source: str, kinds: list[bool], name: str | None) -> dict[str, tuple[Weights, nn.Module]]:
    """Return weights and models by kind, 'model' or 'model_ema'.

    Args:
        source: file or name.
        kinds: for each model, whether to load the EMA if `source` contains one.
        name: of the model; None for the name in the file.

    Raises:
        ValueError: no checkpoint, or weights of no CMT.
    """
    checkpoint = read(source)
    loaded = {}
    for use_ema in kinds:
        weights = Weights.of(checkpoint, source, use_ema)
        kind = 'model_ema' if weights.kind == 'model_ema' else 'model'
        if kind not in loaded:
            types = [value.dtype for value in weights.state.values() if value.is_floating_point()]
            # every other precision passes through float64 unchanged
            model = build_model(weights, name, dtype=torch.float64)
            loaded[kind] = weights, model.to(max(types, key=lambda dtype: dtype.itemsize))
    return loaded


def write(path: Path, save: Callable[[BinaryIO], Any]) -> None:
    with atomic_write(path) as file:
        save(file)
    content = path.read_bytes()
    logger.info('wrote %s  %.1f MB  sha256 %s', path, len(content) / 1e6, hashlib.sha256(content).hexdigest())


def write_safetensors(path: Path, model: nn.Module) -> None:
    content = safetensors.torch.save(model.state_dict(), {'format': 'pt'})
    write(path, lambda file: file.write(content))


def write_folder(folder: Path, model: nn.Module, weights: Weights, name: str | None) -> None:
    """Write a folder that timm opens as 'local-dir:FOLDER'."""
    name, model_args = identify(weights, name)
    with torch.device('meta'):
        described = timm.create_model(name, num_classes=model.num_classes, img_size=model.img_size, **model_args)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / 'model.safetensors', model)
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / 'config.json'
        # images of up to 32 px are evaluated whole (transforms.build_transform)
        save_config_for_hf(
            described, config, model_config={'label_names': weights.classes_for(model)},
            data_config={'crop_pct': 1.0 if max(model.img_size) <= 32 else 0.875})
        content = json.loads(config.read_text())
    content['model_args'].pop('num_classes', None)  # transformers passes its own beside these; the config has it
    if Path(weights.source).exists() or ':' in weights.source:  # not the published weights, which timm describes
        for key in ('tag', 'license', 'origin_url'):
            content['pretrained_cfg'].pop(key, None)
    write(folder / 'config.json', lambda file: file.write(json.dumps(content, indent=2).encode()))


def write_checkpoint(
        path: Path, loaded: dict[str, tuple[Weights, nn.Module]], name: str | None, is_released: bool) -> None:
    """Write models as a checkpoint, under the names of the authors' code if `is_released`."""
    rename = cmt.to_released if is_released else dict
    state = {kind: rename(model.state_dict()) for kind, (_, model) in loaded.items()}
    weights, model = next(iter(loaded.values()))
    facts = {'epoch': weights.epoch, 'classes': weights.classes_for(model)}
    state.update({key: value for key, value in facts.items() if value is not None})
    if not is_released:
        name, model_args = identify(weights, name)
        state['args'] = {'input_size': model.img_size[0]}
        if 'embed_dims' not in model_args:  # a CMT of no published size is recognised by its tensors
            state['args']['model'] = name
    write(path, lambda file: torch.save(state, file))


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='IN', help='a file, or the name of a model (cmt_s)')
    parser.add_argument('output', metavar='OUT', type=Path)
    parser.add_argument('--format', choices=['dir', 'released', 'pth', 'safetensors'],
                        help='default: by the ending of OUT, .pth or .safetensors, else dir')
    parser.add_argument('--weights', choices=['ema', 'model'],
                        help='default: both in a format that can contain both (released, pth), else the EMA if any')
    parser.add_argument('--model', help='name of the model, for files without it')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser


def check_output(source: str, output: Path, output_format: str, overwrite: bool) -> None:
    """Raise ValueError if `output` cannot or must not be written."""
    exists = any(output.iterdir()) if output.is_dir() else output.exists()
    if exists and output.resolve() == Path(source).resolve():
        raise ValueError(f'{output} is the file to convert: give another name')
    if exists and not overwrite:
        raise ValueError(f'{output} exists: --overwrite replaces it')
    if output.exists() and output.is_dir() != (output_format == 'dir'):
        raise ValueError(f'{output} is a {"folder" if output.is_dir() else "file"}: --format {output_format} '
                         f'writes a {"folder" if output_format == "dir" else "file"}')
    if output_format != 'dir' and not output.absolute().parent.is_dir():
        raise ValueError(f'there is no folder {output.parent}')


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    utils.setup_logging()
    output_format = args.format or {'.pth': 'pth', '.safetensors': 'safetensors'}.get(args.output.suffix, 'dir')
    holds_both = output_format in ('pth', 'released')
    kinds = {'model': [False], 'ema': [True], None: [False, True] if holds_both else [True]}[args.weights]
    try:
        check_output(args.source, args.output, output_format, args.overwrite)
        loaded = load(args.source, kinds, args.model)
        if args.weights == 'ema' and 'model_ema' not in loaded:
            raise ValueError(f'{args.source} contains no EMA: leave --weights out')
        weights, model = loaded.get('model_ema') or loaded['model']
        if output_format == 'dir':
            write_folder(args.output, model, weights, args.model)
        elif output_format == 'safetensors':
            write_safetensors(args.output, model)
        else:
            if args.weights:  # every reader takes 'model' unless asked for the EMA
                loaded = {'model': (weights, model)}
            write_checkpoint(args.output, loaded, args.model, output_format == 'released')
    except (ValueError, OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        parser.error(str(error))
    classes = weights.classes_for(model)
    examples = f' ({", ".join(classes[:3])}, ...)' if classes else ''
    height, width = model.img_size
    logger.info('%s at %dx%d, %d classes%s, as %s', identify(weights, args.model)[0], height, width, model.num_classes,
                examples, output_format)
    if output_format == 'dir':
        logger.info("import cmt, timm; timm.create_model('local-dir:%s', pretrained=True)", args.output)


if __name__ == '__main__':
    main()
