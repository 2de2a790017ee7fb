"""python scripts/draw_diagram.py docs/assets/cmt.png

Draw the block diagram of CMT that opens the README, as PNG or SVG. Channels, depths, heads and reductions are read
from CMT-S itself. The card behind the diagram is opaque, so that pages may be white or black.
"""
import argparse

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon
from matplotlib.path import Path as Line
from PIL.Image import DEFAULT_STRATEGY

import _path
from cmt import CMT, MODELS
from options import Parser, output_file

assert _path.ROOT  # importing _path puts the repository on sys.path

WIDTH, HEIGHT = 850, 774  # pixels in the README, unit of all positions; the PNG has two pixels for one
STYLE = {'font.family': 'DejaVu Sans', 'mathtext.fontset': 'stix', 'svg.hashsalt': 'cmt'}
INK, MUTED = '#1f2937', '#5b6675'
COLORS = {  # kind: (fill, edge)
    'conv': ('#d3e5fb', '#2f6db5'), 'attention': ('#fde0c8', '#cc6a1e'), 'ffn': ('#d3eed8', '#35894c'),
    'norm': ('#e8ebf0', '#858f9e'), 'dark': ('#334155', '#334155'), 'white': ('#ffffff', '#c3cad4'),
    'conv panel': ('#f1f7fe', '#a9c8ec'), 'attention panel': ('#fff6ee', '#f0bf97'),
    'ffn panel': ('#f1faf3', '#a5d3b0'),
}
LEGEND = [(40, 'conv', 'convolution over neighbours'), (232, 'attention', 'attention'),
          (331, 'ffn', 'feed-forward, 1×1 convolution'), (533, 'norm', 'norm, activation, pooling')]


def write(axes: Axes, x: float, y: float, text: str, size: float = 7.5, **kwargs) -> None:
    """Write text, centred at (x, y) unless `ha` is given."""
    axes.text(x, y, text, **{'size': size, 'color': INK, 'ha': 'center', 'va': 'center_baseline', **kwargs})


def box(axes: Axes, x: float, y: float, width: float, height: float, kind: str, text: str = '', **kwargs) -> None:
    """Draw a rounded box with text; its left edge is at x and its centre at y."""
    fill, edge = COLORS[kind]
    axes.add_patch(FancyBboxPatch(
        (x, y - height / 2), width, height, boxstyle=f'round,pad=0,rounding_size={8 if "panel" in kind else 4}',
        facecolor=fill, edgecolor=edge, linewidth=0.9))
    write(axes, x + width / 2, y, text, **{'color': 'white' if kind == 'dark' else INK, 'va': 'center', **kwargs})


def arrow(axes: Axes, *corners: tuple[float, float]) -> None:
    """Draw a line through corners, with an arrowhead at its end."""
    axes.add_patch(FancyArrowPatch(path=Line(corners), arrowstyle='-|>', mutation_scale=7, linewidth=1, color=INK,
                                   joinstyle='round', zorder=2))


def chain(axes: Axes, y: float, start: float, steps: list[tuple], height: float = 40) -> None:
    """Draw boxes (x, width, kind, text) and signs (x, sign) from left to right, and an arrow to each of them."""
    for x, *step in steps:
        if len(step) == 1:
            arrow(axes, (start, y), (x - 9, y))
            axes.add_patch(Circle((x, y), 9, facecolor='white', edgecolor=INK, linewidth=1, zorder=3))
            write(axes, x, y, step[0], size=10, va='center', zorder=4)
            start = x + 9
        else:
            width, kind, text = step
            arrow(axes, (start, y), (x, y))
            box(axes, x, y, width, height, kind, text)
            start = x + width


def residual(axes: Axes, start: float, end: float, y: float) -> None:
    """Draw a residual connection from the line at height y, over the boxes, to the sum at x = end."""
    axes.add_patch(Circle((start, y), 1.8, color=INK, zorder=3))
    arrow(axes, (start, y), (start, y - 33), (end, y - 33), (end, y - 9))


def heading(axes: Axes, x: float, name: str, shape: str) -> None:
    """Write the name of a part of the network and the shape of its result."""
    write(axes, x, 33, name, size=8.5, weight='bold', va='baseline')
    write(axes, x, 50, shape, color=MUTED, va='baseline')


def column(axes: Axes, x: float, width: float, pitch: float, chips: list[tuple]) -> None:
    """Draw a part of the network as a column of chips (kind, text)."""
    box(axes, x, 128, width, 132, 'white')
    for i, (kind, text) in enumerate(chips):
        box(axes, x + 6, 67.5 + pitch * (i + 0.5) - 2.5, width - 12, pitch - 5, kind, text, size=7)


