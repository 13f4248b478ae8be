"""A base model's folder → its manifest, `artifacts/base.json`; a manifest → the folder on this machine."""
