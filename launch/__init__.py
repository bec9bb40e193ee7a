"""Starting training processes: on this machine through torchrun, on a cluster through Slurm."""
