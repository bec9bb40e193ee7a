#!/usr/bin/env bash
# docs/stories.md, "Slurm with a container": plan, and what would be submitted. Submitting needs a cluster with GPUs.
. "$(dirname "$0")/common.sh"
cat > mine.yaml <<'YAML'
partition: gpu
gpus_per_node: 8
hardware: h100
container: {runtime: apptainer, image: /shared/images/hope.sif}
sbatch: {mail-type: END}
YAML
hope plan hope_760m_30b --world 16 > plan.txt
# Exit code 2: the data of that run are not on this machine, which the checks say.
hope launch hope_760m_30b --cluster mine.yaml --nodes 2 --dry-run > dry_run.txt || [ $? = 2 ]
grep -q "#SBATCH --mail-type=END" dry_run.txt
grep -q "srun --nodes=2 --ntasks=16 .* apptainer exec --nv .* /shared/images/hope.sif python -m launch.worker train" dry_run.txt
