"""Checkpoints that exist whole or not at all, and continue a run exactly.

A checkpoint is a folder ``step-000100`` with DeepSpeed's files, a file a rank of what objectives keep (see
`rank_state`) and ``mmd2v.json``. All ranks write into ``.step-000100.tmp``; when every rank reports success, rank 0
renames it. What starts with a dot is never read; only `restore_replaced` looks for a checkpoint that was put aside for
its successor when the run was killed.
"""
