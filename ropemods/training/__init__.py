"""Fine-tuning that ends in a fair answer: what `recipes/finetune.py` and `recipes/pretrain.py` are made of."""