def draw_network(axes: Axes, model: CMT) -> None:
    """Draw the top row: image, stem, stages, head."""
    y = 128
    heading(axes, 57, 'Image', f'H × W × {model.in_chans}')
    box(axes, 28, y, 58, 58, 'white')
    axes.add_patch(Polygon([(33, 151), (48, 126), (58, 139), (66, 131), (81, 151)], color='#9db4cf'))
    axes.add_patch(Circle((69, 114), 5.5, color='#f3b562'))
    arrow(axes, (86, y), (104, y))
    heading(axes, 144, 'Stem', f'H/2 × W/2 × {model.stem.conv1.out_channels}')
    column(axes, 104, 80, 34, [('conv', '3×3 conv\nstride 2'), ('conv', '3×3 conv'), ('conv', '3×3 conv')])
    write(axes, 144, 179.5, 'each with GELU\nand BatchNorm', size=6.5, color=MUTED, va='center')
    start, x = 184, 204
    for i, (stage, info) in enumerate(zip(model.stages, model.feature_info), 1):
        size = info['reduction']
        heading(axes, x + 56, f'Stage {i}', f'H/{size} × W/{size} × {info["num_chs"]}')
        arrow(axes, (start, y), (x, y))
        box(axes, x, y, 38, 132, 'conv', 'Patch aggregation\n2×2 conv, stride 2, LN', rotation=90, size=7.2)
        arrow(axes, (x + 38, y), (x + 54, y))
        for shift in (5, 2.5):
            box(axes, x + 54 + shift, y - shift, 56, 132, 'white')
        column(axes, x + 54, 56, 31, [('conv', 'LPU'), ('attention', 'LMHSA'), ('ffn', 'IRFFN')])
        write(axes, x + 82, 177, f'× {len(stage.blocks)}', size=10, weight='bold', va='center')
        start, x = x + 115, x + 130
    arrow(axes, (start, y), (x, y))
    heading(axes, x + 49, 'Head', f'{model.num_classes} classes')
    column(axes, x, 98, 25, [('ffn', f'1×1 conv, {model.num_features}'), ('norm', 'BatchNorm'), ('norm', 'SiLU'),
                             ('norm', 'average pool'), ('dark', 'classifier')])


def draw_block(axes: Axes) -> None:
    """Draw one block: LPU, LMHSA and IRFFN with their residual connections."""
    y = 324
    axes.add_patch(Polygon([(518, 195), (574, 195), (822, 240), (28, 240)], color='#e5e9ef', zorder=0.5))
    box(axes, 28, 313, 794, 150, 'white')
    write(axes, 40, 262, 'CMT block', weight='bold', size=9, ha='left')
    for x, width, kind, name, number, equation in (
            (124, 158, 'conv', 'LPU', '1, 5', r'$Y_i = \mathrm{LPU}(X_{i-1})$'),
            (322, 208, 'attention', 'LMHSA', '6', r'$Z_i = \mathrm{LMHSA}(\mathrm{LN}(Y_i)) + Y_i$'),
            (570, 208, 'ffn', 'IRFFN', '7', r'$X_i = \mathrm{IRFFN}(\mathrm{LN}(Z_i)) + Z_i$')):
        box(axes, x, 313, width, 130, f'{kind} panel')
        write(axes, x + 10, 266, name, weight='bold', color=COLORS[kind][1], size=8.5, ha='left')
        write(axes, x + width - 10, 266, f'eq. {number}', color=MUTED, size=7, ha='right')
        write(axes, x + width / 2, 365, equation, size=10)
    chain(axes, y, 80, [
        (148, 94, 'conv', '3×3 depthwise\nconvolution'), (264, '+'),
        (348, 70, 'norm', 'LayerNorm'), (434, 58, 'attention', 'LMHSA'), (512, '+'),
        (596, 70, 'norm', 'LayerNorm'), (682, 58, 'ffn', 'IRFFN'), (760, '+')])
    arrow(axes, (769, y), (793, y))
    for start, end in ((134, 264), (334, 512), (582, 760)):
        residual(axes, start, end, y)
    for x, shift, text in ((60, 0, '$X_{i-1}$'), (302, 12, '$Y_i$'), (550, 12, '$Z_i$'), (805, 0, '$X_i$')):
        write(axes, x, y - shift, text, size=11)


def draw_panel(axes: Axes, top: float, height: float, kind: str, name: str, words: str, equation: str) -> None:
    """Draw the frame and the head line of a part that is shown in detail."""
    box(axes, 28, top + height / 2, 794, height, f'{kind} panel')
    write(axes, 40, top + 21, name, weight='bold', color=COLORS[kind][1], size=8.5, ha='left')
    write(axes, 98, top + 21, words, color=MUTED, ha='left')
    write(axes, 810, top + 21, equation, size=10, ha='right')


