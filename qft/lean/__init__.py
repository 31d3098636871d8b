"""The engine: tensors and modules only. It knows no strategy, no recipe and no file."""
