"""`model=scenes_smol`: SmolLM2-135M-Instruct, joined to a small vision tower that was trained on our scenes."""
