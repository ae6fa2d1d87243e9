#!/usr/bin/env bash
# Five steps on one GPU with a 0.5B model, for each method in turn, to check that every part works on this machine.
# It needs verl with vLLM, and the data of prepare_data.py. The project's CI has no GPU and does not run it.
set -euo pipefail
cd "$(dirname "$0")"
for method in ${METHODS:-grpo bandpo-kl bandpo-tv dppo-kl no-clip}; do
  ./train.sh "$method" qwen2.5-3b 0 \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    trainer.n_gpus_per_node=1 trainer.total_training_steps=5 trainer.val_before_train=false trainer.test_freq=-1 trainer.save_freq=-1 \
    trainer.logger='[console]' trainer.experiment_name="smoke-$method" trainer.resume_mode=disable \
    data.train_batch_size=16 data.max_response_length=512 actor_rollout_ref.rollout.n=4 \
    actor_rollout_ref.actor.ppo_mini_batch_size=8 actor_rollout_ref.rollout.gpu_memory_utilization=0.4 "$@"
done
