"""Hosts whose text reads an image by cross-attention (Mllama): the image is the private context, the text is public."""
