"""What is trained: layers, ops, the stack, weights. Needs torch, safetensors and the standard library only."""
