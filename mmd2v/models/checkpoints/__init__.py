"""Public checkpoints that others trained: read without running anything in them, converted to our names once.

``mmd2v convert`` turns a file into a folder (:mod:`convert`), everything else reads that folder (:mod:`converted`).
"""
