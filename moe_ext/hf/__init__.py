"""Checkpoints of Hugging Face transformers into the project's GPT and back."""
