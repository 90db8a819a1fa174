"""The tiny lab's base model: a Qwen2-Audio of three million parameters in Hugging Face layout, as package data."""
