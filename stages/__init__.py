"""A LoRA fine-tune as a build: one command a stage, each a node of the DAG in dvc.yaml."""

import os

# transformers greets every import with a notice that PyTorch is missing; nothing here wants PyTorch.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
