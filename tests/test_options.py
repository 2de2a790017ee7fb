"""Flags, their checks, and the YAML files that set their defaults."""
import re
from pathlib import Path

import pytest

from options import get_parser, parse_args

# as the authors publish them
PUBLISHED = {
    'cmt_ti': '--batch-size 256 --input-size 160 --weight-decay 0.05 --drop-path 0.1  --epochs 800 --test_freq 100 '
              '--test_epoch 760 --warmup-lr 1e-7 --warmup-epochs 20 --lr 8e-4 --min-lr 1e-5 --no-model-ema --apex-amp',
    'cmt_xs': '--batch-size 256 --input-size 192 --weight-decay 0.04 --drop-path 0.08 --epochs 400 --test_freq 100 '
              '--test_epoch 360 --warmup-lr 1e-6 --warmup-epochs 20 --lr 7e-4 --min-lr 2e-5 --model-ema-decay 0.9998 '
              '--apex-amp',
    'cmt_s': '--batch-size 128 --input-size 224 --weight-decay 0.05 --drop-path 0.1  --epochs 300 --test_freq 100 '
             '--test_epoch 260 --warmup-lr 1e-7 --warmup-epochs 20 --apex-amp',
    'cmt_b': '--batch-size 64  --input-size 256 --weight-decay 0.05 --drop-path 0.25 --epochs 300 --test_freq 100 '
             '--test_epoch 260 --warmup-lr 1e-6 --min-lr 2e-5 --warmup-epochs 20 --apex-amp',
}
# every flag of the authors' parser, with a value where it takes one
AUTHORS = """--batch-size 4 | --epochs 3 | --model cmt_ti | --input-size 64 | --drop 0.1 | --drop-path 0.1 |
    --drop-block 0.1 | --model-ema | --no-model-ema | --model-ema-decay 0.9 | --model-ema-force-cpu | --opt adamw |
    --opt-eps 1e-8 | --opt-betas 0.9 0.99 | --clip-grad 1 | --momentum 0.9 | --weight-decay 0.1 | --sched step |
    --lr 1e-3 | --lr-noise 0.4 0.9 | --lr-noise-pct 0.5 | --lr-noise-std 1 | --warmup-lr 1e-6 | --min-lr 1e-5 |
    --decay-epochs 3.5 | --warmup-epochs 3 | --cooldown-epochs 0 | --patience-epochs 5 | --decay-rate 0.5 |
    --dr 0.5 | --color-jitter 0.3 | --aa original | --smoothing 0 | --train-interpolation random | --repeated-aug |
    --no-repeated-aug | --reprob 0 | --remode const | --recount 2 | --resplit | --mixup 0 | --cutmix 0 |
    --cutmix-minmax 0.2 0.8 | --mixup-prob 0.5 | --mixup-switch-prob 0.1 | --mixup-mode elem | --data-path x |
    --data-set IMNET | --inat-category name | --output_dir x | --device cpu | --seed 1 | --resume x |
    --start_epoch 2 | --eval --resume x | --num_workers 1 | --pin-mem | --no-pin-mem | --test_freq 2 |
    --test_epoch 2 | --debug | --update_temperature | --warmup-drop-path | --warmup-drop-path-epochs 100 |
    --apex-amp | --apex-opt-level O2 | --throughput | --world_size 8 | --dist_url env:// | --init_method x |
    --local_rank 1"""
REFUSED = {
    '--drop-block', '--resplit', '--debug', '--update_temperature', '--warmup-drop-path',
    '--warmup-drop-path-epochs', '--init_method', '--patience-epochs'}


