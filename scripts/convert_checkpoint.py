"""python scripts/convert_checkpoint.py output/digits/checkpoint_best.pth digits_cmt

Converts weights of any origin: .pth of this project or of the authors' release, safetensors, MindSpore's .ckpt, or the
name of a model with published weights. What comes out is, by --format or by the ending of OUT:

    dir          a folder of safetensors and config.json, for timm.create_model('local-dir:digits_cmt', pretrained=True)
    safetensors  the weights alone, under this project's names
    pth          torch.save of them, with class names and epoch; --resume, --finetune and every script take it
    released     the same under the names of the authors' code
"""
import argparse
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models._hub import save_config_for_hf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cmt  # noqa: E402
import utils  # noqa: E402
from checkpoints import build_model, read_weights, replacing, weights_of  # noqa: E402
from options import Parser  # noqa: E402

logger = logging.getLogger(__name__)


def load(source: str, averages: list[bool], model: str | None) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Models by the kind of their weights, 'model' or 'model_ema', each with what is known of it.

    Args:
        source: file or name.
        averages: what to look for: the weights (False), their average where there is one (True), or both.
        model: name, for files that do not tell it.

    Raises:
        ValueError: no checkpoint, or of no CMT.
    """
    checkpoint = read_weights(source)
    loaded = {}
    for use_ema in averages:
        state, kind = weights_of(checkpoint, use_ema)
        kind = 'model_ema' if kind == 'model_ema' else 'model'
        if kind not in loaded:
            # every other precision passes through float64 unchanged
            net, info = build_model(checkpoint, source, model, use_ema=use_ema, dtype=torch.float64)
            types = [value.dtype for value in state.values() if value.is_floating_point()]
            loaded[kind] = net.to(max(types, key=lambda dtype: dtype.itemsize)), info
    return loaded


def write(path: Path, save: Callable[[BinaryIO], Any]) -> None:
    with replacing(path) as file:
        save(file)
    content = path.read_bytes()
    logger.info('wrote %s  %.1f MB  sha256 %s', path, len(content) / 1e6, hashlib.sha256(content).hexdigest())


def write_safetensors(path: Path, net: nn.Module) -> None:
    content = safetensors.torch.save(contiguous(net.state_dict()), {'format': 'pt'})
    write(path, lambda file: file.write(content))


def contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor in memory of its own: a half of K and V in one would be written with both."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def write_folder(folder: Path, net: nn.Module, info: dict[str, Any], is_published: bool) -> None:
    """What timm opens as 'local-dir:FOLDER'."""
    model_args = {key: value for key, value in info['model_args'].items() if key != 'dtype'}
    with torch.device('meta'):
        model = timm.create_model(info['name'], num_classes=net.num_classes, img_size=info['img_size'], **model_args)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / 'model.safetensors', net)
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / 'config.json'
        # up to 32 px images are evaluated whole (datasets.build_transform)
        save_config_for_hf(
            model, config, model_config={'label_names': info['classes']},
            data_config={'crop_pct': 1.0 if max(info['img_size']) <= 32 else 0.875})
        content = json.loads(config.read_text())
    if not is_published:  # what timm knows of the published weights of that name
        for key in ('tag', 'license', 'origin_url'):
            content['pretrained_cfg'].pop(key, None)
    write(folder / 'config.json', lambda file: file.write(json.dumps(content, indent=2).encode()))


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='IN', help='a file, or the name of a model (cmt_s)')
    parser.add_argument('output', metavar='OUT', type=Path)
    parser.add_argument('--format', choices=['dir', 'released', 'pth', 'safetensors'],
                        help='default: by the ending of OUT, .pth or .safetensors, else dir')
    parser.add_argument('--weights', choices=['ema', 'model'],
                        help='default: both where the format holds both (released, pth), else the average if any')
    parser.add_argument('--model', help='name of the model, where the file does not tell it')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    utils.setup_logging()
    form = args.format or {'.pth': 'pth', '.safetensors': 'safetensors'}.get(args.output.suffix, 'dir')
    there = any(args.output.iterdir()) if args.output.is_dir() else args.output.exists()
    try:
        if there and args.output.resolve() == Path(args.source).resolve():
            raise ValueError(f'{args.output} is what is to be converted: give another name')
        if there and not args.overwrite:
            raise ValueError(f'{args.output} is there already: --overwrite replaces it')
        if args.output.exists() and args.output.is_dir() != (form == 'dir'):
            raise ValueError(f'{args.output} is a {"folder" if args.output.is_dir() else "file"}, not what '
                             f'--format {form} writes')
        if form != 'dir' and not args.output.absolute().parent.is_dir():
            raise ValueError(f'there is no folder {args.output.parent}')
        averages = {'model': [False], 'ema': [True], None: [True] if form in ('dir', 'safetensors') else [False, True]}
        loaded = load(args.source, averages[args.weights], args.model)
        if args.weights == 'ema' and 'model_ema' not in loaded:
            raise ValueError(f'{args.source} holds no average: leave --weights out')
        net, info = loaded.get('model_ema') or loaded['model']

        if form == 'dir':
            write_folder(args.output, net, info, is_published=not Path(args.source).is_file())
        elif form == 'safetensors':
            write_safetensors(args.output, net)
        else:
            if args.weights:  # the one wanted takes the place that is looked at first
                loaded = {'model': (net, info)}
            rename = cmt.to_released if form == 'released' else dict
            state = {kind: contiguous(rename(model.state_dict())) for kind, (model, _) in loaded.items()}
            state.update({key: info[key] for key in ('epoch', 'classes') if info[key] is not None})
            if form == 'pth':
                state['args'] = {'input_size': info['img_size'][0]}
                if 'embed_dims' not in info['model_args']:  # of a published shape or name; others tell it by their own
                    state['args']['model'] = info['name']
            write(args.output, lambda file: torch.save(state, file))
    except (ValueError, OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        parser.error(str(error))
    classes = f'{net.num_classes} classes' + (f' ({", ".join(info["classes"][:3])}, ...)' if info['classes'] else '')
    height, width = info['img_size']
    logger.info('%s at %dx%d, %s, as %s', info['name'], height, width, classes, form)
    if form == 'dir':
        logger.info("import cmt, timm; timm.create_model('local-dir:%s', pretrained=True)", args.output)


if __name__ == '__main__':
    main()
