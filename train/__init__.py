"""How a model is trained: recipes, the loop, the engine, optimizers, checkpoints."""
