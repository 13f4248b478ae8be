"""params.yaml → checked values, one class a section. Stages depend on the values, not on this code."""
