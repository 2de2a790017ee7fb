"""python scripts/convert_checkpoint.py output/digits/checkpoint_best.pth digits_cmt

Convert weights of any origin: .pth of this project or of the authors' release, safetensors, MindSpore's .ckpt, or the
name of a model with published weights. --format, or else the extension of OUT, chooses the output:

    dir          a folder with safetensors, config.json, a model card (README.md) and cmt.py, for the Hugging Face Hub
                 and timm.create_model('local-dir:digits_cmt', pretrained=True)
    safetensors  only the weights, under this project's names
    pth          torch.save of the weights, with class names and epoch, for --eval, --finetune and every script
    released     like pth, under the names of the authors' code

From a checkpoint with model and EMA, the EMA is converted; --no-model-ema converts the model's own weights.
"""
import argparse
import hashlib
import html
import io
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import _path
from errors import UsageError, one_line, printable
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
    parser.add_argument('--license', metavar='ID', type=str.lower, help='license of the weights for the model card, '
                        'such as mit (default: apache-2.0 if they come from the released weights)')
    parser.add_argument('--push-to-hub', metavar='USER/NAME',
                        help='upload the folder to the Hugging Face Hub; a new repository is public')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser


import safetensors.torch
import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from timm.models._hub import save_config_for_hf

import cmt
import utils
from checkpoints import FORMAT, check_output
from system import write_file
from weights import Weights, best_of_run, build_model, create_cmt, read

logger = logging.getLogger(__name__)

FILES = 'model.safetensors', 'config.json', 'README.md', 'cmt.py'  # the contents of a converted folder


def write(path: Path, content: bytes) -> None:
    write_file(path, content)
    logger.info('wrote %s  %.1f MB  sha256 %s', path, len(content) / 1e6, hashlib.sha256(content).hexdigest())


def model_card(title: str, source: str, model: cmt.CMT, weights: Weights, checkpoint: dict[str, Any],
               license_id: str | None) -> str:
    """Return the README.md of a converted folder; `source` is its name for timm.create_model."""
    run = checkpoint if weights.is_own else {'args': {}}  # Other tools may write anything under these keys.
    args, accuracy, published = run['args'], run.get('acc1'), is_published(weights)
    origin, names, data = args.get('finetune') or '', weights.class_names(model), args.get('data_set') or ''
    if license_id is None and (published or timm.is_model(origin)):
        license_id = 'apache-2.0'
    if published:
        data = 'ImageNet-1k'
    elif args.get('data_path') and data.startswith(('IMNET', 'INAT', 'wds/')):
        data = public_name(args['data_path'])
    scores = None if accuracy is None or not data else [
        EvalResult('image-classification', 'imagefolder', data, 'accuracy', round(accuracy / 100, 6))]
    header = ModelCardData(license=license_id, library_name='timm', pipeline_tag='image-classification',
                           tags=['timm', 'cmt'], model_name=title, eval_results=scores)
    return str(ModelCard.from_template(
        header, template_path=str(_path.ROOT / 'scripts' / 'model_card.md'), title=html.escape(title), source=source,
        model=model, name=weights.name, parameters=sum(p.numel() for p in model.parameters()),
        crop_pct=weights.crop_pct, data=data, images=run.get('training_images'), origin=public_name(origin),
        accuracy=accuracy, file=None if published else public_name(weights.file),
        classes=names and list(map(printable, names))))


def public_name(path: str) -> str:
    """Return the last component of a path or URL, without hosts and tokens. Hub names stay unchanged."""
    is_hub = path.startswith(('hf-hub:', 'hf_hub:'))
    return (path if is_hub else PureWindowsPath(path.split('?')[0]).name).replace('`', "'")  # splits POSIX paths too


def is_published(weights: Weights) -> bool:
    """Return whether these are published weights, loaded by their name in timm."""
    return not Path(weights.file).exists() and ':' not in weights.file


