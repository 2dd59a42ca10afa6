"""Models in Hugging Face's layout that other programs have quantized: a file and a row in `methods.py`."""
