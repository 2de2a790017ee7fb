"""Who started this process: the environment of torchrun, mpirun and srun. Imports no torch."""
import os
import re
import sys
from typing import NamedTuple

from errors import UsageError


class Launch(NamedTuple):
    """Describe who started this process, and its place among the processes of this launch."""
    launcher: str | None = None  # torchrun, mpirun or srun
    local_rank: int = 0
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 0  # 0 if unknown


def read_launch() -> Launch:
    """Read the variables of the launcher nearest to this process.

    timm.utils.distributed.world_info_from_env imports torch, mixes the variables of nested launchers, and takes a SLURM
    job for tasks that srun started.
    """
    def integer(name: str, default: int = 0) -> int:
        value = os.environ.get(name, default)
        try:
            return int(value)
        except ValueError:
            sys.stderr.write(f'error: {name} is {value!r} in the environment, not a whole number: unset it\n')
            raise SystemExit(2) from None

    torchrun = {'LOCAL_RANK', 'RANK', 'WORLD_SIZE'} & set(os.environ)
    if not {'RANK', 'WORLD_SIZE'} <= torchrun:  # Scripts set some of these for srun and mpirun, which know the rest.
        if 'OMPI_COMM_WORLD_SIZE' in os.environ:  # Open MPI
            return Launch('mpirun', integer('OMPI_COMM_WORLD_LOCAL_RANK'), integer('OMPI_COMM_WORLD_RANK'),
                          integer('OMPI_COMM_WORLD_SIZE'), integer('OMPI_COMM_WORLD_LOCAL_SIZE'))
        if 'MPI_LOCALRANKID' in os.environ:  # MPICH, and Intel MPI, which is based on it
            return Launch('mpirun', integer('MPI_LOCALRANKID'), integer('PMI_RANK'), integer('PMI_SIZE', 1),
                          integer('MPI_LOCALNRANKS'))
        if 'SLURM_STEP_ID' in os.environ:  # Batch scripts and shells of salloc have SLURM's other variables too.
            # The shell of an interactive step has the job's SLURM_NTASKS.
            return Launch('srun', integer('SLURM_LOCALID'), integer('SLURM_PROCID'),
                          integer('SLURM_STEP_NUM_TASKS', integer('SLURM_NTASKS', 1)))
    return Launch('torchrun', integer('LOCAL_RANK'), integer('RANK'), integer('WORLD_SIZE', 1),
                  integer('LOCAL_WORLD_SIZE')) if torchrun else Launch()


def run_name() -> str:
    """Return the launcher's name of this run: torchrun's --rdzv-id, or SLURM's job and step."""
    step = '.'.join(os.environ[name] for name in ('SLURM_JOB_ID', 'SLURM_STEP_ID')) \
        if read_launch().launcher == 'srun' else ''
    return os.environ.get('TORCHELASTIC_RUN_ID', step)


def set_master_address() -> tuple[str, int]:
    """Set MASTER_ADDR and MASTER_PORT if the launcher left them out, and return host and port.

    Under srun this is the first host of the step. The port follows from job and step, so that concurrent steps do not
    meet, and is below 32768, where the kernel's ports for outgoing connections begin. Under mpirun it is this host.

    Raises:
        UsageError: the address cannot be known.
    """
    launch = read_launch()
    if launch.launcher == 'mpirun':
        if 'MASTER_ADDR' not in os.environ and launch.local_world_size != launch.world_size:
            raise UsageError('mpirun started processes on several hosts: name the host of rank 0 by '
                             'mpirun -x MASTER_ADDR=HOST (Open MPI) or -genv MASTER_ADDR HOST (MPICH)')
        os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
        os.environ.setdefault('MASTER_PORT', '29500')
    if launch.launcher == 'srun':
        os.environ.setdefault('MASTER_ADDR', first_host(os.environ['SLURM_STEP_NODELIST']))
        job, step = int(os.environ['SLURM_JOB_ID']), int(os.environ['SLURM_STEP_ID'])
        os.environ.setdefault('MASTER_PORT', str(20000 + (job + 1009 * step) % 12000))
    for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT')[launch.launcher != 'torchrun':]:
        if name not in os.environ:
            raise UsageError(
                f'WORLD_SIZE is {launch.world_size}, but {name} is not set: use a launcher such as torchrun')
    return os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list such as node[08-15,20],gpu3.

    `scontrol show hostnames` lists them too, but containers often lack scontrol.
    """
    first = re.match(r'(?:[^,[]|\[[^]]*\])+', nodes)[0]
    return re.sub(r'\[([^],-]+)[^]]*\]', r'\1', first)
