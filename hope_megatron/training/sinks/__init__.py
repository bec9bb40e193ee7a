"""Where a run's records go beside metrics.jsonl: one module per tracker, behind the interface of base.py."""
