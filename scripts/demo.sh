#!/usr/bin/env bash
# Train short, test long, in one command. A small ALiBi model and its sinusoidal twin train on 256 tokens at a time and
# are evaluated on up to 4,096. Then the ALiBi model continues a prompt of several thousand. All files are in runs/demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
# Otherwise waiting threads spin, and slow down everything else on the machine.
export OMP_WAIT_POLICY=passive
source scripts/environment.sh train

out=runs/demo
if [[ -e "$out" ]]; then
    echo "error: $out exists; move or remove it to run the demo again" >&2
    exit 2
fi

train() { # MODEL_TYPE OUTPUT_DIR LEARNING_RATE [OPTION ...]
    hf_alibi train --model_type "$1" --output_dir "$2" --learning_rate "$3" \
        --vocab_size 2048 --block_size 256 \
        --config_overrides "hidden_size=192,num_hidden_layers=3,num_attention_heads=6,intermediate_size=768" \
        --per_device_train_batch_size 8 --per_device_eval_batch_size 16 --max_eval_samples 128 \
        --max_steps 300 --lr_scheduler_type cosine --warmup_steps 30 --weight_decay 0.1 --adam_beta2 0.95 \
        --eval_strategy steps --eval_steps 150 --save_strategy no --logging_steps 25 --report_to tensorboard "${@:4}"
}

echo "== 1/4  Training with ALiBi, 256 tokens at a time"
train alibi_gpt "$out/alibi" 3e-3

echo "== 2/4  Training with sinusoidal positions, on the same text with the same tokenizer"
train sinusoidal_gpt "$out/sinusoidal" 3e-3 --tokenizer_name "$out/alibi"

echo "== 3/4  Perplexity at 256 to 4,096 tokens, on files that neither model has seen"
hf_alibi evaluate --model_name_or_path "$out/alibi" "$out/sinusoidal" --labels ALiBi sinusoidal \
    --lengths 256 512 1024 2048 4096 --max_tokens 65536 --output_prefix "$out/extrapolation"

echo "== 4/4  A prompt of several thousand tokens, continued by the saved ALiBi model"
python - "$out/alibi" <<'PYTHON' > "$out/prompt.txt"
import sys

from transformers import AutoTokenizer

from hf_alibi.training.data import standard_library_corpus

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = max(standard_library_corpus()["validation"]["text"], key=len)
sys.stdout.write(tokenizer.decode(tokenizer(text, verbose=False)["input_ids"][:4096]))
PYTHON
hf_alibi generate --model_name_or_path "$out/alibi" --prompt_file "$out/prompt.txt" --max_new_tokens 100

echo "The plot is $out/extrapolation.png, the figures are $out/extrapolation.json."
