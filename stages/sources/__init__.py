"""`model` of params.yaml → a complete base model's folder on this machine, by the network where it is not there yet."""
