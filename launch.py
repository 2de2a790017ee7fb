"""Read which launcher started this process: torchrun, mpirun or srun. Nothing here imports torch."""
import os
import re
from typing import NamedTuple

from errors import UsageError


class Launch(NamedTuple):
    """Describe the launcher of this process, and the process's place in the launch."""
    launcher: str | None = None  # torchrun, mpirun or srun
    local_rank: int = 0
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 0  # 0 if unknown


def read_launch() -> Launch:
    """Read the variables of the innermost launcher.

    timm.utils.distributed.world_info_from_env imports torch, mixes the variables of nested launchers, and mistakes a
    SLURM job for tasks that srun started.
    """
    def integer(name: str, default: int = 0) -> int:
        return int(os.environ.get(name, default))

    torchrun = {'LOCAL_RANK', 'RANK', 'WORLD_SIZE'} & set(os.environ)
    if not {'RANK', 'WORLD_SIZE'} <= torchrun:  # torchrun sets both. Some scripts set one under srun or mpirun.
        if 'OMPI_COMM_WORLD_SIZE' in os.environ:  # Open MPI
            return Launch('mpirun', integer('OMPI_COMM_WORLD_LOCAL_RANK'), integer('OMPI_COMM_WORLD_RANK'),
                          integer('OMPI_COMM_WORLD_SIZE'), integer('OMPI_COMM_WORLD_LOCAL_SIZE'))
        if 'MPI_LOCALRANKID' in os.environ:  # MPICH, and Intel MPI, which is based on it
            return Launch('mpirun', integer('MPI_LOCALRANKID'), integer('PMI_RANK'), integer('PMI_SIZE', 1),
                          integer('MPI_LOCALNRANKS'))
        if 'SLURM_STEP_ID' in os.environ:  # Outside a step, as in a batch script, SLURM sets only others.
            # Prefer the step's count: in an interactive shell, SLURM_NTASKS counts the tasks of the whole job.
            return Launch('srun', integer('SLURM_LOCALID'), integer('SLURM_PROCID'),
                          integer('SLURM_STEP_NUM_TASKS', integer('SLURM_NTASKS', 1)))
    return Launch('torchrun', integer('LOCAL_RANK'), integer('RANK'), integer('WORLD_SIZE', 1),
                  integer('LOCAL_WORLD_SIZE')) if torchrun else Launch()


def run_name() -> str:
    """Return the launcher's name for this run: torchrun's --rdzv-id, or SLURM's job and step."""
    step = '.'.join(os.environ[name] for name in ('SLURM_JOB_ID', 'SLURM_STEP_ID')) \
        if read_launch().launcher == 'srun' else ''
    return os.environ.get('TORCHELASTIC_RUN_ID', step)


def set_master_address() -> tuple[str, int]:
    """Set MASTER_ADDR and MASTER_PORT if the launcher did not, and return host and port.

    Under srun, the host is the first one of the step. The port depends on job and step, so that concurrent steps do not
    collide. It stays below 32768, where the kernel's ephemeral ports begin. Under mpirun, the host is the local one.
    Raise UsageError if the address cannot be determined.
    """
    launch = read_launch()
    if launch.launcher == 'mpirun':
        if 'MASTER_ADDR' not in os.environ and launch.local_world_size != launch.world_size:
            raise UsageError('mpirun started processes on several hosts: name the host of rank 0 with '
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
