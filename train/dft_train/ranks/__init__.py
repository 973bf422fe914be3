"""The processes of a run: how they start and meet (`start`, `launch`, `slurm`), decide alike (`agree`, `signals`),
and how the end of one is the end of all (`watch`).
"""
