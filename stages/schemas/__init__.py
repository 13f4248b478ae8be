"""A raw row's columns → its content: text; prompt and completion; or messages."""