def draw_lmhsa(axes: Axes, model: CMT) -> None:
    """Draw the attention: Q from all positions, K' and V' from a reduced map."""
    draw_panel(axes, 400, 198, 'attention', 'LMHSA', 'lightweight multi-head self-attention, eq. 3',
               r"$\mathrm{Softmax}\,(Q K′^{T} / \sqrt{d} + B)\,V′$")
    q, k, v = 478, 520, 562
    middle, reduced, scores = (q + (k + v) / 2) / 2, (k + v) / 2, (q + k) / 2
    write(axes, 56, middle, r'$\mathrm{LN}(Y_i)$', size=11)
    axes.plot((80, 88), (middle, middle), color=INK, linewidth=1)
    arrow(axes, (88, middle), (88, q), (304, q))
    arrow(axes, (88, middle), (88, reduced), (104, reduced))
    write(axes, 196, q - 10, 'all positions', size=7, color=MUTED)
    write(axes, 194, v + 20, '1/k² of the positions', size=7, color=MUTED)
    chain(axes, reduced, 88, [(104, 92, 'conv', 'k×k depthwise\nconvolution,\nstride k'),
                              (212, 70, 'norm', 'BatchNorm')], height=56)
    axes.plot((282, 290), (reduced, reduced), color=INK, linewidth=1)
    for y, name in ((q, '$Q$'), (k, "$K′$"), (v, "$V′$")):
        if y != q:
            arrow(axes, (290, reduced), (290, y), (304, y))
        box(axes, 304, y, 58, 30, 'attention', 'Linear')
        write(axes, 380, y - 11, name, size=11)
    arrow(axes, (362, q), (402, q))
    arrow(axes, (362, k), (402, k))
    box(axes, 402, scores, 74, 66, 'attention', r"$Q K′^{T} / \sqrt{d}$", size=10.5)
    box(axes, 442, 429, 116, 34, 'attention', 'position bias B,\none for each stage')
    arrow(axes, (500, 446), (500, scores - 9))
    chain(axes, scores, 476, [(500, '+'), (526, 64, 'attention', 'Softmax'), (614, '×'),
                              (642, 76, 'attention', 'Linear\nprojection')])
    arrow(axes, (362, v), (614, v), (614, scores + 9))
    arrow(axes, (718, scores), (764, scores))
    write(axes, 787, scores, '$+\\ Y_i$', size=11)
    heads = ', '.join(str(stage.blocks[0].lmhsa.num_heads) for stage in model.stages)
    ratios = ', '.join(str(stage.sr_ratio) for stage in model.stages)
    note = f'Stages 1 to 4: {heads} heads;\nk = {ratios} (k = 1: neither\nconvolution nor BatchNorm)'
    write(axes, 642, 560, note, size=7, color=MUTED, ha='left', va='center')


def draw_irffn(axes: Axes, model: CMT) -> None:
    """Draw the feed-forward network, with the residual connection over its depthwise convolution."""
    draw_panel(axes, 610, 118, 'ffn', 'IRFFN', 'inverted residual feed-forward network, eq. 4',
               r'$\mathrm{Conv}(F(\mathrm{Conv}(X))),\ \ F(X) = \mathrm{DWConv}(X) + X$')
    y = 690
    expand = model.stages[0].blocks[0].irffn.expand
    ratio = f'{expand.out_channels / expand.in_channels:g}C'
    write(axes, 56, y, r'$\mathrm{LN}(Z_i)$', size=11)
    chain(axes, y, 80, [
        (104, 100, 'ffn', f'1×1 convolution\nC → {ratio}'), (220, 76, 'norm', 'GELU\nBatchNorm'),
        (326, 94, 'conv', '3×3 depthwise\nconvolution'), (442, '+'), (468, 76, 'norm', 'GELU\nBatchNorm'),
        (560, 100, 'ffn', f'1×1 convolution\n{ratio} → C'), (676, 70, 'norm', 'BatchNorm')])
    residual(axes, 311, 442, y)
    arrow(axes, (746, y), (764, y))
    write(axes, 787, y, '$+\\ Z_i$', size=11)


def draw(model: CMT) -> Figure:
    """Draw the card."""
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200, facecolor='none')
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis('off')
    axes.add_patch(FancyBboxPatch((2, 2), WIDTH - 4, HEIGHT - 4, boxstyle='round,pad=0,rounding_size=16',
                                  facecolor='#f8fafc', edgecolor='#d0d7de', linewidth=1, zorder=0))
    draw_network(axes, model)
    draw_block(axes)
    draw_lmhsa(axes, model)
    draw_irffn(axes, model)
    for x, kind, text in LEGEND:
        box(axes, x, 750, 12, 12, kind)
        write(axes, x + 18, 750, text, size=7, ha='left')
    write(axes, 810, 750, 'numbers: CMT-S', size=7, color=MUTED, ha='right')
    return figure


def main(argv: list[str] | None = None) -> None:
    """Draw the diagram into a file."""
    parser = Parser(prog='draw_diagram.py', description=__doc__.split('\n', 2)[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=output_file, metavar='FILE', help='picture to write: .png or .svg')
    output = parser.parse_args(argv).output
    if output.suffix.lower() not in ('.png', '.svg'):
        parser.error(f'{output}: the name must end in .png or .svg')
    saving = {'metadata': {'Date': None}} if output.suffix.lower() == '.svg' else {
        'metadata': {'Software': None}, 'pil_kwargs': {'compress_level': 9, 'compress_type': DEFAULT_STRATEGY}}
    with matplotlib.rc_context(STYLE):
        draw(CMT(**MODELS['cmt_s'].model_args, device='meta')).savefig(output, **saving)


if __name__ == '__main__':
    main()
