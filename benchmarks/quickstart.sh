#!/bin/sh
# Pretrain on the bundled images, evaluate, draw a report, export, and load the encoder in a process without sslkit.
# Usage: quickstart.sh RECIPE RUN_FOLDER BIN_FOLDER
set -eu
recipe=$1 run=$2 bin=$3
encoder=$run/exported
# One compute thread next to one data worker: a thread whose core is busy delays all others.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
started=$(date +%s)

step() { printf '\n== %s\n' "$*"; }

step "1/5 pretrain: MoCo on 10 000 Fashion-MNIST images, without labels"
"$bin/sslkit" pretrain "$recipe" --output "$run"

step "2/5 evaluate: compare with random weights and raw pixels"
"$bin/sslkit" eval knn "$run" --data builtin:fashion_mnist --workers 1
"$bin/sslkit" eval linear "$run" --data builtin:fashion_mnist --workers 1

step "3/5 report"
"$bin/sslkit" report "$run"

step "4/5 export"
rm -rf "$encoder"
"$bin/sslkit" export "$run" "$encoder"

step "5/5 load with timm, in a process without sslkit"
"$bin/python" - "$encoder" <<'PYTHON'
import sys

import timm
import torch

model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True, num_classes=0).eval()
size = model.pretrained_cfg["input_size"]
with torch.inference_mode():
    features = model(torch.zeros(1, *size))
assert "sslkit" not in sys.modules
print(f"timm loaded {model.pretrained_cfg['architecture']}: image {tuple(size)} -> features {tuple(features.shape)}")
PYTHON

minutes=$((($(date +%s) - started) / 60))
step "done in $minutes minutes"
echo "report    $run/report.html"
echo "curves    $run/pictures/curves.png"
echo "views     $run/pictures/views.png"
echo "encoder   $encoder"
