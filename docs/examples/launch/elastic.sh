#!/bin/sh
# Run on every machine with the same HEAD, the host name of one of them: HEAD=node-0 NODES=4 GPUS=8 sh elastic.sh
# A lost machine may rejoin: all continue from the last checkpoint.
# Without this variable torchrun does not give a rejoining machine the rendezvous address (seen with PyTorch 2.15).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 10 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id run \
    -m sslkit.pretrain "${RECIPE:-mocov3_vits}" --output "${OUTPUT:-/shared/run}"
