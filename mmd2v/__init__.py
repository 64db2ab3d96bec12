"""mmd2v distils frozen image and text models into one small encoder for both."""