def write_folder(folder: Path, model: cmt.CMT, weights: Weights, card: str) -> None:
    """Write a folder that timm opens as 'local-dir:FOLDER'."""
    published = is_published(weights)  # Call this before the folder exists, since is_published looks for it.
    name = weights.name if timm.is_model(weights.name or '') else 'cmt_s'  # `model_args` override those of cmt_s.
    model_args = {key: value for key, value in model.model_args.items() if not key.endswith('_rate')}
    described = create_cmt(name, device='meta', **model_args)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / 'model.safetensors', safetensors.torch.save(model.state_dict(), {'format': 'pt'}))
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / 'config.json'
        save_config_for_hf(described, config, model_config={'label_names': weights.class_names(model)},
                           data_config={'crop_pct': weights.crop_pct})
        content = json.loads(config.read_text('utf-8'))
    content['model_args'].pop('num_classes', None)  # transformers passes num_classes itself, and would pass it twice.
    if not published:
        for key in ('tag', 'license', 'origin_url'):
            content['pretrained_cfg'].pop(key, None)
    write(folder / 'config.json', json.dumps(content, indent=2).encode())
    write(folder / 'README.md', card.encode())
    write(folder / 'cmt.py', Path(cmt.__file__).read_bytes())


def call_hub(method: Callable, repo_id: str, **kwargs) -> Any:
    try:
        return method(repo_id=repo_id, **kwargs)
    except Exception as error:  # Hub clients can raise exceptions of any type.
        line = one_line(error)
        raise UsageError(f'--push-to-hub {repo_id}: {line}{"; log in with hf auth login" * ("401" in line)}') from None


def write_checkpoint(path: Path, model: cmt.CMT, weights: Weights, is_released: bool) -> None:
    """Write a checkpoint, under the names of the authors' code if `is_released`."""
    facts = {'epoch': weights.epoch, 'classes': weights.class_names(model)}
    state = {'model': model.state_dict(), **{key: value for key, value in facts.items() if value is not None}}
    if is_released:
        try:
            state['model'] = cmt.to_released(model.state_dict())
        except ValueError as error:
            raise UsageError(f'{error}: use another --format') from None
    else:
        state.update(format=FORMAT, model_args=model.model_args,
                     args={'input_size': model.img_size[0], 'model': weights.name, 'crop_pct': weights.crop_pct})
    torch.save(state, content := io.BytesIO())
    write(path, content.getvalue())


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    utils.setup_logging()
    output_format = args.format or {'.pth': 'pth', '.safetensors': 'safetensors'}.get(args.output.suffix, 'dir')
    with parser.usage_errors():
        check_output(args.output, args.source.removeprefix('local-dir:'), args.overwrite)
        if args.push_to_hub is not None and output_format != 'dir':
            raise UsageError(f'--push-to-hub uploads a folder, but {args.output} would be a file: use --format dir')
        file = best_of_run(args.source, args.model_ema)
        checkpoint = read(file)
        weights = Weights.from_checkpoint(checkpoint, file, args.model_ema)
        dtypes = [value.dtype for value in weights.state.values() if value.is_floating_point()]
        model = build_model(weights, args.model, dtype=torch.float64)  # float64 represents all other dtypes exactly.
        model.to(max(dtypes, key=lambda dtype: dtype.itemsize))
        if output_format == 'released' and not model.model_args['position_bias']:
            raise UsageError("the authors' code cannot load weights without position bias (MindCV's form)")
        if output_format == 'dir':
            hub = None if args.push_to_hub is None else call_hub(
                HfApi().create_repo, args.push_to_hub, exist_ok=True).repo_id
            title = args.output.resolve().name
            card = model_card(title, f'hf-hub:{hub}' if hub else f'local-dir:{title}', model, weights, checkpoint,
                              args.license)
            write_folder(args.output, model, weights, card)
            if hub:
                logger.info('uploaded to %s', call_hub(
                    HfApi().upload_folder, hub, folder_path=args.output, allow_patterns=FILES,
                    commit_message='Upload CMT weights'))
        elif output_format == 'safetensors':
            write(args.output, safetensors.torch.save(model.state_dict(), {'format': 'pt'}))
        else:
            write_checkpoint(args.output, model, weights, output_format == 'released')
    logger.info('%s at %dx%d, %d classes, as %s', weights.name or 'CMT', *model.img_size, model.num_classes,
                output_format)
    if output_format == 'dir':
        logger.info('import cmt, timm; timm.create_model(%r, pretrained=True)', f'local-dir:{args.output}')


if __name__ == '__main__':
    main()
