# The body of one part of an array; submit_array.py puts before it the #SBATCH lines, PYTHON and CODE, and as "$@" the number of
# parts and the command.
set -u

parts=$1 program=$2
shift 2
export PYTHONPATH=$CODE
exec "$PYTHON" "$CODE/$program" "$@" --part "$SLURM_ARRAY_TASK_ID/$parts"
