#!/usr/bin/env sh
# From a folder of text to a model that answers: sh examples/train_on_a_folder.sh FOLDER [MINUTES]
#
# FOLDER has .txt, .md, .jsonl (text, or chats as {"messages": […]}) or .parquet files; some 10 MB and an hour make a
# model that writes in their manner. Everything is written into ./runs and ./mine. Safe to interrupt while it trains: the
# same train command with --resume continues.
set -eu
folder=$1
minutes=${2:-60}

minicpm-edge tokenizer train "$folder" --vocab-size 4096 --out mine/tokenizer
minicpm-edge data prepare "$folder" --tokenizer mine/tokenizer --out mine/data

cat >mine/recipe.toml <<'RECIPE'
batch_tokens = 8192
[model]
preset = "tiny"
[data]
tokenizer = "mine/tokenizer"
sequence_length = 512
stable = [{ path = "mine/data" }]
decay = [{ path = "mine/data" }]    # better: the part of your text that you want the model to sound like
[schedule]
peak_lr = 0.01
stable_tokens = 20_000_000          # --minutes ends it earlier
decay_tokens = 2_000_000
RECIPE

minicpm-edge train mine/recipe.toml --out runs/mine --minutes "$minutes"
minicpm-edge export runs/mine --gguf --quant Q8_0 --out mine/model.gguf
minicpm-edge chat mine/model.gguf --max-tokens 60 -p "Hello"
