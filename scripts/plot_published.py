"""python scripts/plot_published.py docs/assets/accuracy.svg

Plot ImageNet top-1 accuracy against multiply-adds for CMT and for models of similar size. All results are published
ones, from training on ImageNet-1k alone without distillation.
"""
import argparse

import _path
from options import Parser, output_file


@_path.parse_first
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog='plot_published.py', description=__doc__.split('\n', 2)[2])
    parser.add_argument('output', type=output_file, metavar='FILE', help='the figure')
    return parser


from matplotlib.figure import Figure

from reports import save

# family: (source, [(model, multiply-adds in G, top-1 accuracy in %)])
PUBLISHED = {
    'CMT': ('arXiv 2107.06263', [('Ti', 0.6, 79.2), ('XS', 1.5, 81.8), ('S', 4.0, 83.5), ('B', 9.3, 84.5)]),
    'ConvNeXt': ('github.com/facebookresearch/ConvNeXt', [('T', 4.5, 82.1), ('S', 8.7, 83.1), ('B', 15.4, 83.8)]),
    'Swin': ('github.com/microsoft/Swin-Transformer', [('T', 4.5, 81.2), ('S', 8.7, 83.2), ('B', 15.4, 83.5)]),
    'PVTv2': ('arXiv 2106.13797', [('B0', 0.6, 70.5), ('B1', 2.1, 78.7), ('B2', 4.0, 82.0), ('B3', 6.9, 83.2),
                                   ('B4', 10.1, 83.6), ('B5', 11.8, 83.8)]),
    'DeiT': ('arXiv 2012.12877; multiply-adds: arXiv 2106.13797',
             [('Ti', 1.3, 72.2), ('S', 4.6, 79.8), ('B', 17.6, 81.8)]),
}


def main() -> None:
    args = get_args_parser().parse_args()
    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axes = figure.subplots()
    for family, (_, models) in PUBLISHED.items():
        names, counts, accuracies = zip(*models)
        axes.plot(counts, accuracies, marker='o', label=family, linewidth=2.5 if family == 'CMT' else 1.3)
        for name, count, accuracy in models if family == 'CMT' else ():
            axes.annotate(f'CMT-{name}', (count, accuracy), (0, 7), textcoords='offset points', ha='center')
    axes.set(xscale='log', xlabel='multiply-adds (G)', ylabel='ImageNet top-1 accuracy (%)', ylim=(70, 86))
    axes.set_xticks(ticks := [0.5, 1, 2, 4, 8, 16], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, loc='lower right')
    save(figure, args.output)


if __name__ == '__main__':
    main()
