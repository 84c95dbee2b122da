#!/usr/bin/env bash
# Everything that takes a GPU to measure, into a folder: bash benchmarks/gpu.sh OUT [folder of CIFAR-10]
# lirpa_fastwarmup and an engine must be importable. About 25 minutes; give PARTS to do some of it, say PARTS="tests steps".
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
data=${2:-}
parts=${PARTS:-tests steps profile epochs train}
cd "$(dirname "$0")"
cifar="--device cuda --shape 3 32 32 --tf32"

part() { [[ " $parts " == *" $1 "* ]]; }

if part tests; then
    (cd .. && python3 -m pytest -p no:cacheprovider tests/test_cuda.py tests/test_compiled.py) 2>&1 | tee "$out/tests.txt"
fi
if part steps; then
    python3 step_time.py $cifar --width 8 32 64 --json "$out/cnn7.json" 2>&1 | tee "$out/cnn7.txt"
    for model in wide-resnet8 resnext; do
        python3 step_time.py $cifar --model $model --only clean "clean compiled" eager compiled \
            --json "$out/$model.json" 2>&1 | tee "$out/$model.txt"
    done
    python3 floor.py --device cuda --shape 3 32 32 --width 64 2>&1 | tee "$out/floor.txt"
fi
if part profile; then
    for step in eager compiled; do
        python3 profile_step.py --step $step --device cuda --shape 3 32 32 --width 64 2>&1 | tee "$out/profile_$step.txt"
    done
fi
if part epochs; then
    for precision in float32 tf32 bf16; do
        python3 epoch_time.py --device cuda --compile --precision $precision --json "$out/epoch_$precision.json" \
            2>&1 | tee "$out/epoch_$precision.txt"
    done
fi
if part train && [[ -n "$data" ]]; then
    # Ten epochs of the preset, for a look at its losses: mistakes of the recipe show on CIFAR-10 and not on MNIST.
    python3 -m lirpa_fastwarmup train cifar10 --epochs 10 --ramp-length 8 --lr-milestones 120 140 --compile --device cuda \
        --data-dir "$data" --out "$out/ten_epochs" --overwrite 2>&1 | tee "$out/ten_epochs.txt"
    rm -f "$out"/ten_epochs/*.pt
fi
