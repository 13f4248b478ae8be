"""`model` of params.yaml → a complete base model's folder on this machine. The one room that asks a network."""
