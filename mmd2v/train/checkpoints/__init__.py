"""Checkpoints that exist whole or not at all, and continue a run exactly.

A checkpoint is a folder ``step-000100`` with DeepSpeed's files, a file a rank of what objectives keep (see
`rank_state`) and ``mmd2v.json``, which has the size and SHA-256 of every other file. Every rank copies its state to the
host and writes it in a thread beside the training (`host_copy`, `writer`), all into ``.step-000100.tmp``; when every
rank reports success, rank 0 writes ``mmd2v.json`` and renames the folder (`saving`). What starts with a dot is never
read; only `restore_replaced` looks for a checkpoint that was put aside for its successor when the run was killed. A run
continues from the newest checkpoint whose files are what was written (`choosing`).
"""