def mistake(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out
    assert re.fullmatch(rf'train\.py: error: [^\n]*{words}[^\n]*\n', captured.err), captured.err


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_command_lines(name):
    line = PUBLISHED[name]
    args = parse_args(['--data-path', '/data', '--output_dir', '/out', '--model', name, *line.split()])
    assert (args.model, args.data_path, args.output_dir) == (name, '/data', '/out')
    words = line.split()
    for flag, value in zip(words, words[1:]):
        if flag.startswith('--') and not value.startswith('--'):
            assert getattr(args, flag[2:].replace('-', '_')) == float(value)
    assert args.apex_amp and args.model_ema is (name != 'cmt_ti')


def test_defaults_are_the_authors():
    args = parse_args([])
    expected = dict(
        batch_size=64, epochs=300, model='cmt_s', input_size=224, drop=0., drop_path=0.1, model_ema=True,
        model_ema_decay=0.99996, model_ema_force_cpu=False, opt='adamw', opt_eps=1e-8, opt_betas=None, clip_grad=None,
        momentum=0.9, weight_decay=0.05, sched='cosine', lr=5e-4, lr_noise=None, lr_noise_pct=0.67, lr_noise_std=1.,
        warmup_lr=1e-6, min_lr=1e-5, decay_epochs=30, warmup_epochs=5, cooldown_epochs=10,
        decay_rate=0.1, color_jitter=0.4, aa='rand-m9-mstd0.5-inc1', smoothing=0.1, train_interpolation='bicubic',
        repeated_aug=True, reprob=0.25, remode='pixel', recount=1, mixup=0.8, cutmix=1., cutmix_minmax=None,
        mixup_prob=1., mixup_switch_prob=0.5, mixup_mode='batch', data_set='IMNET', output_dir='', seed=3407, resume='',
        start_epoch=0, eval=False, num_workers=4, pin_mem=True, test_freq=20, test_epoch=260, apex_amp=False,
        apex_opt_level='O1', throughput=False, dist_url='env://')
    assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize('flags', AUTHORS.split('|'), ids=lambda flags: flags.split()[0])
def test_every_flag_of_the_authors_works_or_says_why_not(capsys, flags):
    flags = flags.split()
    if flags[0] in REFUSED:
        mistake(capsys, flags, f'{flags[0].replace("_", "-")} is not supported: .+')
    else:
        parse_args(flags)


def test_both_spellings():
    dashes, lines = ['--model-ema-decay', '0.5', '--output-dir=a_b'], ['--model_ema_decay', '0.5', '--output_dir=a_b']
    assert parse_args(dashes) == parse_args(lines)
    assert parse_args(lines).output_dir == 'a_b'
    assert parse_args(['--no_model_ema']).model_ema is False and parse_args(['--local-rank=1']).local_rank == 1


@pytest.mark.parametrize('argv, words', [
    ('--batch-size -1', '-1 is not at least 1'),
    ('--batch-size 2.5', "'2.5' is not a whole number"),
    ('--lr 0', '0 is not above 0'),
    ('--lr nan', 'nan'),
    ('--reprob 1.5', '1.5 is not at least 0 and at most 1'),
    ('--sched linear', 'linear'),
    ('--data-set IMAGENET', 'IMAGENET'),
    ('--modle cmt_s', 'unrecognized arguments: --modle'),
    ('--mode cmt_s', 'unrecognized arguments: --mode'),
    ('--batch-size 7', '--batch-size 7 is odd: mixup'),
    ('--eval', '--eval needs --resume'),
    ('--resume auto', '--resume auto needs --output-dir'),
    ('--config nowhere.yaml', 'nowhere.yaml'),
])
def test_mistakes_get_one_line(capsys, argv, words):
    mistake(capsys, argv.split(), words)


def test_odd_batches_without_mixup():
    assert parse_args('--batch-size 7 --mixup 0 --cutmix 0'.split()).batch_size == 7
    assert parse_args('--batch-size 7 --eval --resume x'.split()).batch_size == 7


def test_mistakes_of_a_launched_group_come_from_the_first_rank(capsys, monkeypatch):
    for name, value in (('RANK', '1'), ('LOCAL_RANK', '1'), ('WORLD_SIZE', '2')):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse_args(['--lr', 'x'])
    assert not capsys.readouterr().err


# YAML

def config(tmp_path, text):
    (tmp_path / 'c.yaml').write_text(text)
    return ['--config', str(tmp_path / 'c.yaml')]


def test_yaml_sets_defaults_that_flags_override(tmp_path):
    flags = config(tmp_path, """
        lr: 8e-3
        warmup_epochs: 3
        min-lr: 1.0e-6
        opt-betas: [0.9, 0.95]
        lr-noise: [0.1, 0.9]
        model-ema: false
        repeated-aug: true
        apex-amp: true
        eval: false
        test-epoch: -1
        data-path: "/data of mine"
        aa: none
        clip-grad: null
    """)
    for argv in ([*flags, '--warmup-epochs', '7'], ['--warmup-epochs', '7', *flags]):
        args = parse_args(argv)
        assert (args.lr, args.warmup_epochs, args.min_lr, args.opt_betas) == (8e-3, 7, 1e-6, [0.9, 0.95])
        assert (args.model_ema, args.repeated_aug, args.apex_amp, args.eval) == (False, True, True, False)
        assert (args.test_epoch, args.data_path, args.aa, args.clip_grad) == (-1, '/data of mine', '', None)
    assert parse_args([*flags, '--model-ema']).model_ema
    assert parse_args([*flags, '--opt-betas', '0.8', '0.9']).opt_betas == [0.8, 0.9]


def test_every_switch_of_a_yaml_can_be_turned_off_again(tmp_path):
    lasting = ('apex-amp', 'grad-checkpointing', 'compile', 'sync-bn', 'sched-on-updates', 'model-ema', 'pin-mem')
    flags = config(tmp_path, ''.join(f'{name}: true\n' for name in lasting))
    args = vars(parse_args([*flags, *(f'--no-{name}' for name in lasting)]))
    assert not any(args[name.replace('-', '_')] for name in lasting)


@pytest.mark.parametrize('text, words', [
    ('learning-rate: 1', "unknown key 'learning-rate'"),
    ('config: x.yaml', "unknown key 'config'"),
    ('help: true', "unknown key 'help'"),
    ('lr: fast', "'fast' is not a number"),
    ('lr: true', 'lr'),
    ('lr: [1, 2]', ''),
    ('lr: {a: 1}', ''),
    ('apex-amp: 1', 'apex-amp'),
    ('epochs: 2.5', 'epochs'),
    ('debug: 1', '--debug is not supported'),
    ('- lr', 'is no list of "flag: value" lines'),
    ('', 'is no list of "flag: value" lines'),
    ('lr: [', 'c.yaml'),
    ('7: 3', 'unknown key'),
])
def test_yaml_mistakes(tmp_path, capsys, text, words):
    mistake(capsys, config(tmp_path, text), words)


@pytest.mark.parametrize('path', sorted((Path(__file__).parents[1] / 'configs').glob('*.yaml')), ids=lambda p: p.stem)
def test_the_configs_parse(path):
    args = parse_args(['--config', str(path)])
    assert args.model.startswith('cmt_') and get_parser().get_default('model') == 'cmt_s'
