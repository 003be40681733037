"""Model folders and where their tensors come from."""
