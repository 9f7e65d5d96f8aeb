"""Fine-tuning: a LoRA adapter trained on a folder of music."""
