# The body of a training job; submit.py puts before it the #SBATCH lines, PYTHON, CODE and RUN, and flags as "$@".
set -u

say() { printf '%s job %s: %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$1"; }

# by address: a name need not resolve on the other nodes
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # jobs on the same nodes have ports of their own
PYTHONPATH=$CODE
OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export MASTER_ADDR MASTER_PORT PYTHONPATH OMP_NUM_THREADS

# --allow_change is for the first start: from then on what the run saves is of the new recipe and data. Where that start
# saved nothing, submit again by hand.
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || set --

in_vain=$RUN/slurm/$SLURM_JOB_ID.in_vain # a line for each start in a row that saved nothing
rm -f "$RUN/requeue"
say "start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, which meet at $MASTER_ADDR:$MASTER_PORT"
srun --export=ALL --kill-on-bad-exit=1 --distribution=block --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "$PYTHON" "$CODE/launch/train.py" --config "$RUN/slurm/config.yaml" "$@"
code=$?

# The first rank that exits ends the others, so srun may tell of their end instead of the 75.
if [ "$code" -eq 0 ]; then
    say "done"
elif [ "$code" -eq 75 ] || [ -e "$RUN/requeue" ]; then
    if [ -e "$RUN/requeue" ]; then
        rm -f "$in_vain"
        say "saved and stopped before its time was up; it goes into the queue again"
    else
        say "asked to end while still loading, with nothing to save" | tee -a "$in_vain"
        if [ "$(wc -l <"$in_vain")" -ge 3 ]; then
            say "that was the third time in a row, so it is not queued again; submit it with more --time than loading takes"
            exit 75
        fi
    fi
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    say "the cluster does not queue it again; the same submit command, without --fresh, goes on"
    exit 75
else
    say "failed with exit code $code; what a rank said stands above, and the same submit command, without --fresh, goes on from the last checkpoint"
    exit "$code"
fi
