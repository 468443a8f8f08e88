"""Studies that show what Self-Improving Pretraining buys on a machine without a GPU: `python -m evidence` (docs/results.md)."""
