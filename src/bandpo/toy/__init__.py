"""Small tasks with exact rewards, and small models that start from scratch: enough to train on a CPU in minutes."""
