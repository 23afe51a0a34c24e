"""Run stages as SLURM jobs and torchrun groups. They are started as commands."""
