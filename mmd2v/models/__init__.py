"""The student, its modality encoders and layers, and the frozen teachers."""
