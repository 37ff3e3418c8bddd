#!/bin/sh
# On every machine, with the same HEAD, which is one of them: HEAD=node-0 NODES=4 GPUS=8 sh elastic.sh
# A machine that is lost may come back: the others start again with it from the last checkpoint.
# Without this torchrun tells a machine that comes back nothing of where to meet (seen with PyTorch 2.15).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 10 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id run \
    -m sslkit.pretrain "${RECIPE:-mocov3_vits}" --output "${OUTPUT:-/shared/run}"
