"""A row of prompts, or a user's words → the tokens that a model is to continue."""
