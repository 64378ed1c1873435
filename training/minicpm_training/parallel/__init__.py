"""Several processes train one model: the process group, the sharded model, and the launcher."""
