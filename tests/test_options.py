"""Flags, their checks, YAML defaults, and the ranks that launchers set."""
import functools
import os
import re
import types
from pathlib import Path

import pytest
from timm.utils import distributed

import launch
import options
import predict
from options import parse_args

ROOT = Path(options.__file__).parent

# the command lines that the authors publish
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
# all other flags of the authors' parser, with a value where it takes one
AUTHORS = """--drop 0.1 | --model-ema | --model-ema-force-cpu | --opt adamw | --opt-eps 1e-8 | --opt-betas 0.9 0.99 |
    --clip-grad 1 | --momentum 0.9 | --sched step | --lr-noise 0.4 0.9 | --lr-noise-pct 0.5 | --lr-noise-std 1 |
    --decay-epochs 3.5 | --cooldown-epochs 0 | --decay-rate 0.5 | --dr 0.5 | --color-jitter 0.3 | --aa original |
    --smoothing 0 | --train-interpolation random | --repeated-aug | --no-repeated-aug | --reprob 0 | --remode const |
    --recount 2 | --mixup 0 | --cutmix 0 | --cutmix-minmax 0.2 0.8 | --mixup-prob 0.5 | --mixup-switch-prob 0.1 |
    --mixup-mode elem | --data-set IMNET | --inat-category name | --device cpu | --seed 1 | --resume x |
    --start_epoch 2 | --eval --resume x | --num_workers 1 | --pin-mem | --no-pin-mem | --apex-opt-level O2 |
    --throughput | --world_size 8 | --dist_url env:// | --local_rank 1"""
REFUSED = """--drop-block 0.1 | --patience-epochs 5 | --warmup-drop-path | --warmup-drop-path-epochs 100 | --dist-eval |
    --nb_classes 10 | --num-classes 10 | --auto_resume true"""


@pytest.fixture
def mistake(mistake):
    return functools.partial(mistake, types.SimpleNamespace(__name__='train', main=parse_args))


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


def test_every_flag_of_the_authors_works_or_says_why_not(mistake):
    for flags in AUTHORS.split('|'):
        parse_args(flags.split())
    for flags in map(str.split, REFUSED.split('|')):
        assert re.search(f'{flags[0].replace("_", "-")} .{{20,}}', mistake(*flags))


def test_both_spellings():
    dashes, underscores = '--model-ema-decay 0.5 --output-dir=a_b', '--model_ema_decay 0.5 --output_dir=a_b'
    assert parse_args(dashes.split()) == parse_args(underscores.split())
    assert parse_args(underscores.split()).output_dir == 'a_b'
    assert parse_args(['--no_model_ema']).model_ema is False and parse_args(['--local-rank=1']).local_rank == 1


@pytest.mark.parametrize('argv', """--batch-size -1 | --batch-size 2.5 | --batch-size 7 | --lr 0 | --lr nan | --lr inf |
    --reprob 1.5 | --seed 5000000000 | --sched linear | --data-set IMAGENET | --qqq 1 | --opt-betas 0.9 |
    --scale 1 0.5 | --cutmix-minmax 0.5 0.2 | --config nowhere.yaml | --mode cmt_s --model | --eval --resume |
    --resume auto --output-dir | --teacher-model resnet18 --distillation-type |
    --distillation-type soft --teacher-model""".split('|'))
def test_mistakes_name_their_flag(mistake, argv):
    """Or the flag that is missing: the second one of a case."""
    first, *values = argv.split()
    missing = [value for value in values if value.startswith('--')]
    assert re.search(f'{(missing or [first])[0]}', mistake(first, *(v for v in values if v not in missing)))


def test_a_run_stays_in_the_folder_of_its_config(tmp_path, mistake):
    (tmp_path / 'config.yaml').write_text('epochs: 3\n')
    argv = ['--config', str(tmp_path / 'config.yaml'), '--resume', 'auto']
    assert '--output-dir' in mistake(*argv)  # a recipe without a run next to it
    (tmp_path / 'checkpoint_last.pth').touch()
    assert parse_args(argv).output_dir == str(tmp_path)
    assert parse_args([*argv, '--output-dir=other']).output_dir == 'other'


