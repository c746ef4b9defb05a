"""The stages of dvc.yaml, one module each: only they know paths and params.yaml."""
