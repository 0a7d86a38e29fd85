"""What only a GPU can show; tools/gpu.py runs it."""
