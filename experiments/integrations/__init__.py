"""Other tools that runs talk to: lmms-eval, and trackers of accelerate."""
