#!/usr/bin/env bash
# The first hour on a new GPU, step by step. Each step has a time limit, and its result is written before the next begins.
#
#   bash benchmarks/gpu_session.sh OUT                    # all steps
#   bash benchmarks/gpu_session.sh OUT envs eager         # some of them, for calls of at most ten minutes
#   bash benchmarks/gpu_session.sh --rehearse OUT         # all steps on a CPU, in tiny runs
#
# Steps, with their limits in seconds:
#   envs    90    env-only speed of Breakout, 8 and 64 environments
#   eager   300   ppo_atari on Breakout, 8 environments: compile-cudagraphs against eager
#   suite   540   fps.py --suite gpu; called again with the same OUT, it goes on where it ended
#   pong    570   ppo_atari on Pong, 64 environments: seconds until the training return is 18
#   sac     240   profile of one iteration of SAC
#   combo   150   as "eager", with Inductor's combo_kernels: a copy of ppo_atari that asks for them
#   tests   570   pytest -m gpu: more than fit in; PYTEST_FLAGS="-k ppo_atari" takes some of them
#
# OUT gets session.txt (all that was printed), steps.txt (a line a step: name, ok or failed, seconds), results.jsonl
# (speeds, for benchmarks/results.jsonl), combo.jsonl (speeds of the copy, to compare), learning/ppo_atari.jsonl (Pong, for
# benchmarks/learning/) and the profile. Run folders and compiler caches go into runs/. Needed are bash, coreutils, and a
# Python with torch, numpy, tensorboard, tqdm, pytest, envpool, gymnasium and tyro; PYTHON names it. Without git,
# REDLINE_COMMIT says what is measured.
set -uo pipefail

rehearse=
[ "${1:-}" = --rehearse ] && { rehearse=yes; shift; }
[ $# -ge 1 ] || { echo "usage: bash benchmarks/gpu_session.sh [--rehearse] OUT [STEP ...]" >&2; exit 2; }
known=" envs eager suite pong sac combo tests "
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift || exit 1
for step in "$@"; do
    [[ $known == *" $step "* ]] || { echo "error: $step: must be one of$known" >&2; exit 2; }
done
wanted=" ${*:-$known} "
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"

run=runs/gpu_session/pong_$(date +%Y%m%d-%H%M%S)
fps=("$python" benchmarks/fps.py --results "$out/results.jsonl")
breakout=(--agents ppo_atari --agent-flags="--env-id Breakout-v5")
tiny=() suite=() race=(--total-timesteps 5000000 --num-envs 64 --num-steps 32 --num-minibatches 8 --update-epochs 3
    --learning-rate 5e-4 --clip-coef 0.2)
if [ "$rehearse" ]; then
    tiny=(--rehearse) suite=(--agents ppo_atari)
    race=(--total-timesteps 512 --num-envs 4 --num-steps 32 --eval-episodes 1 --frame-skip 16 --device cpu --mode eager
        --torch-threads 1 --env-threads 1)
fi
failed=0

step() { # NAME LIMIT COMMAND...: run it, if it was asked for, with all that it prints added to session.txt
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    [[ $wanted == *" $name "* ]] || return 0
    echo "== $name: $*" | tee -a "$out/session.txt"
    timeout --kill-after=20 "$limit" "$@" 2>&1 | tee -a "$out/session.txt"
    case ${PIPESTATUS[0]} in 0) status=ok ;; 124 | 137) status=time-is-up ;; *) status=failed ;; esac
    [ $status = ok ] || failed=1
    echo "$name $status $((SECONDS - start)) s" | tee -a "$out/steps.txt"
}

step envs 90 "${fps[@]}" "${breakout[@]}" "${tiny[@]}" --modes env-only --num-envs 8 64
step eager 300 "${fps[@]}" "${breakout[@]}" "${tiny[@]}" --modes compile-cudagraphs eager --num-envs 8
step suite 540 "${fps[@]}" "${suite[@]}" "${tiny[@]}" --suite gpu
step pong 510 "$python" agents/ppo_atari.py --env-id Pong-v5 --run-dir "$run" "${race[@]}"
step pong 30 "$python" benchmarks/learning.py --import "$run" --results "$out/learning"
step pong 30 "$python" -c "import learning, pathlib
curve = learning.read_curve(pathlib.Path('$run'))
print('seconds of training until the return of training games was 18:', learning.seconds_to(18, curve))"
step sac 240 "${fps[@]}" "${tiny[@]}" --agents sac_continuous_action --modes compile-cudagraphs --profile \
    --profile-dir "$out"
gzip --force "$out"/sac_*.json 2>/dev/null
if [[ $wanted == *" combo "* ]]; then
    mkdir -p runs/gpu_session
    sed 's/^\( *\)torch._dynamo.config.trace_autograd_ops = .*/&\n\1torch._inductor.config.combo_kernels = True/' \
        agents/ppo_atari.py > runs/gpu_session/ppo_atari_combo.py
    step combo 150 "$python" benchmarks/fps.py --results "$out/combo.jsonl" \
        --agents runs/gpu_session/ppo_atari_combo.py --agent-flags="--env-id Breakout-v5" \
        "${tiny[@]}" --modes compile-cudagraphs --num-envs 8
fi
# shellcheck disable=SC2086
step tests 570 "$python" -m pytest -m gpu -v -p no:cacheprovider --continue-on-collection-errors tests ${PYTEST_FLAGS:-}
exit $failed
