#!/bin/bash
# Pretrain a model of llm_scratch with Megatron-LM. Start it on every machine; under Slurm: srun --ntasks-per-node=1 train.sh
# Not run by us: it wants GPUs and Transformer Engine. Its flags are those of Megatron-LM's megatron/training/arguments.py, read in 2026.
set -euo pipefail

# --- the lines to change, or to set in the environment --------------------------------------------------------
MEGATRON=${MEGATRON:-$HOME/Megatron-LM}             # a clone of github.com/NVIDIA/Megatron-LM, core_v0.16.1 or later
EXPORT=${EXPORT:-$HOME/for_cluster}                 # what export_megatron wrote: the model, its cuts (tp, pp), tokens, tokenizer
SAVE=${SAVE:-$HOME/checkpoints}                     # a folder that all machines see; a run that was stopped goes on from it
START=${START:-}                                    # a folder of save_megatron to begin from, empty for a fresh model
GPUS=${GPUS:-8}                                     # in each machine
NODES=${NODES:-${SLURM_NNODES:-1}}                  # machines
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}          # number of this one, from 0
MASTER=${MASTER:-localhost}                         # name of machine 0
PORT=${PORT:-29500}                                 # free on machine 0
MICRO=${MICRO:-1} GLOBAL=${GLOBAL:-512}             # texts at once on a GPU, and per step on all of them
STEPS=${STEPS:-100000} WARMUP=${WARMUP:-2000}       # updates
LR=${LR:-3e-4} MIN_LR=${MIN_LR:-3e-5}               # learning rate at its highest and at its end
# --------------------------------------------------------------------------------------------------------------

for needed in "$EXPORT/model.args" "$EXPORT/tokens.idx" "$EXPORT/tokens.bin" "$EXPORT/tokenizer/tokenizer.json" "$MEGATRON/pretrain_gpt.py"; do
    [ -f "$needed" ] || { echo "$needed is missing: set EXPORT to the folder of export_megatron and MEGATRON to a clone of Megatron-LM" >&2; exit 1; }
done
mapfile -t MODEL < "$EXPORT/model.args"             # one word per line
DATA=(--data-path "$EXPORT/tokens" --split 99,1,0 --data-cache-path "$SAVE/cache" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$EXPORT/tokenizer")
TRAIN=(--micro-batch-size "$MICRO" --global-batch-size "$GLOBAL" --train-iters "$STEPS" --lr "$LR" --min-lr "$MIN_LR" --lr-warmup-iters "$WARMUP" --lr-decay-style cosine
       --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --init-method-std 0.02 --bf16)
SPEED=(--transformer-impl transformer_engine --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
OUT=(--ckpt-format torch_dist --save "$SAVE" --load "$SAVE" --save-interval 1000 --log-interval 10 --eval-interval 1000 --eval-iters 10 --tensorboard-dir "$SAVE/tensorboard")
[ -z "$START" ] || OUT+=(--pretrained-checkpoint "$START")

export CUDA_DEVICE_MAX_CONNECTIONS=1                # tensor parallel hides its traffic only with one queue
exec torchrun --nproc_per_node "$GPUS" --nnodes "$NODES" --node_rank "$NODE_RANK" --master_addr "$MASTER" --master_port "$PORT" \
    "$MEGATRON/pretrain_gpt.py" "${MODEL[@]}" "${DATA[@]}" "${TRAIN[@]}" "${SPEED[@]}" "${OUT[@]}"