def test_sweeps_may_give_switches_a_value(tmp_path):
    for text, value in (('True', True), ('true', True), ('1', True), ('False', False), ('false', False), ('0', False)):
        args = parse_args([f'--model-ema={text}', f'--repeated_aug={text}', f'--overwrite={text}',
                           f'--no-pin-mem={text}'])
        assert (args.model_ema, args.repeated_aug, args.overwrite, not args.pin_mem) == (value,) * 4
    (tmp_path / 'c.yaml').write_text('overwrite: true\n')
    assert not parse_args(['--config', str(tmp_path / 'c.yaml'), '--overwrite=1', '--overwrite=0']).overwrite
    assert predict.get_args_parser().parse_args(['a', 'b', '--no-model-ema=0']).model_ema
    assert '--ignore-exif' in parse_args(['--eval=1', '--resume', 'x', '--ignore-exif=false']).given


@pytest.mark.parametrize('flag', ['--model-ema=maybe', '--overwrite=2', '--compile=yes!'])
def test_other_values_of_switches_are_named(mistake, flag):
    assert flag in mistake(flag)


def test_odd_batches_without_mixup():
    assert parse_args('--batch-size 7 --mixup 0 --cutmix 0'.split()).batch_size == 7
    assert parse_args('--batch-size 7 --eval --resume x'.split()).batch_size == 7


