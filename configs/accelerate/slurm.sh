#!/bin/bash
# Trains through Slurm, one process for each GPU. Before the time limit the run saves a checkpoint and ends; the job
# then goes back into the queue, and goes on from the checkpoint, until the run is finished.
#
#   sbatch configs/accelerate/slurm.sh stage1/train.py [CONFIG.yaml] run_dir=SHARED/RUN [KEY=VALUE ...]
#
# Submit it from the project's folder, with its virtual environment active: Slurm hands both on. All machines must see
# them, and run_dir= and the data. Options of sbatch on the command line, such as --nodes=4, replace those below.
#SBATCH --job-name=vqgen
#SBATCH --nodes=2                # machines
#SBATCH --gpus-per-node=8        # GPUs of each; 0 if they have none
#SBATCH --ntasks-per-node=8      # processes of each: the same number
#SBATCH --cpus-per-task=8        # cores of each process: more than data.workers=
#SBATCH --time=24:00:00          # your queue's limit
#SBATCH --signal=B:USR1@600      # seconds before the limit, enough for an evaluation and a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append       # or the log would start again with each start

if [ $# -eq 0 ]; then
    echo "error: no program; usage: sbatch configs/accelerate/slurm.sh stage1/train.py run_dir=RUN [KEY=VALUE ...]" >&2
    exit 2
fi
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # of this job, because jobs may share a machine
export WORLD_SIZE=$SLURM_NTASKS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it from sbatch
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}  # of train.mixed_precision=null
echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}:" \
    "$SLURM_NTASKS processes on $SLURM_JOB_NUM_NODES machine(s)," \
    "$ACCELERATE_MIXED_PRECISION unless the settings say otherwise; requeued if stopped before its end: python $*"

# Slurm signals only the processes that it starts itself, so these are the training processes: `accelerate launch` in
# between would take SIGUSR1, end, and take the training processes with it before they have saved.
# Each task is bound to its own cores, so it counts as alone on them.
export LOCAL_WORLD_SIZE=1
# shellcheck disable=SC2016  # the task's shell expands the variables
srun --cpu-bind=cores --kill-on-bad-exit=1 \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python "$@"' bash "$@" &
step=$!
stopped=
trap 'stopped=yes; kill -USR1 "$step"' USR1  # srun passes it on
while kill -0 "$step" 2>/dev/null; do
    wait "$step"  # a signal ends this wait, but not the step
done
wait "$step"
code=$?

if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then
    echo "job $SLURM_JOB_ID: stopped by SIGUSR1; requeueing it, to go on from the checkpoint"
    scontrol requeue "$SLURM_JOB_ID" || code=$?
else
    echo "job $SLURM_JOB_ID: ended with exit code $code; not requeued"
fi
exit "$code"
