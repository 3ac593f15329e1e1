"""What llama.cpp makes of a model's names, keys and layers: pure tables and rules."""
