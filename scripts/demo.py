"""python scripts/demo.py output/digits/checkpoint_best.pth --examples photos

Serve a web page that classifies photos: drop one, and see the five most probable classes and the Grad-CAM of the first.
It needs `pip install gradio`, but no network. Only this machine can reach the page, unless you set --host:

    python scripts/demo.py cmt_s --host 0.0.0.0    # open to the network
"""
import argparse
import importlib.util

import _path
from errors import UsageError
from options import Parser, add_classifier_flags, in_range, path

MAX_EXAMPLES = 20  # images
MAX_FILE_SIZE = '32mb'


@_path.parse_first
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split('\n', 2)[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    add_classifier_flags(parser)
    parser.add_argument('--examples', type=path, metavar='FOLDER',
                        help=f'offer up to {MAX_EXAMPLES} of the images in this folder, at any depth')
    parser.add_argument('--host', help='address to listen on (default: $GRADIO_SERVER_NAME, else 127.0.0.1)')
    parser.add_argument('--port', type=in_range(int, 1, 65535), metavar='N', default=7860, help='default: %(default)s')
    return parser


from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from evaluation import grad_cam, list_images, load_classifier, read_images
from reports import overlay


def build_page(model: nn.Module, names: list[str], examples: list[str]):
    """Return the page, a gradio.Blocks, for a model and the names of its classes."""
    import gradio
    # gradio would decode files itself, in more formats. Patch the class, since gradio replaces its instances.
    gradio.Image.preprocess = lambda self, file: file and file.path
    # Labels are dict keys, so they must be unique. ImageNet has two classes named crane.
    labels = [name if names.count(name) == 1 else f'{name} ({i})' for i, name in enumerate(names)]

    def classify(file: str | None):
        lines: list[str] = []
        read, pixels, inputs = read_images([(Path(file).name, file, -1)] if file else [], model, lines.append)
        if not read:
            return ''.join(lines), None, None
        with torch.no_grad():
            probabilities = model(inputs)[0].cpu().double().softmax(dim=0).tolist()
        image = to_pil_image(pixels[0]).resize((448, 448), Image.Resampling.BICUBIC)
        cam = torch.nn.functional.interpolate(grad_cam(model, inputs)[None], image.size, mode='bilinear')[0, 0]
        line = f'{read[0][0]}: classified at {model.img_size[1]} x {model.img_size[0]} pixels'
        return line, dict(zip(labels, probabilities)), overlay(image, cam.cpu().numpy())

    title = f'CMT: {len(names)} classes'
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f'# {title}')
        with gradio.Row():
            photo = gradio.Image(label='Photo', sources=['upload', 'clipboard'], height=360, buttons=[])
            cam = gradio.Image(label='Grad-CAM of the top prediction', interactive=False, height=360,
                               format='png', buttons=[])
            classes = gradio.Label(label='Classes', num_top_classes=5)
        line = gradio.Textbox(show_label=False, interactive=False)
        if examples:
            gradio.Examples(examples, photo, examples_per_page=MAX_EXAMPLES)
        photo.change(classify, photo, [line, classes, cam])
    return page


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    with parser.usage_errors():
        if importlib.util.find_spec('gradio') is None:
            raise UsageError('the page needs gradio: install it with pip install gradio')
        model, names, _ = load_classifier(args)
        files = list_images(args.examples) if args.examples else []
        page = build_page(model, names, files[::-(-len(files) // MAX_EXAMPLES) or 1])
        try:
            page.launch(server_name=args.host, server_port=args.port, max_file_size=MAX_FILE_SIZE, footer_links=[])
        except OSError:
            raise UsageError(f'cannot listen on --host {args.host or ""} --port {args.port}: change either') from None


if __name__ == '__main__':
    main()
