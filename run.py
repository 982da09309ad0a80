"""The main job: `python run.py` describes held-out scenes with and without PruneHal, and measures hallucination."""

from experiments.cli.main import command

if __name__ == "__main__":
    command()