LAUNCHED = {
    'torchrun': dict(LOCAL_RANK=1, RANK=5, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4),
    'Kubernetes': dict(RANK=5, WORLD_SIZE=8),
    'Open MPI': dict(OMPI_COMM_WORLD_LOCAL_RANK=3, OMPI_COMM_WORLD_RANK=4, OMPI_COMM_WORLD_SIZE=5),
    'MPICH': dict(MPI_LOCALRANKID=0, PMI_RANK=3, PMI_SIZE=6),
    'srun': dict(SLURM_STEP_ID=0, SLURM_LOCALID=2, SLURM_PROCID=6, SLURM_NTASKS=16),
    'none': {},
}
STEP = LAUNCHED['srun']


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets variables and removes all other launcher variables."""
    def change(**variables):
        for name in list(os.environ):
            if re.match('(SLURM|OMPI|PMI|MPI|MASTER|TORCHELASTIC)_|(LOCAL_)?(RANK|WORLD_SIZE)$', name):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')  # so that the test's end undoes what the code sets
    change()
    return change


@pytest.mark.parametrize('launcher', LAUNCHED)
def test_ranks_are_those_that_timm_reads(environment, launcher):
    environment(**LAUNCHED[launcher])
    assert launch.read_launch()[1:4] == distributed.world_info_from_env()


@pytest.mark.parametrize('variables, expected', [
    ({**STEP, **LAUNCHED['torchrun']}, ('torchrun', 1, 5, 8, 4)),  # srun torchrun
    ({**STEP, **LAUNCHED['Open MPI']}, ('mpirun', 3, 4, 5, 0)),  # mpirun starts its own helpers by srun
    ({**STEP, **LAUNCHED['MPICH']}, ('mpirun', 0, 3, 6, 0)),
    ({**STEP, 'WORLD_SIZE': 16}, ('srun', 2, 6, 16, 0)),  # scripts that export WORLD_SIZE=$SLURM_NTASKS
    ({'SLURM_NTASKS': 16, 'SLURM_PROCID': 0, 'SLURM_LOCALID': 0}, (None, 0, 0, 1, 0)),  # a batch script, salloc
])
def test_the_innermost_launcher_counts(environment, variables, expected):
    environment(**variables)
    assert launch.read_launch() == expected


@pytest.mark.parametrize('nodes, host', [
    ('n2', 'n2'), ('node[1-2]', 'node1'), ('gpu-[008,010-12],cpu1', 'gpu-008'), ('a,b[1-2]', 'a')])
def test_slurms_first_host_is_the_address(environment, nodes, host):
    step = dict(STEP, SLURM_JOB_ID=40123, SLURM_STEP_NODELIST=nodes, SLURM_JOB_NODELIST='other[1-9]')
    environment(**step)
    assert launch.set_master_address() == (host, 20000 + 40123 % 12000)
    assert (os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']) == (host, '24123')
    environment(**step, MASTER_ADDR='mine')
    assert launch.set_master_address() == ('mine', 24123)


def test_runs_have_the_launchers_name(environment):
    environment(**STEP, SLURM_JOB_ID=77)
    assert launch.run_name() == '77.0'
    environment(**STEP, SLURM_JOB_ID=77, **LAUNCHED['torchrun'], TORCHELASTIC_RUN_ID='mine')
    assert launch.run_name() == 'mine'


def test_mpirun_needs_an_address_for_several_hosts(environment):
    variables = LAUNCHED['Open MPI']
    environment(**variables, OMPI_COMM_WORLD_LOCAL_SIZE=5)
    assert launch.set_master_address() == ('127.0.0.1', 29500)
    for more in ({}, {'OMPI_COMM_WORLD_LOCAL_SIZE': 4}):
        environment(**variables, **more)
        with pytest.raises(ValueError, match='MASTER_ADDR'):
            launch.set_master_address()
        environment(**variables, **more, MASTER_ADDR='n1')
        assert launch.set_master_address() == ('n1', 29500)


@pytest.mark.parametrize('missing', ['RANK', 'MASTER_ADDR', 'MASTER_PORT'])
def test_half_of_a_launchers_variables_is_named(environment, missing):
    variables = dict(RANK=1, WORLD_SIZE=8, MASTER_ADDR='n1', MASTER_PORT=29500)
    del variables[missing]
    environment(**variables)
    with pytest.raises(ValueError, match=missing):
        launch.set_master_address()


# YAML

def config(tmp_path, text):
    (tmp_path / 'c.yaml').write_text(text)
    return ['--config', str(tmp_path / 'c.yaml')]


def test_yaml_sets_defaults_that_flags_override(tmp_path):
    flags = config(tmp_path, """
        lr: 8e-3
        warmup_epochs: 3
        opt-betas: [0.9, 0.95]
        model-ema: false
        apex-amp: true
        eval: false
        test-epoch: -1
        data-path: "/data of mine"
        aa: none
        clip-grad: null
    """)
    for argv in ([*flags, '--warmup-epochs', '7'], ['--warmup-epochs', '7', *flags]):
        args = parse_args(argv)
        assert (args.lr, args.warmup_epochs, args.opt_betas, args.test_epoch) == (8e-3, 7, [0.9, 0.95], -1)
        assert (args.model_ema, args.apex_amp, args.eval) == (False, True, False)
        assert (args.data_path, args.aa, args.clip_grad) == ('/data of mine', '', None)
    assert parse_args([*flags, '--model-ema']).model_ema
    assert parse_args([*flags, '--opt-betas', '0.8', '0.9']).opt_betas == [0.8, 0.9]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'c.yaml').write_text('output-dir: ~/out\n')
    for name in ('data-path', 'resume', 'finetune', 'class-map', 'teacher-path', 'output-dir', 'stopped-file'):
        args = parse_args([f'--{name}=~/x', '--config=~/c.yaml', '--distillation-type=soft', '--teacher-model=t'])
        assert getattr(args, name.replace('-', '_')) == f'{tmp_path}/x'
        assert args.output_dir == (f'{tmp_path}/x' if name == 'output-dir' else f'{tmp_path}/out')


def test_flags_can_turn_off_every_switch_of_a_yaml(tmp_path):
    switches = ('apex-amp', 'grad-checkpointing', 'compile', 'sync-bn', 'sched-on-updates', 'model-ema', 'pin-mem')
    flags = config(tmp_path, ''.join(f'{name}: true\n' for name in switches))
    args = vars(parse_args([*flags, *(f'--no-{name}' for name in switches)]))
    assert not any(args[name.replace('-', '_')] for name in switches)


@pytest.mark.parametrize('text, words', [
    ('learning-rate: 1', 'learning-rate'), ('lerning_rate: 1', 'lerning_rate'), ('epoch: 1', "'epoch'.*--epochs"),
    ('config: x.yaml', "'config'"), ('help: true', "'help'"), ('7: 3', '7'), ('drop-block: 1', '--drop-block'),
    ('lr: fast', 'fast'), ('lr: true', 'lr'), ('lr: [1, 2]', ''), ('lr: {a: 1}', ''), ('apex-amp: 1', 'apex-amp'),
    ('epochs: 2.5', 'epochs'), ('- lr', 'c.yaml'), ('', 'c.yaml'), ('lr: [', 'c.yaml'),
])
def test_yaml_mistakes(tmp_path, mistake, text, words):
    assert re.search(words, mistake(*config(tmp_path, text)))
