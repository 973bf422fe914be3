"""Stage 2: shards -> batches -> model -> DFT loss -> checkpoints.

Data flows one way: cli -> arguments -> dataset -> sampler -> collate -> model -> loss -> trainer -> metrics.
Start reading at `trainer.py`, the whole run on one page. Never imports `dft_prep`: the dataset on disk is
all that passes between the stages.
"""
