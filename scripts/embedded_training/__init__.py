"""What the training of the embedded default models is made of: text, shape, loop, measurement."""
