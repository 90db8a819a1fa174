"""Qwen2-Audio in Flax: config, layers, audio encoder, Qwen2 decoder, and the model that joins them."""
