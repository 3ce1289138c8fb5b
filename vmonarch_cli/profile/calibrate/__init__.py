"""`vmonarch calibrate`: a model's own layers and steps measured against dense attention, and a preset made of it."""
