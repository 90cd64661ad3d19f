# The body of one part of an array; submit_array.py puts before it the #SBATCH lines, PYTHON, CODE and PARTS, and the command as "$@".
set -u

program=$1
shift
export PYTHONPATH=$CODE
exec "$PYTHON" "$CODE/$program" "$@" --part "$SLURM_ARRAY_TASK_ID/$PARTS"
